"""The rows: one JSON object a line, of a versioned schema. docs/benchmarking.md explains the method behind the fields."""

import datetime
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .cases import Case

SCHEMA = 1

KINDS = ("timing", "accuracy", "memory", "overhead", "cold-start", "roof", "anchor")
STATUSES = ("ok", "wrong", "failed", "skipped")
CPU_LABEL = "CPU, not a statement about GPU speed"


class RowError(ValueError):
    """A row is not of this schema; the message names the field."""


@dataclass(frozen=True)
class Field:
    """What a field may hold, whether it may be null, and what it means (with its unit)."""

    types: tuple[type, ...]
    meaning: str
    nullable: bool = False
    allowed: tuple[Any, ...] | None = None
    required_keys: tuple[str, ...] = ()


_NUMBER = (int, float)

FIELDS: dict[str, Field] = {
    "schema": Field((int,), "version of this schema", allowed=(SCHEMA,)),
    "kind": Field((str,), "what was measured", allowed=KINDS),
    "status": Field((str,), "'wrong': the results were, so nothing was timed; 'skipped': not tried", allowed=STATUSES),
    "reason": Field((str,), "why it was wrong, failed or was skipped, in words", nullable=True),
    "suite": Field((str,), "the suite that holds the case"),
    "case": Field(
        (dict,),
        "every parameter of the problem",
        required_keys=(
            "name", "form", "input_size", "hidden_size", "layers", "bidirectional", "proj_size", "batch", "length",
            "dtype", "mode", "rows", "resets", "scale", "precision",
        ),
    ),
    "provider": Field((str,), "who computed it"),
    "backend": Field((str,), "which of its ways the provider took", nullable=True),
    "backend_reason": Field((str,), "why, in the provider's own words", nullable=True),
    "algorithm": Field((str,), "cuDNN's algorithm by torch's rules, for torch.nn.LSTM on a GPU", nullable=True),
    "execution": Field((str,), "calls made one by one, or replayed", allowed=("eager", "graph")),
    "precision": Field(
        (dict,),
        "of float32 products: torch's settings and this package's",
        required_keys=("cudnn_rnn", "cuda_matmul", "lstm_triton"),
    ),
    "timing": Field(
        (dict,),
        "microseconds per call: percentiles over the samples, a confidence interval of the median, per time step, wall-clock",
        nullable=True,
        required_keys=(
            "p20_us", "p50_us", "p80_us", "us_per_step", "wall_p50_us", "ci_low_us", "ci_high_us", "confidence",
            "samples", "calls_per_sample", "clock",
        ),
    ),
    "values": Field((dict,), "other figures; each name ends in its unit", nullable=True),
    "bytes": Field((dict,), "bytes of memory, by what holds them", nullable=True),
    "errors": Field(
        (dict,), "by tensor: max and RMS error against float64, in units of the true tensor's largest value", nullable=True
    ),
    "floor": Field(
        (dict,),
        "least microseconds per step by the roofs: one exchange + max(tensor, memory)",
        nullable=True,
        required_keys=("us_per_step", "exchange_us", "tensor_us", "memory_us", "roofs"),
    ),
    "distance": Field(_NUMBER, "measured microseconds per step over the floor's", nullable=True),
    "l2": Field((str,), "what the L2 cache holds when a call starts", nullable=True, allowed=("warm", "flushed")),
    "device": Field((dict,), "what it ran on", required_keys=("type", "name")),
    "state": Field((dict,), "clocks, power, temperature when the row was taken; read, never set"),
    "versions": Field((dict,), "of everything that decides the result", required_keys=("lstm_triton", "torch", "python")),
    "source": Field(
        (dict,), "of this package: commit, whether files differed from it, digest of the code",
        required_keys=("commit", "dirty", "digest"),
    ),
    "date": Field((str,), "UTC, ISO 8601"),
    "run": Field((str,), "rows of one invocation share it"),
    "command": Field((str,), "what was typed"),
    "label": Field((str,), "a caution that must stand beside the figure", nullable=True),
    "synthetic": Field((bool,), "made up to test the report: never a result"),
}  # fmt: skip


def check(row: Any) -> None:
    """Raise RowError unless `row` is a row of this schema."""
    if not isinstance(row, Mapping):
        raise RowError(f"a row is a JSON object, this is {type(row).__name__}")
    if row.get("schema") != SCHEMA:
        raise RowError(f"schema is {row.get('schema')!r}, this version reads {SCHEMA}")
    for name, field in FIELDS.items():
        if name not in row:
            raise RowError(f"field {name!r} is missing")
        _check_field(name, field, row[name])
    if unknown := sorted(set(row) - set(FIELDS)):
        raise RowError(f"unknown field {unknown[0]!r}")
    _check_case(row["case"])
    for name in MEMBERS:
        if row[name] is not None:
            _check_members(name, row[name])
    if row["distance"] is not None and _positive(row["distance"]):
        raise RowError(f"field 'distance' is {_brief(row['distance'])}, not {_positive(row['distance'])}")
    try:
        datetime.datetime.fromisoformat(row["date"])
    except ValueError:
        raise RowError(f"field 'date' is {_brief(row['date'])}, not a date") from None
    if row["status"] != "ok":
        if not row["reason"]:
            raise RowError(f"status is {row['status']!r} and reason is empty")
        if row["timing"] is not None:
            raise RowError(f"status is {row['status']!r} and there is a timing")
    elif row["kind"] in ("timing", "anchor") and row["timing"] is None:
        raise RowError("a good row of kind 'timing' has a timing")
    if row["device"]["type"] == "cpu" and row["label"] is None:
        raise RowError("a row from a CPU carries a label")


def _check_field(name: str, field: Field, value: Any) -> None:
    if value is None:
        if not field.nullable:
            raise RowError(f"field {name!r} is null")
        return
    is_bool = isinstance(value, bool)  # which Python counts among the ints
    if not isinstance(value, field.types) or (is_bool and bool not in field.types):
        raise RowError(f"field {name!r} is {type(value).__name__}, not {' or '.join(t.__name__ for t in field.types)}")
    if field.allowed is not None and value not in field.allowed:
        raise RowError(f"field {name!r} is {value!r}, not one of {', '.join(map(repr, field.allowed))}")
    keys: Any = value  # of an object
    if missing := [key for key in field.required_keys if key not in keys]:
        raise RowError(f"field {name!r} has no {missing[0]!r}")


# What the members of the objects may be: a rule returns what is asked for, or None where the value is that.
Rule = Callable[[Any], str | None]


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, _NUMBER):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _positive(value: Any) -> str | None:
    return None if _number(value) and value > 0 else "a finite number above 0"


def _not_negative(value: Any) -> str | None:
    return None if _number(value) and value >= 0 else "a finite number from 0"


def _finite_number(value: Any) -> str | None:
    return None if _number(value) else "a finite number"


def _count(value: Any) -> str | None:
    return None if _number(value) and isinstance(value, int) and value > 0 else "a whole number above 0"


def _bytes(value: Any) -> str | None:
    return None if _number(value) and isinstance(value, int) and value >= 0 else "a whole number from 0"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a text"


def _or_null(rule: Rule) -> Rule:
    return lambda value: None if value is None else (wanted := rule(value)) and f"{wanted}, or null"


def _plain(value: Any) -> str | None:
    return None if value is None or isinstance(value, (str, bool)) or _number(value) else "a text, a number or null"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _device_type(value: Any) -> str | None:
    return None if value in ("cuda", "cpu") else "'cuda' or 'cpu'"


def _share(value: Any) -> str | None:
    return None if _number(value) and 0 <= value <= 1 else "a number from 0 to 1"


def _error(value: Any) -> str | None:
    """Of one tensor; an infinite error is a float in memory and a word on the disk."""
    for name in ("max", "rms"):
        e = value.get(name) if isinstance(value, Mapping) else None
        is_float = isinstance(e, float) and not e < 0
        if not is_float and e not in ("inf", "nan") and _not_negative(e) is not None:
            return f"an object with a {name!r} that is a number from 0, 'inf' or 'nan'"
    return None


def _value(name: str) -> Rule:
    return _positive if name.endswith("_per_s") else _finite_number


_TIMES = ("p20_us", "p50_us", "p80_us", "us_per_step", "wall_p50_us", "ci_low_us", "ci_high_us")

# By field: the rules of the members that have names, and of all others.
MEMBERS: dict[str, tuple[Mapping[str, Rule], Callable[[str], Rule]]] = {
    "timing": (
        {**dict.fromkeys(_TIMES, _positive), "confidence": _share, "samples": _count, "calls_per_sample": _count,
         "clock": _text},
        lambda name: _plain,
    ),
    "values": ({}, _value),
    "bytes": ({}, lambda name: _bytes),
    "errors": ({}, lambda name: _error),
    "floor": ({"us_per_step": _positive, "roofs": _text}, lambda name: _not_negative),
    "precision": ({}, lambda name: _text),
    "device": ({"type": _device_type, "name": _text, "threads": _or_null(_count)}, lambda name: _plain),
    "state": ({"unread": _text}, lambda name: _or_null(_finite_number)),
    "versions": (dict.fromkeys(("lstm_triton", "torch", "python"), _text), lambda name: _plain),
    "source": ({"commit": _or_null(_text), "dirty": _or_null(_flag), "digest": _text}, lambda name: _plain),
}  # fmt: skip


def _check_members(field: str, value: Mapping[str, Any]) -> None:
    named, others = MEMBERS[field]
    for name, member in value.items():
        wanted = named.get(name, others(name))(member)
        if wanted is not None:
            raise RowError(f"field '{field}.{name}' is {_brief(member)}, not {wanted}")


def _check_case(case: Mapping[str, Any]) -> None:
    known = {field.name: field.type for field in fields(Case)}
    for name, value in case.items():
        wanted: Any = known.get(name)
        right = _number(value) if wanted is float else isinstance(value, wanted) if wanted else True
        if not right or (isinstance(value, bool) and wanted is not bool):
            raise RowError(f"field 'case.{name}' is {_brief(value)}, not {wanted.__name__}")
    try:
        Case.from_json(case)
    except ValueError as error:
        raise RowError(f"field 'case': {error}") from None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def encode(row: Mapping[str, Any]) -> str:
    """One line of JSON, without its newline; infinities and NaN become strings, as JSON has none."""
    check(row)
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value


def decode(line: str) -> dict[str, Any]:
    """The row of one line.

    Raises:
        RowError: not JSON, or not of this schema.
    """
    try:
        row = json.loads(line, parse_constant=_no_constant)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text, and no page takes it
        check(row)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(f"not JSON ({error})") from None
    except RecursionError:
        raise RowError("nested too deeply for a row") from None
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")
