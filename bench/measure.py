"""Measuring one task: build every provider, compare it with float64, then time those that are right, interleaved."""

import contextlib
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import accuracy, choice, host, timing
from . import problem as problems
from . import roofs as roof
from .built import Built
from .cases import Task
from .device import RowMaker
from .lost import why_lost
from .precision import precision
from .problem import Problem
from .providers import CUDNN, TORCH_CELL, Provider, Unavailable
from .rows import Error, Row


@dataclass
class Context:
    """What all tasks of a run share.

    seconds: of sampling, for each provider. names: the providers asked for, None for each task's own choice. stage: receives
    provider, execution and what is done next, so that what hangs or crashes can be named.
    """

    device: torch.device
    maker: RowMaker
    clock: timing.Clock
    seconds: float = 1.0
    names: tuple[str, ...] | None = None
    roofs: roof.Roofs | None = None
    stage: Callable[[str, str, str], None] = lambda provider, execution, what: None


class Fatal(RuntimeError):
    """The process can measure no more: the device reports an error that stays."""


class Judge:
    """Compares results with the truth, and knows torch's own errors on the problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.torchs: dict[str, Error] | None = None
        self._truth: dict[bool, Mapping[str, Tensor]] = {True: problems.truth(problem)}

    def ask(self, torchs: Provider) -> None:
        try:
            self.torchs = self.errors(Built(torchs, self.problem, states=True))
        except Exception as error:  # it gets a row of its own where it was asked for
            reraise_fatal(error)

    def errors(self, built: Built, call: Callable[[], Any] | None = None) -> dict[str, Error]:
        with_state = built.model.takes_initial_state
        if with_state not in self._truth:
            self._truth[with_state] = problems.truth(built.problem)
        return accuracy.errors(built.results(call), self._truth[with_state])

    def why_wrong(self, found: Mapping[str, Error]) -> str | None:
        return accuracy.why_wrong(self.problem.case, found, self.torchs)


def measure(task: Task, context: Context, emit: Callable[[Row], None], skip: Collection[tuple[str, str]] = ()) -> None:
    """Emit one row for every provider and execution of the task that is not in `skip`.

    Raises Fatal, after its row, when the device is lost.
    """
    names = choice.names_of(task, context.device.type, context.names)
    wanted: list[tuple[str, str]] = [(n, e) for n in names for e in task.executions if (n, e) not in skip]
    if wanted:
        with precision(task.case):
            _Measurement(task, context, emit).run(wanted)


class _Measurement:
    """Of one task: what is ready to be timed, and the rows of all else."""

    def __init__(self, task: Task, context: Context, emit: Callable[[Row], None]) -> None:
        self.task, self.context, self._emit = task, context, emit
        self.ready: dict[tuple[str, str], tuple[Built, dict[str, Error], Callable[[], Any]]] = {}

    def run(self, wanted: list[tuple[str, str]]) -> None:
        judge = None
        if self.task.kind in ("timing", "anchor", "accuracy", "memory"):
            self.context.stage("float64", "eager", "truth")
            try:
                judge = Judge(problems.make(self.task.case, self.context.device))
            except Exception as error:
                reraise_fatal(error)
                self.tell(wanted, "failed", f"no float64 truth to compare with: {brief(error)}")
                return
            torchs = CUDNN if self.task.case.form == "layer" else TORCH_CELL
            self.context.stage(torchs, "eager", "check")
            judge.ask(choice.provider(torchs))
        for name in dict.fromkeys(n for n, _ in wanted):
            mine = [(n, e) for n, e in wanted if n == name]
            try:
                if judge is None:
                    self._alone(mine)
                else:
                    self._check(mine, judge)
            except Unavailable as error:
                self.tell(mine, "skipped", str(error))
            except Fatal:
                raise
            except Exception as error:
                # A forced backend of this package says at its first call what it cannot do: that is no failure.
                self.tell(mine, "skipped" if "cannot serve: " in str(error) else "failed", brief(error))
                reraise_fatal(error)
            finally:
                _free(self.context.device)
        del judge
        while self.ready:
            self._time()

    def tell(self, which: list[tuple[str, str]], status: str, reason: str | None = None, **measured: Any) -> None:
        for name, execution in which:
            self._emit(self.context.maker.make(self.task, name, execution, status, reason, **measured))

    def _alone(self, which: list[tuple[str, str]]) -> None:
        """Roofs, host times and first calls, which are compared with no truth."""
        name, context = which[0][0], self.context
        if self.task.kind == "roof":
            values, failures = roof.measured(context.device, lambda what: context.stage(name, "eager", what))
            if "copy_bytes_per_s" not in values:
                raise failures[0][1]
            self.tell(which, "ok", "; ".join(f"{what}: {brief(e)}" for what, e in failures) or None, values=values)
            for _, error in failures:  # after the row, since the device may be lost
                reraise_fatal(error)
        elif self.task.kind == "overhead":
            context.stage(name, "eager", "host time")
            calls = host.CALLS if context.seconds >= 0.3 else host.CALLS // 10
            with host.conditions(name, context.device) as label:
                built = Built(choice.provider(name), problems.make(self.task.case, context.device))
                values = host.overhead(built, name, context.device, calls)
            self.tell(which, "ok", model=built.model, values=values, label=label)
        else:
            context.stage(name, "eager", "cold start")
            values, label = host.cold_start(self.task.case, name, context.device)
            self.tell(which, "ok", values=values, label=label)

    def _check(self, which: list[tuple[str, str]], judge: Judge) -> None:
        name, stage = which[0][0], self.context.stage
        stage(*which[0], "build")
        built = Built(choice.provider(name), judge.problem, states=self.task.kind == "accuracy")
        stage(*which[0], "check")
        found = judge.errors(built)
        if reason := judge.why_wrong(found):
            self.tell(which, "wrong", reason, model=built.model, errors=found)
        elif self.task.kind == "accuracy":
            self.tell(which, "ok", model=built.model, errors=found)
        elif self.task.kind == "memory":
            stage(*which[0], "memory")
            self.tell(which, "ok", model=built.model, errors=found, bytes=host.held(built))
        else:
            for key in which:
                try:
                    if key[1] == "graph":
                        stage(*key, "capture")
                    self.ready[key] = built, found, _graph(built, judge) if key[1] == "graph" else built.call
                except Exception as error:
                    self.tell([key], "failed", f"CUDA graph: {brief(error)}", model=built.model)
                    reraise_fatal(error)

    def _time(self) -> None:
        """Time all at once; a provider that fails gets its row and is left out, and the others start again."""
        context, case = self.context, self.task.case
        context.stage(" and ".join(dict.fromkeys(n for n, _ in self.ready)), "eager", "timing")
        try:
            with torch.set_grad_enabled(case.mode == "train"):
                calls = {key: call for key, (_, _, call) in self.ready.items()}
                samples = timing.interleaved(calls, context.clock, context.seconds)
        except timing.Failed as failure:
            cause = failure.__cause__ or failure
            self.tell([failure.key], "failed", brief(cause), model=self.ready.pop(failure.key)[0].model)
            reraise_fatal(cause)
            return
        floor, state = roof.floor(case, context.roofs), context.maker.state()
        for key, sample in samples.items():
            built, found, _ = self.ready.pop(key)
            took = sample.summary(case.length, context.clock.name)
            distance = took.us_per_step / floor.us_per_step if floor else None
            measured: dict[str, Any] = dict(errors=found, timing=took, state=state, floor=floor, distance=distance)
            self.tell([key], "ok", model=built.model, **measured)


def _graph(built: Built, judge: Judge) -> Callable[[], Any]:
    """The replay of a CUDA graph of what eager rows time, its results checked."""
    with torch.set_grad_enabled(built.training):
        replay, returned = timing.graphed(built.call)

    def replayed() -> Any:
        replay()
        torch.cuda.synchronize()
        return returned

    if reason := judge.why_wrong(judge.errors(built, replayed)):
        raise RuntimeError(f"replayed, {reason}")
    return replay


def brief(error: BaseException) -> str:
    """The kind and the first line of an error, and whether a backward raised it."""
    text = str(error).strip().splitlines()
    in_backward = any(frame.name == "backward" for frame in traceback.extract_tb(error.__traceback__))
    where = "in its backward: " if in_backward else ""
    return where + (f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__)


def reraise_fatal(error: BaseException) -> None:
    """Raise Fatal from an error after which the device answers nothing any more."""
    if why := why_lost():
        raise Fatal(why.splitlines()[0][:300]) from error


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
