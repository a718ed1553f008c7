"""The rows: one JSON object a line, written and checked by their dataclasses. docs/benchmarking.md explains every field."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from . import checked
from .cases import Case, Execution, Kind, measurement_key
from .checked import Count, NotNegative, Positive, Share, Size, Text

CPU_LABEL = "CPU, not a statement about GPU speed"
ErrorSize = Annotated[Any, "a number from 0, 'inf' or 'nan'", lambda v: v in ("inf", "nan") or _is_size(v)]


Reading = Annotated[Any, "a figure, a text or null", lambda v: v is None or isinstance(v, str) or checked.is_number(v)]


def _is_size(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and not value < 0


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: percentiles, time per step, the host's clock, the median's confidence interval."""

    p20_us: Positive
    p50_us: Positive
    p80_us: Positive
    us_per_step: Positive
    wall_p50_us: Positive
    ci_low_us: Positive
    ci_high_us: Positive
    confidence: Share
    samples: Count
    calls_per_sample: Count
    clock: Text


@dataclass(frozen=True)
class Error:
    """Largest and RMS error of a tensor, in units of its largest true value; infinite ones are words in JSON."""

    max: ErrorSize
    rms: ErrorSize

    def __post_init__(self) -> None:
        object.__setattr__(self, "max", float(self.max))
        object.__setattr__(self, "rms", float(self.rms))


@dataclass(frozen=True)
class Floor:
    """The least microseconds per step by the roofs, its parts, and where they come from."""

    us_per_step: Positive
    exchange_us: NotNegative
    tensor_us: NotNegative
    memory_us: NotNegative
    roofs: Text


@dataclass(frozen=True)
class Device:
    """What a row was taken on."""

    type: Literal["cuda", "cpu"]
    name: Text
    driver: str | None = None
    threads: Count | None = None
    cores: Count | None = None
    capability: str | None = None
    multiprocessors: Count | None = None
    memory_bytes: Size | None = None
    l2_bytes: Size | None = None


@dataclass(frozen=True)
class Versions:
    """What decides the result besides the device and this package's code."""

    lstm_triton: Text
    torch: Text
    python: Text
    triton: Text | None = None
    cuda: Text | None = None
    cudnn: int | None = None
    system: Text | None = None


@dataclass(frozen=True)
class Source:
    """Which version of this package: commit, whether files differed from it, digest of the code that computes."""

    commit: Text | None
    dirty: bool | None
    digest: Text


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; raises ValueError naming the field that is wrong."""

    schema: Literal[1] = 1
    kind: Kind
    status: Literal["ok", "wrong", "failed", "skipped"]
    reason: str | None = None
    suite: Text
    case: Case
    provider: Text
    backend: str | None = None
    backend_reason: str | None = None
    algorithm: str | None = None
    execution: Execution
    precision: dict[str, Text]
    timing: Timing | None = None
    values: dict[str, float] | None = None
    bytes: dict[str, Size] | None = None
    errors: dict[str, Error] | None = None
    floor: Floor | None = None
    distance: Positive | None = None
    l2: Literal["warm", "flushed"] | None = None
    device: Device
    state: dict[str, Reading]
    versions: Versions
    source: Source
    date: Text
    run: Text
    command: str
    label: str | None = None
    synthetic: bool

    def __post_init__(self) -> None:
        checked.read(self, Row, "")
        datetime.datetime.fromisoformat(self.date)
        ok, timed = self.status == "ok", self.timing is not None
        rates = [value for name, value in (self.values or {}).items() if name.endswith("_per_s")]
        readings = [value for name, value in self.state.items() if name != "unread" and value is not None]
        rules = {
            f"status is {self.status!r} and reason is empty": ok or self.reason,
            f"status is {self.status!r} and there is a timing": ok or not timed,
            "a good row of kind 'timing' has a timing": timed or not ok or self.kind not in ("timing", "anchor"),
            "a row from a CPU carries a label": self.device.type != "cpu" or self.label is not None,
            "field 'values' has a rate of 0": all(rate > 0 for rate in rates),
            "field 'state' has what is no figure": all(map(checked.is_number, readings)),
        }
        for wrong in (message for message, holds in rules.items() if not holds):
            raise ValueError(wrong)

    @property
    def key(self) -> tuple:
        """Equal for two measurements of the same thing: of kind, suite, case, provider, execution and settings."""
        what = measurement_key(self.kind, self.suite, self.case)
        return *what, self.provider, self.execution, self.l2, self.device.threads

    def encode(self) -> str:
        """One line of JSON, without its newline."""
        return json.dumps(_finite(asdict(self)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    """Infinities and NaN as words, since JSON has none."""
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(line: bytes) -> Row:
    """The row of one line; raises ValueError where it is none."""
    try:
        value = json.loads(line.decode(), parse_constant=lambda name: float("nan"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, and no page takes it
        return checked.read(value, Row, "")
    except RecursionError:
        raise ValueError("nested too deeply for a row") from None


class StoreError(RuntimeError):
    """A file of rows cannot be used; the message says which and why."""


def read_all(paths: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """The good rows of files and, recursively, of folders, and a sentence for each line that is none.

    Raises:
        StoreError: a path that does not exist, a file that cannot be read, or one with lines of which none is a row.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for path in paths:
        if not path.exists():
            raise StoreError(f"{path}: no such file or folder")
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            good, bad = _read(file)
            if bad and not good:
                raise StoreError(f"{file} holds no benchmark rows. First problem: {bad[0]}")
            rows, problems = rows + good, problems + bad
    return rows, problems


def _read(path: Path) -> tuple[list[Row], list[str]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error
    rows, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            rows += [decode(line)] if line.strip() else []
        except ValueError as error:
            cut = "cut off: " if number == len(lines) else ""  # the last line has no newline
            problems.append(f"{path}:{number}: {cut}{error}")
    return rows, problems


def append(path: Path, row: Row) -> None:
    """Add one row: a single write at the end of the file, on the disk before this returns.

    Two processes may append at once. A line that an earlier crash cut off is ended first, so that it spoils no other.
    """
    data = row.encode().encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        size = os.fstat(file.fileno()).st_size
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            data = b"\n" + data
        if (written := file.write(data)) != len(data):
            raise StoreError(f"{path}: the disk took {written} of {len(data)} bytes")
        os.fsync(file)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` at the end, which at no moment holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".unfinished")
    yield written
    os.replace(written, path)


@contextlib.contextmanager
def one_run_at_a_time(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run, since two at once would time each other.

    Raises:
        StoreError: another run holds it, or the folder cannot be written.
    """
    # Outside the folder, which is meant to be committed.
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((Path(tempfile.gettempdir()) / f"lstm-triton-bench-{name}.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"another benchmark run is writing to {folder}: wait for it, or give --output") from None
        except OSError as error:
            raise StoreError(f"{folder} cannot be written: {error.strerror or error}") from error
        yield
