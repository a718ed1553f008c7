"""The rows: one JSON object a line, written and read by their dataclasses. docs/benchmarking.md explains every field."""

import contextlib
import datetime
import fcntl
import json
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lstm_triton import storage
from lstm_triton.timing import Samples, median_interval
from lstm_triton.tolerance import Errors

from .cases import Case, Execution, Kind, Task, UsageError, require

CPU_LABEL = "CPU, not a statement about GPU speed"


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: percentiles, time per step, the host's clock, the median's confidence interval."""

    p20_us: float
    p50_us: float
    p80_us: float
    us_per_step: float
    wall_p50_us: float
    ci_low_us: float
    ci_high_us: float
    confidence: float
    samples: int
    calls_per_sample: int
    clock: str

    @staticmethod
    def of(samples: Samples, steps: int, clock: str) -> "Timing":
        """Summarise samples of calls that run through so many `steps`."""
        p20, _, _, p80 = statistics.quantiles(samples.device_us, n=5, method="inclusive")
        p50, wall = statistics.median(samples.device_us), statistics.median(samples.wall_us)
        low, high, confidence = median_interval(samples.device_us)
        counts = len(samples.device_us), samples.calls
        return Timing(p20, p50, p80, p50 / steps, wall, low, high, round(confidence, 4), *counts, clock)

    def __post_init__(self) -> None:
        times = self.p20_us, self.p50_us, self.p80_us, self.us_per_step, self.ci_low_us
        require({"p50_us or another time is 0": min(times) > 0, "confidence is over 1": self.confidence <= 1})


@dataclass(frozen=True)
class Floor:
    """The least microseconds per step by the roofs, its parts, and where they come from."""

    us_per_step: float
    exchange_us: float
    tensor_us: float
    memory_us: float
    roofs: str


@dataclass(frozen=True)
class Device:
    type: Literal["cuda", "cpu"]
    name: str
    driver: str | None = None
    threads: int | None = None
    cores: int | None = None
    capability: str | None = None
    multiprocessors: int | None = None
    memory_bytes: int | None = None
    l2_bytes: int | None = None


@dataclass(frozen=True)
class Versions:
    """Versions of the software that decides a result beside this package's code."""

    lstm_triton: str
    torch: str
    python: str
    triton: str | None = None
    cuda: str | None = None
    cudnn: int | None = None
    system: str | None = None


@dataclass(frozen=True)
class Source:
    """The version of this package: commit, whether files differed from it, digest of the code that computes."""

    commit: str | None
    dirty: bool | None
    digest: str

    def __str__(self) -> str:
        return (self.commit or "installed")[:12] + " with changes" * bool(self.dirty)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; raises ValueError where its parts contradict each other."""

    schema: Literal[2] = 2
    kind: Kind
    status: Literal["ok", "wrong", "failed", "skipped"]
    reason: str | None = None
    suite: str
    case: Case
    provider: str
    backend: str | None = None
    backend_reason: str | None = None
    algorithm: str | None = None
    execution: Execution
    precision: dict[str, str]
    timing: Timing | None = None
    values: dict[str, float] | None = None
    errors: dict[str, Errors] | None = None
    floor: Floor | None = None
    distance: float | None = None
    l2: Literal["warm", "flushed"] | None = None
    device: Device
    state: dict[str, float | str | None]
    versions: Versions
    source: Source
    date: str
    run: str
    command: str
    label: str | None = None
    synthetic: bool

    def __post_init__(self) -> None:
        datetime.datetime.fromisoformat(self.date)
        ok, timed, kinds = self.status == "ok", self.timing is not None, ("timing", "anchor", "overhead")
        rates = [value for name, value in (self.values or {}).items() if "_per_s" in name]
        rules = {
            f"status is {self.status!r} and reason is empty": ok or self.reason,
            f"status is {self.status!r} and there is a timing": ok or not timed,
            "a good row of kind 'timing' has a timing": timed or not ok or self.kind not in kinds,
            "a row from a CPU carries a label": self.device.type != "cpu" or self.label is not None,
            "a rate or a floor is 0": all(rates) and (self.floor is None or self.floor.us_per_step > 0),
        }
        require(rules)

    task = property(lambda self: Task(self.suite, self.case, self.kind))
    pair = property(lambda self: (self.provider, self.execution))

    def encode(self) -> str:
        """Return one line of JSON, without its newline."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def decode(line: bytes) -> Row:
    """Return the row of one line; raises ValueError where it is none, naming the field that is wrong."""
    try:
        value = json.loads(line.decode(), parse_constant=lambda name: float("nan"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, and no page takes it
        return storage.read(value, Row, "row")
    except RecursionError:
        raise ValueError("nested too deeply for a row") from None


def number(value: float | None) -> str:
    """Format a figure with three digits, for people, from a million on with a prefix; None is empty."""
    if value is None:
        return ""
    size, prefix = next((of for of in ((1e12, " T"), (1e9, " G"), (1e6, " M")) if value >= of[0]), (1, ""))
    return f"{value:,.0f}" if 1e3 <= value < 1e6 else f"{value / size:.3g}{prefix}"


def words(row: Row) -> str:
    """Say what was measured: of times the median and the 20th to the 80th percentile, of errors the largest."""
    if row.status != "ok":
        return f"{row.status.upper()}: {row.reason}"
    if t := row.timing:
        low, high = (number(us / row.case.length) for us in (t.p20_us, t.p80_us))
        return f"{number(t.us_per_step)} us/step ({low} to {high})"
    if row.values or not row.errors:
        return ", ".join(f"{name} {number(value)}" for name, value in (row.values or {}).items())
    largest, rms = (max((getattr(e, kind), name) for name, e in row.errors.items()) for kind in ("largest", "rms"))
    return f"max {largest[0]:.1e} ({largest[1]}), RMS {rms[0]:.1e} ({rms[1]})"


def summary(written: Sequence[Row]) -> str:
    """Return a task's rows in a few lines, for the terminal."""
    lines = (f"    {row.provider + ' graph' * (row.execution == 'graph'):<28} {words(row)}" for row in written)
    return "\n".join([f"{written[0].suite} · {written[0].case.describe()}", *lines])


def read_all(paths: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """The good rows of files and, recursively, of folders, and a sentence for each line that is none. Raises UsageError for a
    file that cannot be read, or whose lines are no rows at all."""
    rows, problems = list[Row](), list[str]()
    for file in (f for path in paths for f in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])):
        found, wrong = list[Row](), list[str]()
        try:
            lines = file.read_bytes().split(b"\n")
        except OSError as error:  # no such file, a folder of this name
            raise UsageError(f"{file}: {(error.strerror or str(error)).lower()}") from error
        for count, line in enumerate(lines, 1):
            try:
                found += [decode(line)] if line.strip() else []
            except ValueError as error:
                cut = "cut off: " if count == len(lines) else ""  # the last line has no newline
                wrong.append(f"{file}:{count}: {cut}{error}")
        if wrong and not found:
            raise UsageError(f"{file} holds no benchmark rows. First problem: {wrong[0]}")
        rows, problems = rows + found, problems + wrong
    return rows, problems


def append(path: Path, row: Row) -> None:
    """Add one row: a single write at the end of the file, on the disk before this returns. Two processes may append at once. A
    line that an earlier crash cut off is ended first, so that it spoils no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        size = file.seek(0, os.SEEK_END)
        is_cut = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
        data = b"\n" * bool(is_cut) + row.encode().encode() + b"\n"
        if (written := file.write(data)) != len(data):
            raise UsageError(f"{path}: the disk took {written} of {len(data)} bytes")
        os.fsync(file)


@contextlib.contextmanager
def one_run_at_a_time(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run, since two at once would time each other. Raises UsageError where another run holds it, or it
    cannot be written."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, handle := os.open(folder, os.O_RDONLY))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the folder itself: no file to commit by mistake
        except BlockingIOError:
            raise UsageError(f"another benchmark run is writing to {folder}: wait for it, or give --output") from None
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error
        yield
