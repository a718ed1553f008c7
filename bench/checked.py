"""Values checked against the type annotations of dataclasses, with the field's name in every error."""

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


# Annotated[type, what is required, the test of it].
Text = Annotated[str, "a text", bool]
Positive = Annotated[float, "a finite number above 0", lambda v: v > 0]
NotNegative = Annotated[float, "a finite number from 0", lambda v: v >= 0]
Share = Annotated[float, "a number from 0 to 1", lambda v: 0 <= v <= 1]
Count = Annotated[int, "a whole number above 0", lambda v: v > 0]
Size = Annotated[int, "a whole number from 0", lambda v: v >= 0]


def read(value: Any, hint: Any, where: str) -> Any:
    """`value`, as json gives it, as the annotation `hint` has it: mappings become dataclasses, which are checked too.

    Raises ValueError naming `where` it went wrong.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = value if options[0] is Any else read(value, options[0], where)
        return found if options[2](found) else _refuse(value, options[1], where)
    if origin in (Union, types.UnionType):
        return None if value is None else read(value, options[0], where)
    if origin is Literal:
        known = any(value == o and type(value) is type(o) for o in options)
        return value if known else _refuse(value, f"one of {', '.join(map(repr, options))}", where)
    if origin is dict and isinstance(value, Mapping):
        return {name: read(member, options[1], f"{where}.{name}") for name, member in value.items()}
    if is_dataclass(hint) and (type(value) is hint or isinstance(value, Mapping)):
        given = dict(value) if isinstance(value, Mapping) else vars(value)
        prefix, hints = f"{where}." if where else "", _hints(hint)  # type: ignore[arg-type]
        missing = [f.name for f in fields(hint) if f.name not in given and f.default is MISSING]
        for problem, names in (("is unknown", sorted(set(given) - set(hints))), ("is missing", missing)):
            if names:
                raise ValueError(f"field '{prefix}{names[0]}' {problem}")
        members = {name: read(member, hints[name], prefix + name) for name, member in given.items()}
        return value if type(value) is hint else hint(**members)  # type: ignore[operator]
    if hint is float:
        return value if is_number(value) else _refuse(value, "a finite number", where)
    return value if type(value) is hint else _refuse(value, f"a {getattr(hint, '__name__', 'mapping')}", where)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _refuse(value: Any, required: str, where: str) -> Any:
    raise ValueError(f"field '{where}' is {repr(value)[:40]}, not {required}")
