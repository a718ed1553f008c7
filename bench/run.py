"""A run: which tasks are still to do, in which order, until when; every row is on the disk as soon as it is there."""

import contextlib
import itertools
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import choice, roofs, rows
from .cases import Case, Task
from .device import RowMaker
from .process import Died
from .progress import Progress, duration
from .providers import CUDNN
from .rows import Row
from .worker import Options, Worker

ANCHOR_SECONDS = 60.0
Pairs = set[tuple[str, str]]  # of provider and execution


@dataclass
class Outcome:
    """What a run did. left: tasks that the budget did not reach; problems: lines of earlier files that are not rows."""

    problems: list[str]
    left: int
    rows: int = 0
    measured: int = 0
    before: int = 0

    def describe(self, folder: Path, budget_s: float | None) -> str:
        """The last words of a run."""
        text = f"{self.measured} tasks measured, {self.rows} rows appended to {folder}"
        text += f"; {self.before} were measured before" if self.before else ""
        if self.left and budget_s is not None:
            text += f"; {self.left} are left after {duration(budget_s)}: the same command continues"
        return "\n".join([text, *(f"not a row, left as it is: {problem}" for problem in self.problems)])


class Pace:
    """How long tasks took, and so how long the next one will: what does not fit into a budget is not begun."""

    def __init__(self, first: float) -> None:
        """first: seconds per row that are expected of the first task."""
        self._first = first
        self._seconds: dict[str, list[float]] = {}  # per row, by suite

    def took(self, suite: str, rows: int, seconds: float) -> None:
        for key in (suite, ""):
            self._seconds.setdefault(key, []).append(seconds / max(rows, 1))

    def predict(self, suite: str, rows: int) -> float:
        """Seconds, rather too many: the upper quartile of the last eight tasks of the suite, or of all."""
        recent = sorted(self._seconds.get(suite, self._seconds.get("", [self._first]))[-8:])
        return rows * recent[3 * len(recent) // 4]


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


class Runner:
    """Runs tasks through workers, restarts these when they die, and appends every row."""

    def __init__(self, options: Options, tasks: Sequence[Task], progress: Progress, new_worker: Any = Worker) -> None:
        self._options, self._tasks, self._progress, self._new_worker = options, list(tasks), progress, new_worker
        self._deadline = time.monotonic() + (float("inf") if options.budget_s is None else options.budget_s)
        self._workers: dict[bool, Worker] = {}
        self._run = uuid.uuid4().hex[:12]
        self._rows: list[Row] = []
        self._pace, self._startup_s = Pace(options.seconds), 0.0
        self.outcome = Outcome([], len(tasks))

    def run(self) -> Outcome:
        for _ in self.steps():
            pass
        return self.outcome

    def steps(self) -> Generator[None, None, None]:
        """Run, with a pause after every task; `outcome` is there at the end."""
        with rows.one_run_at_a_time(self._options.folder), contextlib.ExitStack() as at_the_end:
            at_the_end.callback(self._end_workers)
            at_the_end.callback(self._progress.close)
            at_the_end.enter_context(contextlib.suppress(TimeoutError))  # at the deadline
            self._rows, self.outcome.problems = rows.read_all([self._options.folder])
            self._maker = self._worker(False).maker
            yield from self._steps()

    def _end_workers(self) -> None:
        for worker in self._workers.values():
            worker.end()

    def _steps(self) -> Iterator[None]:
        outcome, options, last_anchor = self.outcome, self._options, float("-inf")
        done = set() if options.again else done_before(self._rows, self._maker, options.retry)
        anchored = anchor(self._maker.device.type)
        for task in self._tasks:
            wanted = self._wanted(task)
            skip = wanted & {key[4:6] for key in done if key[:4] == task.key}
            if skip == wanted:
                outcome.before, outcome.left = outcome.before + 1, outcome.left - 1
                self._progress.total -= 1
            elif self._fits(task, len(wanted - skip)):  # a later one may be shorter
                if options.anchors and time.monotonic() - last_anchor > ANCHOR_SECONDS:
                    self._measure(anchored, set())
                    last_anchor = time.monotonic()
                begin = time.monotonic()
                self._measure(task, skip)
                self._pace.took(task.suite, len(wanted - skip), time.monotonic() - begin)
                outcome.measured, outcome.left = outcome.measured + 1, outcome.left - 1
                self._progress.done += 1
                yield
        if options.anchors and outcome.measured and self._fits(anchored, 1):
            self._measure(anchored, set())

    def _fits(self, task: Task, count: int) -> bool:
        """Whether so many rows of a task will be there before the budget ends: what is cut off would be lost."""
        start = 0.0 if task.interpreter in self._workers else self._startup_s
        return time.monotonic() + start + self._pace.predict(task.suite, count) < self._deadline

    def _wanted(self, task: Task) -> Pairs:
        names = choice.names_of(task, self._maker.device.type, self._options.names)
        return {(n, e) for n in names for e in task.executions}

    def _worker(self, interpreter: bool) -> Worker:
        if interpreter not in self._workers:
            begin = time.monotonic()
            try:
                self._workers[interpreter] = self._new_worker(self._options, self._run, interpreter)
            except Died as death:
                raise RuntimeError(
                    f"the measuring process does not start on {self._options.device!r}: {death}"
                ) from death
            self._startup_s = time.monotonic() - begin
        return self._workers[interpreter]

    def _measure(self, task: Task, skip: Pairs) -> None:
        """Raises TimeoutError when the budget ends first."""
        written: list[Row] = []
        everyone, what = self._wanted(task), task.case.describe()
        roof = roofs.from_rows(self._rows, self._maker.device.name)

        def emit(row: Row) -> None:
            rows.append(self._options.folder / f"{row.suite}.jsonl", row)
            written.append(row)
            self._rows.append(row)
            self.outcome.rows += 1

        def show(stage: str) -> None:
            self._progress.show(f"{what} · {stage}")

        groups = [everyone - skip]  # measured together, each of them
        while groups:
            group, count = groups.pop(0), len(written)
            worker = self._worker(task.interpreter)
            try:
                worker.run(task, everyone - group, roof, self._deadline, emit, show)
            except Died as death:
                del self._workers[task.interpreter]
                group -= {(row.provider, row.execution) for row in written[count:]}
                guilty, again = blame(group, worker.doing, any(row.status == "failed" for row in written[count:]))
                for pair in sorted(guilty):
                    reason = f"{death} (while: {worker.doing[2]} of {worker.doing[0]})"
                    emit(self._maker.make(task, *pair, "failed", reason))
                groups += again
        if written and task.kind != "anchor":
            self._progress.say(summary(task, written))


def blame(group: Pairs, doing: tuple[str, str, str], named: bool) -> tuple[Pairs, list[Pairs]]:
    """Whose failure a worker's death is, of those without a row, and the groups to go on with.

    Where several were being timed, each is tried once more by itself. named: the worker has named the culprit itself.
    """
    guilty = {(n, e) for n, e in group if n == doing[0]}
    names = {n for n, _ in group}
    if not guilty and not named and doing[2] == "timing" and len(names) > 1:
        return set(), [{pair for pair in group if pair[0] == name} for name in sorted(names)]
    if not guilty and not named:
        guilty = group
    return guilty, [group - guilty] if group - guilty else []


def run_in_turns(options: Sequence[Options], tasks: Sequence[Task], progress: Progress) -> list[Outcome]:
    """Several runs of the same tasks, task by task in turns, so that a drift of the machine touches all alike."""
    runners = [Runner(o, tasks, progress) for o in options]
    with contextlib.ExitStack() as stack:
        turns = [stack.enter_context(contextlib.closing(runner.steps())) for runner in runners]
        for _ in itertools.zip_longest(*turns):
            pass
    return [runner.outcome for runner in runners]


def summary(task: Task, written: Sequence[Row]) -> str:
    """A task's rows in a few lines, for the terminal."""
    lines = [f"{task.suite} · {task.case.describe()}"]
    for row in written:
        if t := row.timing:
            text = f"{t.us_per_step:.3g} us/step (p20 {t.p20_us:.4g}, p80 {t.p80_us:.4g} us a call)"
        elif row.status != "ok":
            text = f"{row.status.upper()}: {row.reason}"
        elif row.bytes:
            text = f"{row.bytes['saved'] / 2**20:.1f} MiB saved"
        elif row.errors:
            text = f"max error {max(e.max for e in row.errors.values()):.1e}"
        else:
            text = ", ".join(f"{name} {value:.3g}" for name, value in (row.values or {}).items())
        lines.append(f"    {row.provider}{' graph' if row.execution == 'graph' else ''} {text}")
    return "\n".join(lines)
