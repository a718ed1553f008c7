"""A run: which tasks are still to do, in which order, until when; every row is on the disk as soon as it is there.
A kernel that hangs or corrupts the device takes its process along. So the tasks run in a process of their own, which tells what
it is about to do; when it falls silent or dies, the run knows whom to blame, and goes on with a new one.
"""

import contextlib
import importlib.util
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from lstm_triton import timing
from lstm_triton.process import Died, Process, answer

from . import measure, providers, roofs, rows
from .cases import ANCHORS, Pair, Task
from .device import RowMaker
from .rows import Row

ANCHOR_SECONDS = 60.0
# What serves output alone, and what is not shown without it.
EXTRAS = dict(pandas="tables", matplotlib="figures", jinja2="report", rich="progress line", pynvml="GPU clocks")


def missing(*names: str) -> str | None:
    """Return a sentence about those of EXTRAS (by default of all) that are not installed, or None."""
    absent = [name for name in names or EXTRAS if importlib.util.find_spec(name) is None]
    without = ", ".join(f"no {EXTRAS[name]} without {name}" for name in absent)
    return f"{without}: pip install 'lstm-triton[bench]'" if absent else None


class Progress:
    """Counts what is `done` of `total`, on a line of the terminal with the time that is left at this pace."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self._bar = total, 0.0, None
        if sys.stderr.isatty() and missing("rich") is None:
            from rich import console, progress

            columns = "{task.percentage:3.0f} %", progress.TimeRemainingColumn(), "left · {task.description}"
            self._bar = progress.Progress(*columns, console=console.Console(file=sys.stderr), transient=True)
            self._line = self._bar.add_task("", total=total)
            self._bar.start()

    def show(self, what: str) -> None:
        """Show that `what` is under way."""
        if self._bar is not None:
            self._bar.update(self._line, completed=self.done, total=self.total, description=what)

    def say(self, text: str) -> None:
        """Print a line that stays, on standard output."""
        self.close()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Worker(Process):
    """A process that measures, asked with a task, what of it, and roofs. maker: makes rows as it does. Its events are rows,
    and before whatever may take the process along, whose turn it is: provider, execution, what is done."""

    def __init__(self, options: Namespace, run: str) -> None:
        super().__init__(f"{__name__}:serve", (options, run), {"TRITON_INTERPRET": None})
        self.maker: RowMaker = self.receive(300.0)  # when it has imported everything


def serve(connection: Any, setup: tuple[Namespace, str]) -> None:
    """Measure what is asked for, in the worker's process."""
    context = make_context(*setup, lambda *doing: connection.send(doing))

    def respond(request: tuple[Task, Sequence[Pair], Mapping[str, float]]) -> None:
        task, pairs, context.roofs = request
        measure.measure(task, context, connection.send, pairs)

    connection.send(context.maker)
    answer(connection, respond)


def make_context(options: Namespace, run: str, stage: Callable[[str, str, str], None]) -> measure.Context:
    """Make what the tasks of a run share, on the device that the options name."""
    device = torch.device(options.device)
    torch.cuda.set_device(device if device.index is not None and device.type == "cuda" else -1)  # -1 changes nothing
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = timing.Clock(device, options.flush_l2)
    return measure.Context(RowMaker(device, options.command, run, clock.l2), clock, options.seconds, {}, stage)


def done_before(found: Sequence[Row], maker: RowMaker, retry: bool) -> set[tuple[Task, Pair]]:
    """Return what need not be measured again: it has rows of the same code, device, software and settings."""

    def counts(row: Row) -> bool:
        one, other = ((of.source.digest, of.device, of.versions) for of in (row, maker))
        same = one == other and row.l2 in (None, maker.l2)  # null where the cache plays no part
        return same and row.kind != "anchor" and not row.synthetic and (not retry or row.status in ("ok", "wrong"))

    return {(row.task, row.pair) for row in found if counts(row)}


class Runner:
    """Runs tasks through a worker, restarts it when it dies, and appends every row. options: of the command line. Counts tasks
    measured, those that were measured before and those that the budget left, and rows appended."""

    def __init__(self, options: Namespace, progress: Progress, new_worker: Any) -> None:
        self.options, self._worker = options, cast(Any, None)
        self.measured = self.before = self.left = self.appended = 0
        self._progress, self._new_worker, self._run = progress, new_worker, uuid.uuid4().hex[:12]
        self._deadline = time.monotonic() + (options.budget or float("inf"))
        self._took: dict[str, list[float]] = {"": [options.seconds]}  # seconds per row, by suite; "": of all
        self._last_anchor = float("-inf")

    def run(self, tasks: Sequence[Task]) -> None:
        """Measure what has no rows yet, until the budget ends."""
        with contextlib.ExitStack() as at_the_end:
            at_the_end.enter_context(rows.one_run_at_a_time(self.options.output))
            at_the_end.enter_context(contextlib.closing(self._progress))
            at_the_end.callback(lambda: self._worker and self._worker.end())
            at_the_end.enter_context(contextlib.suppress(TimeoutError))  # at the deadline
            self._rows, self._problems = rows.read_all([self.options.output])
            self._maker = self._started().maker
            done = set() if self.options.again else done_before(self._rows, self._maker, self.options.retry)
            self.left = len(tasks)
            for task in tasks:
                pairs = providers.pairs_of(task, self._maker.device.type, self.options.provider)
                missing = [pair for pair in pairs if (task, pair) not in done]
                if (count := len(missing)) == 0:
                    self.before, self.left = self.before + 1, self.left - 1
                    self._progress.total -= 1
                elif time.monotonic() + self.predict(task.suite, count) < self._deadline:  # a later one may be shorter
                    self._anchor(ANCHOR_SECONDS)
                    begin = time.monotonic()
                    self._measure(task, missing)
                    for key in (task.suite, ""):
                        self._took.setdefault(key, []).append((time.monotonic() - begin) / count)
                    self.measured, self.left = self.measured + 1, self.left - 1
                    self._progress.done += 1
            if self.measured:
                self._anchor(0.0)

    def describe(self) -> str:
        """Return the last words of a run."""
        text = f"{self.measured} tasks measured, {self.appended} rows appended to {self.options.output}"
        text += f"; {self.before} were measured before" if self.before else ""
        if self.left and self.options.budget is not None:
            text += f"; {self.left} are left after {self.options.budget:.0f} s: the same command continues"
        return "\n".join([text, *(f"not a row, left as it is: {problem}" for problem in self._problems)])

    def predict(self, suite: str, count: int) -> float:
        """Predict the seconds of so many rows by the upper quartile of the suite's last eight tasks, or of all suites'.
        What does not fit into a budget is not begun, since what is cut off would be lost."""
        recent = sorted(self._took.get(suite, self._took[""])[-8:])
        return count * recent[3 * len(recent) // 4]

    def _anchor(self, least_s: float) -> None:
        if self.options.anchors and time.monotonic() - self._last_anchor > least_s:
            kind = self._maker.device.type
            self._measure(ANCHORS[kind], providers.pairs_of(ANCHORS[kind], kind))
            self._last_anchor = time.monotonic()

    def _started(self) -> Any:
        if self._worker is None:
            try:
                self._worker = self._new_worker(self.options, self._run)
            except Died as death:
                raise RuntimeError(f"measuring does not start on {self.options.device!r}: {death}") from death
        return self._worker

    def _measure(self, task: Task, left: list[Pair]) -> None:
        """Append a row for each provider and execution of `left`. Raises TimeoutError when the budget ends first."""
        written, figures = list[Row](), roofs.from_rows(self._rows, self._maker.device.name)

        def emit(row: Row) -> None:
            rows.append(self.options.output / f"{row.suite}.jsonl", row)
            written.append(row)
            self._rows.append(row)
            self.appended += 1
            left.remove(row.pair)

        while left:
            doing, count = ("", "", "start"), len(written)
            try:
                for event in self._started().ask((task, list(left), figures), self.options.timeout, self._deadline):
                    if isinstance(event, Row):
                        emit(event)
                    else:
                        doing = event
                        self._progress.show(f"{task.case.describe()} · {doing[0]}: {doing[2]}")
                break
            except Died as death:
                self._worker = None
                guilty = [pair for pair in left if pair[0] == doing[0]]
                if not guilty and not any(row.status == "failed" for row in written[count:]):
                    guilty = list(left)  # nobody is named, and the worker has named no one itself
                for pair in guilty:
                    emit(self._maker.make(task, *pair, "failed", f"{death} (while: {doing[2]} of {doing[0]})"))
        if written and task.kind != "anchor":
            self._progress.say(rows.summary(written))
