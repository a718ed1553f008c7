"""Values checked against the type annotations of dataclasses, with the field's name in every error."""

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# Annotated[type, what is required, the test of it].
Text = Annotated[str, "a text", bool]
Positive = Annotated[float, "a finite number above 0", lambda v: v > 0]
NotNegative = Annotated[float, "a finite number from 0", lambda v: v >= 0]
Share = Annotated[float, "a number from 0 to 1", lambda v: 0 <= v <= 1]
Count = Annotated[int, "a whole number above 0", lambda v: v > 0]
Size = Annotated[int, "a whole number from 0", lambda v: v >= 0]
Scalar = Annotated[Any, "a text, a number or null", lambda v: v is None or isinstance(v, str | int) or _is_number(v)]


def read(value: Any, hint: Any, where: str) -> Any:
    """`value`, as json gives it, as the annotation `hint` has it: mappings become dataclasses.

    Raises ValueError naming `where` it went wrong.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, required, holds = options
        found = value if base is Any else read(value, base, where)
        return found if holds(found) else _refuse(value, required, where)
    if origin in (Union, types.UnionType):
        return None if value is None else read(value, next(o for o in options if o is not type(None)), where)
    if origin is Literal:
        known = any(value == o and type(value) is type(o) for o in options)
        return value if known else _refuse(value, f"one of {', '.join(map(repr, options))}", where)
    if origin is dict:
        if not isinstance(value, Mapping):
            return _refuse(value, "an object", where)
        return {name: read(member, options[1], f"{where}.{name}") for name, member in value.items()}
    if is_dataclass(hint):
        if type(value) is hint:
            check(value, where)
            return value
        return _read_dataclass(value, hint, where)
    if hint is float:
        return value if _is_number(value) else _refuse(value, "a finite number", where)
    return value if type(value) is hint else _refuse(value, f"a {hint.__name__}", where)


def _read_dataclass(value: Any, hint: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        return _refuse(value, "an object", where)
    prefix, hints = f"{where}." if where else "", _hints(hint)
    if unknown := sorted(set(value) - set(hints)):
        raise ValueError(f"unknown field '{prefix}{unknown[0]}'")
    for field in fields(hint):
        if field.name not in value and field.default is MISSING:
            raise ValueError(f"field '{prefix}{field.name}' is missing")
    try:
        return hint(**{name: read(member, hints[name], prefix + name) for name, member in value.items()})
    except TypeError as error:
        raise ValueError(f"field '{where}': {error}") from None


def check(instance: Any, where: str = "") -> None:
    """Raise ValueError unless every field of a dataclass instance is what its annotation says."""
    for name, hint in _hints(instance.__class__).items():
        read(getattr(instance, name), hint, f"{where}.{name}" if where else name)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _refuse(value: Any, required: str, where: str) -> Any:
    raise ValueError(f"field '{where}' is {repr(value)[:40]}, not {required}")
