"""A run: which tasks are still to do, in which order, until when; every row is on the disk as soon as it is there."""

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lstm_triton.process import Died

from . import choice, roofs, rows
from .cases import Case, Task
from .device import RowMaker
from .progress import Progress, duration
from .providers import CUDNN
from .rows import Row
from .worker import Options, Worker

ANCHOR_SECONDS = 60.0


@dataclass
class Outcome:
    """Counts of a run. left: tasks that the budget did not reach; problems: lines of earlier files that are not rows."""

    problems: list[str] = field(default_factory=list)
    left: int = 0
    rows: int = 0
    measured: int = 0
    before: int = 0

    def describe(self, options: Options) -> str:
        """The last words of a run."""
        text = f"{self.measured} tasks measured, {self.rows} rows appended to {options.folder}"
        text += f"; {self.before} were measured before" if self.before else ""
        if self.left and options.budget_s is not None:
            text += f"; {self.left} are left after {duration(options.budget_s)}: the same command continues"
        return "\n".join([text, *(f"not a row, left as it is: {problem}" for problem in self.problems)])


def anchor(device_type: str) -> Task:
    """A case that never changes, measured again and again: what moves in it is the machine."""
    gpu, cpu = (
        Case("anchor", 512, 16, 128, dtype="float16"),
        Case("anchor", 64, 4, 16, dtype="float32", precision="ieee"),
    )
    return Task("anchor", gpu if device_type == "cuda" else cpu, "anchor", providers=(CUDNN,))


def done_before(found: Sequence[Row], maker: RowMaker, retry: bool) -> set[tuple]:
    """Keys of rows that need not be measured again: of the same code, device and libraries, with the same settings."""

    def identity(of: Row | RowMaker) -> tuple:
        versions = of.versions.torch, of.versions.triton, of.versions.cudnn
        return of.source.digest, of.device.name, of.device.driver, of.device.threads, versions, of.synthetic

    def counts(row: Row) -> bool:
        same = identity(row) == identity(maker) and row.l2 in (None, maker.l2)  # null where the cache plays no part
        return same and row.kind != "anchor" and (not retry or row.status in ("ok", "wrong"))

    return {row.key for row in found if counts(row)}


@contextlib.contextmanager
def runner(options: Options, progress: Progress, new_worker: Any = Worker) -> Iterator["Runner"]:
    """A Runner that holds its folder, and ends its workers when it is left."""
    with rows.one_run_at_a_time(options.folder), contextlib.closing(progress):
        given = Runner(options, progress, new_worker)
        try:
            given.begin()
            yield given
        finally:
            for worker in given.workers.values():
                worker.end()


class Runner:
    """Runs tasks through workers, restarts these when they die, and appends every row."""

    def __init__(self, options: Options, progress: Progress, new_worker: Any) -> None:
        self.options, self.workers, self.outcome = options, dict[bool, Worker](), Outcome()
        self._progress, self._new_worker, self._run = progress, new_worker, uuid.uuid4().hex[:12]
        self._deadline = time.monotonic() + (float("inf") if options.budget_s is None else options.budget_s)
        self._took: dict[str, list[float]] = {"": [options.seconds]}  # seconds per row, by suite; "": of all
        self._last_anchor = float("-inf")

    def begin(self) -> None:
        self._rows, self.outcome.problems = rows.read_all([self.options.folder])
        self._maker = self._worker(False).maker
        self._done = set() if self.options.again else done_before(self._rows, self._maker, self.options.retry)

    def run(self, tasks: Sequence[Task]) -> Outcome:
        """Measure what has no rows yet, until the budget ends."""
        outcome = self.outcome
        outcome.left += len(tasks)
        with contextlib.suppress(TimeoutError):  # at the deadline
            for task in tasks:
                left = self._wanted(task) - {key[4:6] for key in self._done if key[:4] == task.key}
                if not left:
                    outcome.before, outcome.left = outcome.before + 1, outcome.left - 1
                    self._progress.total -= 1
                elif (
                    time.monotonic() + self.predict(task.suite, len(left)) < self._deadline
                ):  # a later one may be shorter
                    self._anchor(ANCHOR_SECONDS)
                    begin = time.monotonic()
                    self._measure(task, left)
                    for key in (task.suite, ""):
                        self._took.setdefault(key, []).append((time.monotonic() - begin) / len(left))
                    outcome.measured, outcome.left = outcome.measured + 1, outcome.left - 1
                    self._progress.done += 1
            if outcome.measured:
                self._anchor(0.0)
        return outcome

    def predict(self, suite: str, count: int) -> float:
        """Seconds of so many rows, rather too many: by the upper quartile of the last eight tasks of the suite, or of all.

        What does not fit into a budget is not begun, since what is cut off would be lost.
        """
        recent = sorted(self._took.get(suite, self._took[""])[-8:])
        return count * recent[3 * len(recent) // 4]

    def _anchor(self, least_s: float) -> None:
        if self.options.anchors and time.monotonic() - self._last_anchor > least_s:
            task = anchor(self._maker.device.type)
            self._measure(task, self._wanted(task))
            self._last_anchor = time.monotonic()

    def _wanted(self, task: Task) -> set[tuple[str, str]]:
        names = choice.names_of(task, self._maker.device.type, self.options.names)
        return {(n, e) for n in names for e in task.executions}

    def _worker(self, interpreter: bool) -> Worker:
        if interpreter not in self.workers:
            try:
                self.workers[interpreter] = self._new_worker(self.options, self._run, interpreter)
            except Died as death:
                where = f"the measuring process does not start on {self.options.device!r}"
                raise RuntimeError(f"{where}: {death}") from death
        return self.workers[interpreter]

    def _measure(self, task: Task, left: set[tuple[str, str]]) -> None:
        """Append a row for each provider and execution of `left`. Raises TimeoutError when the budget ends first."""
        written: list[Row] = []
        everyone, what = self._wanted(task), task.case.describe()
        roof = roofs.from_rows(self._rows, self._maker.device.name)

        def emit(row: Row) -> None:
            rows.append(self.options.folder / f"{row.suite}.jsonl", row)
            written.append(row)
            self._rows.append(row)
            self.outcome.rows += 1
            left.discard((row.provider, row.execution))

        left = set(left)
        while left:
            worker, doing, count = self._worker(task.interpreter), ("", "", "start"), len(written)
            try:
                for event in worker.run(task, everyone - left, roof, self._deadline):
                    if isinstance(event, Row):
                        emit(event)
                    else:
                        doing = event
                        self._progress.show(f"{what} · {doing[0]}: {doing[2]}")
                break
            except Died as death:
                del self.workers[task.interpreter]
                guilty = {pair for pair in left if pair[0] == doing[0]}
                if not guilty and not any(row.status == "failed" for row in written[count:]):
                    guilty = set(left)  # nobody is named, and the worker has named no one itself
                for pair in sorted(guilty):
                    emit(self._maker.make(task, *pair, "failed", f"{death} (while: {doing[2]} of {doing[0]})"))
        if written and task.kind != "anchor":
            self._progress.say(summary(task, written))


def summary(task: Task, written: Sequence[Row]) -> str:
    """A task's rows in a few lines, for the terminal; of times the median, and the 20th to the 80th percentile."""
    lines = [f"{task.suite} · {task.case.describe()}"]
    for row in written:
        if t := row.timing:
            low, high = (rows.number(us / task.case.length) for us in (t.p20_us, t.p80_us))
            text = f"{rows.number(t.us_per_step)} us/step ({low} to {high})"
        elif row.status != "ok":
            text = f"{row.status.upper()}: {row.reason}"
        elif row.bytes:
            text = f"{row.bytes['saved'] / 2**20:.1f} MiB saved"
        elif row.errors:
            text = f"max error {max(e.max for e in row.errors.values()):.1e}"
        else:
            text = ", ".join(f"{name} {rows.number(value)}" for name, value in (row.values or {}).items())
        lines.append(f"    {row.provider + ' graph' * (row.execution == 'graph'):<28} {text}")
    return "\n".join(lines)
