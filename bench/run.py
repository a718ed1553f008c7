"""A run: which tasks are still to do, in which order, until when; every row is on the disk as soon as it is there."""

import datetime
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import cases, floor, providers, rows, schema, store
from .cases import Case, Task
from .measure import names_of
from .progress import Pace, Progress, duration
from .worker import Setup, Worker, WorkerDied

ANCHOR_SECONDS = 60.0


@dataclass
class Options:
    """Of a run. budget_s: stop by then; seconds: of sampling for each provider; silence_s: after which a worker is given up."""

    folder: Path
    device: str
    command: str
    budget_s: float | None = None
    seconds: float = 1.0
    silence_s: float = 180.0
    flush_l2: bool = False
    names: tuple[str, ...] | None = None
    threads: int | None = None
    again: bool = False
    retry: bool = False
    path: Sequence[str] | None = None  # of the workers' imports
    environment: dict[str, str] = field(default_factory=dict)
    anchors: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a run did. left: tasks that the budget did not reach; problems: lines of earlier files that are not rows."""

    rows: int
    measured: int
    before: int
    left: int
    problems: list[str]


def anchor(device_type: str) -> Task:
    """A case that never changes, measured again and again: what moves in it is the machine."""
    if device_type == "cuda":
        case = Case("anchor", 512, 16, 128, dtype="float16")
    else:
        case = Case("anchor", 64, 4, 16, dtype="float32", precision="ieee")
    return Task("anchor", case, "anchor", providers=(providers.CUDNN,))


def done_before(found: Sequence[dict[str, Any]], like: dict[str, Any], retry: bool) -> set[tuple]:
    """Keys of rows that need not be measured again: of the same code, device and libraries, with the same settings."""

    def identity(row: dict[str, Any]) -> tuple:
        versions = tuple(row["versions"].get(name) for name in ("torch", "triton", "cudnn"))
        device = tuple(row["device"].get(name) for name in ("name", "driver", "threads"))
        return row["source"]["digest"], device, versions, row["synthetic"]

    wanted = identity(like)
    return {
        cases.row_key(row)
        for row in found
        if identity(row) == wanted
        and row["l2"] in (None, like["l2"])  # null where the cache plays no part
        and row["kind"] != "anchor"
        and (not retry or row["status"] in ("ok", "wrong"))
    }


class Runner:
    """Runs tasks through workers, restarts these when they die, and appends every row."""

    def __init__(
        self,
        options: Options,
        tasks: Sequence[Task],
        progress: Progress,
        say: Callable[[str], None],
        new_worker: Callable[..., Any] = Worker,
    ) -> None:
        self._new_worker = new_worker
        self._options, self._tasks, self._progress, self._say = options, list(tasks), progress, say
        self._workers: dict[bool, Worker] = {}
        self._run = uuid.uuid4().hex[:12]
        self._deadline = None if options.budget_s is None else time.monotonic() + options.budget_s
        self._rows: list[dict[str, Any]] = []
        self._found = store.Rows([], [])
        self._template: dict[str, Any] = {}
        self._pace = Pace(options.seconds)
        self._startup_s = 0.0
        self._before = self._measured = 0

    @property
    def outcome(self) -> Outcome:
        left = len(self._tasks) - self._before - self._measured
        return Outcome(len(self._rows), self._measured, self._before, left, self._found.problems)

    def run(self) -> Outcome:
        for _ in self.steps():
            pass
        return self.outcome

    def steps(self) -> Generator[None, None, None]:
        """Run, with a pause after every task; `outcome` is there at the end."""
        with store.one_run_at_a_time(self._options.folder):
            try:
                yield from self._steps()
            finally:
                for worker in self._workers.values():
                    worker.end(0.5 if self._deadline is None else 0.0)

    def _steps(self) -> Generator[None, None, None]:
        self._found = store.read_all([self._options.folder])
        self._template = self._make_template()
        done = set() if self._options.again else done_before(self._found.rows, self._template, self._options.retry)
        last_anchor: float | None = None
        for task in self._tasks:
            wanted = self._wanted(task)
            skip = wanted & {key[4:6] for key in done if key[:4] == self._key(task)}
            if skip == wanted:
                self._before += 1
                self._progress.total -= 1
                continue
            if not self._fits(task, len(wanted - skip)):
                continue  # a later one may be shorter
            if self._options.anchors and (last_anchor is None or time.monotonic() - last_anchor > ANCHOR_SECONDS):
                if not self._measure(anchor(self._template["device"]["type"]), set()):
                    return
                last_anchor = time.monotonic()
            begin = time.monotonic()
            if not self._measure(task, skip):
                return
            self._pace.took(task.suite, len(wanted - skip), time.monotonic() - begin)
            self._measured += 1
            self._progress.task_done()
            yield
        if self._options.anchors and self._measured and self._fits(anchor("cpu"), 1):
            self._measure(anchor(self._template["device"]["type"]), set())

    def _fits(self, task: Task, rows: int) -> bool:
        """Whether so many rows of a task will be there before the budget ends: what is cut off would be lost."""
        if self._deadline is None:
            return True
        start = 0.0 if task.interpreter in self._workers else self._startup_s
        return time.monotonic() + start + self._pace.predict(task.suite, rows) < self._deadline

    def _make_template(self) -> dict[str, Any]:
        """A row as this run's workers make them, to compare earlier rows with and to write of workers that died."""
        worker = self._worker(False)
        maker = rows.RowMaker(torch.device("cpu"), self._options.command, self._run)
        template = maker.make(anchor("cpu"), "none", "eager", "skipped", "never written") | worker.about
        l2 = "flushed" if self._options.flush_l2 else "warm"
        return template | {"l2": l2 if template["device"]["type"] == "cuda" else None}

    def _wanted(self, task: Task) -> set[tuple[str, str]]:
        """The (provider, execution) pairs of a task."""
        names = names_of(task, self._template["device"]["type"], self._options.names)
        return {(n, e) for n in names for e in task.executions}

    @staticmethod
    def _key(task: Task) -> tuple:
        return cases.task_key(task.kind, task.suite, task.case.to_json())

    def _worker(self, interpreter: bool) -> Worker:
        if interpreter not in self._workers:
            o = self._options
            setup = Setup(o.device, o.command, self._run, o.flush_l2, o.names, o.threads)
            worker = self._new_worker(setup, interpreter=interpreter, path=o.path, environment=o.environment)
            self._workers[interpreter] = worker
            begin = time.monotonic()
            try:
                worker.ready()
                self._startup_s = time.monotonic() - begin
            except WorkerDied as error:
                del self._workers[interpreter]
                raise RuntimeError(f"the measuring process does not start on {o.device!r}: {error}") from error
        return self._workers[interpreter]

    def _measure(self, task: Task, skip: set[tuple[str, str]]) -> bool:
        """False when the budget ended first."""
        written: list[dict[str, Any]] = []
        everyone = self._wanted(task)
        groups = [everyone - skip]  # measured together, each of them
        while groups:
            group = groups.pop(0)
            count = len(written)
            try:
                self._progress.stage(task.case.describe())
                finished = self._worker(task.interpreter).run(
                    task, everyone - group, floor.from_rows([*self._found.rows, *self._rows], self._template["device"]["name"]),
                    0.3 if task.kind == "anchor" else self._options.seconds,
                    lambda row: written.append(self._write(row)),
                    lambda what: self._progress.stage(f"{task.case.describe()} · {what}"),
                    silence_s=self._options.silence_s, deadline=self._deadline,
                )  # fmt: skip
            except WorkerDied as death:
                self._workers.pop(task.interpreter, None)
                group -= {(row["provider"], row["execution"]) for row in written[count:]}
                failed = any(row["status"] == "failed" for row in written[count:])
                groups += self._blame(task, group, death, failed, written)
                continue
            if not finished:
                self._workers.pop(task.interpreter, None)
                return False
        self._say_task(task, written)
        return True

    def _blame(
        self, task: Task, group: set[tuple[str, str]], death: WorkerDied, failed: bool, written: list[dict[str, Any]]
    ) -> list[set[tuple[str, str]]]:
        """Write the death down to who was at work; returns the groups to go on with.

        Where several were being timed, each is tried once more by itself. failed: the worker has named the culprit itself.
        """
        guilty = {(n, e) for n, e in group if n == death.provider}
        names = {n for n, _ in group}
        if not guilty and failed:  # it has its row already
            return [group] if group else []
        if not guilty and len(names) > 1 and death.stage == "timing":
            return [{pair for pair in group if pair[0] == name} for name in sorted(names)]
        guilty = guilty or group
        for provider, execution in sorted(guilty):
            reason = f"{death} (while: {death.stage} of {death.provider})"
            written.append(self._write(self._failure(task, provider, execution, reason)))
        return [group - guilty] if group - guilty else []

    def _failure(self, task: Task, provider: str, execution: str, reason: str) -> dict[str, Any]:
        label = schema.CPU_LABEL if self._template["device"]["type"] == "cpu" else None
        return self._template | {
            "kind": task.kind, "status": "failed", "reason": reason, "suite": task.suite, "case": task.case.to_json(),
            "provider": provider, "execution": execution, "state": {}, "label": label,
            "l2": self._template["l2"] if task.kind in ("timing", "anchor") else None,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip

    def _write(self, row: dict[str, Any]) -> dict[str, Any]:
        store.append(self._options.folder / f"{row['suite']}.jsonl", row)
        self._rows.append(row)
        return row

    def _say_task(self, task: Task, written: Sequence[dict[str, Any]]) -> None:
        if written and task.kind != "anchor":
            self._say(summary_line(task, written))


def run_in_turns(options: Sequence[Options], tasks: Sequence[Task], progress: Progress) -> list[Outcome]:
    """Several runs of the same tasks, task by task in turns, so that a drift of the machine touches all alike."""
    runners = [Runner(o, tasks, progress, progress.say) for o in options]
    waiting = [runner.steps() for runner in runners]
    try:
        while waiting:
            waiting = [steps for steps in waiting if next(steps, waiting) is not waiting]
    finally:
        for steps in waiting:
            steps.close()
    return [runner.outcome for runner in runners]


def summary_line(task: Task, written: Sequence[dict[str, Any]]) -> str:
    """A task's rows in one line, for the terminal."""
    parts = []
    for row in written:
        name = row["provider"] + (" graph" if row["execution"] == "graph" else "")
        if row["timing"]:
            t = row["timing"]
            parts.append(
                f"{name} {t['us_per_step']:.3g} us/step (p20 {t['p20_us']:.4g}, p80 {t['p80_us']:.4g} us a call)"
            )
        elif row["status"] == "ok" and row["bytes"]:
            parts.append(f"{name} {row['bytes']['saved'] / 2**20:.1f} MiB saved")
        elif row["status"] == "ok" and row["errors"]:
            parts.append(f"{name} max error {max(e['max'] for e in row['errors'].values() if e['max'] != 'inf'):.1e}")
        elif row["status"] == "ok" and row["values"]:
            parts.append(f"{name} " + ", ".join(f"{k} {v:.3g}" for k, v in row["values"].items()))
        else:
            parts.append(f"{name} {row['status'].upper()}: {row['reason']}")
    return f"{task.suite} · {task.case.describe()}\n    " + "\n    ".join(parts)


def finish(outcome: Outcome, folder: Path, budget_s: float | None) -> str:
    """The last words of a run."""
    text = f"{outcome.measured} tasks measured, {outcome.rows} rows appended to {folder}"
    if outcome.before:
        text += f"; {outcome.before} were measured before"
    if outcome.left and budget_s is not None:
        text += f"; {outcome.left} are left after {duration(budget_s)}: the same command continues"
    for problem in outcome.problems:
        text += f"\nnot a row, left as it is: {problem}"
    return text
