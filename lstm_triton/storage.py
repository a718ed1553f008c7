"""Dataclasses and NamedTuples as JSON on disk, checked when read, and files that are written whole or not at all."""

import contextlib
import functools
import os
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def read(value: Any, hint: Any, where: str) -> Any:
    """Convert `value`, from json, to the annotation `hint`: mappings become dataclasses; numbers must be finite and >= 0.

    Raises ValueError where it is not of that kind, and names the member; `where` is the name of the whole.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in options[1:]:
            with contextlib.suppress(ValueError):
                return read(value, option, where)
        return read(value, options[0], where)
    if origin is dict and isinstance(value, dict):
        return {name: read(member, options[1], f"{where}.{name}") for name, member in value.items()}
    if isinstance(value, dict) and (is_dataclass(hint) or hasattr(hint, "_fields")):
        hints = _hints(hint)
        members = {name: read(member, hints.get(name, Any), f"{where}.{name}") for name, member in value.items()}
        try:
            return hint(**members)
        except (TypeError, ValueError) as error:  # fields that are missing, unknown, or contradict each other
            raise ValueError(f"{where}: {error}") from None
    good = hint is Any or type(value) is hint or (hint is float and type(value) is int)
    if origin is Literal:
        good = any(value == option and type(value) is type(option) for option in options)
    if not good or (type(value) in (int, float) and hint is not Any and not 0 <= value < 1e300):
        raise ValueError(f"field '{where.partition('.')[2] or where}' is {repr(value)[:40]}")
    return value


_hints = functools.cache(get_type_hints)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield a path to write to. It is renamed to `path` at the end, so that `path` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".unfinished")
    yield written
    os.replace(written, path)
