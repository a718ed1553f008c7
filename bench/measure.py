"""Measuring one task: build every provider, compare it with float64, then time those that are right, interleaved."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import accuracy, floor, memory, providers, roofs, timing
from . import problem as problems
from .built import Built, build, precision
from .cases import Task
from .lost import why_lost
from .problem import Problem
from .providers import Model, Provider, Unavailable
from .rows import RowMaker

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Context:
    """What all tasks of a run share.

    seconds: of sampling, for each provider. names: the providers asked for, None for each task's own choice. stage: told what
    is being done, so that what hangs or crashes can be named.
    """

    device: torch.device
    rows: RowMaker
    clock: timing.Clock
    seconds: float = 1.0
    names: tuple[str, ...] | None = None
    roofs: floor.Roofs | None = None
    stage: Callable[[str, str, str], None] = lambda provider, execution, what: None


class Fatal(RuntimeError):
    """The process can measure no more: the device reports an error that stays."""


def measure(task: Task, context: Context, emit: Emit, skip: Collection[tuple[str, str]] = ()) -> None:
    """Emit one row for every provider and execution of the task that is not in `skip`.

    Raises Fatal, after its row, when the device is lost.
    """
    if task.kind in ("overhead", "cold-start", "roof"):
        _measure_special(task, context, emit, skip)
        return
    with precision(task.case):
        _measure(task, context, emit, skip)


def _measure_special(task: Task, context: Context, emit: Emit, skip: Collection[tuple[str, str]]) -> None:
    from . import coldstart, overhead

    run = {"overhead": overhead.measure, "cold-start": coldstart.measure, "roof": roofs.measure}[task.kind]
    run(task, context, emit, skip)


def names_of(task: Task, device_type: str, names: tuple[str, ...] | None) -> list[str]:
    """The providers of a task, in order: those asked for, by default its own. Roofs and the anchor know no choice."""
    if task.kind == "roof":
        return [roofs.NAME]
    if names is not None and task.kind != "anchor":
        return list(names)
    if task.providers is not None:
        return list(task.providers)
    return providers.chosen_for(task.case, task.kind, device_type, task.interpreter)


def _measure(task: Task, context: Context, emit: Emit, skip: Collection[tuple[str, str]]) -> None:
    case, everyone = task.case, providers.all_providers()
    names = names_of(task, context.device.type, context.names)
    wanted = [(n, e) for n in names for e in task.executions if (n, e) not in skip]
    if not wanted:
        return
    context.stage("float64", "eager", "truth")
    try:
        problem = problems.make(case, context.device)
        truth = problems.truth(problem)
    except Exception as error:
        reraise_fatal(error)
        for name, execution in wanted:
            emit(
                context.rows.make(task, name, execution, "failed", f"no float64 truth to compare with: {brief(error)}")
            )
        return
    judge = _Judge(problem, truth)
    judge.ask_torch(everyone[providers.CUDNN if case.form == "layer" else providers.TORCH_CELL], context)
    ready: dict[tuple[str, str], tuple[Built, dict, Callable[[], Any]]] = {}
    for name in dict.fromkeys(n for n, _ in wanted):
        executions = [e for n, e in wanted if n == name]
        context.stage(name, executions[0], "build")
        try:
            built = build(everyone[name], problem, task.kind == "accuracy")
            context.stage(name, executions[0], "check")
            found = judge.errors(built.call(), built.model)
        except Unavailable as error:
            for execution in executions:
                emit(context.rows.make(task, name, execution, "skipped", str(error)))
            continue
        except Exception as error:
            # A forced backend of this package says at its first call what it cannot do: that is no failure.
            status = "skipped" if "cannot serve: " in str(error) else "failed"
            for execution in executions:
                emit(context.rows.make(task, name, execution, status, brief(error)))
            reraise_fatal(error)
            continue
        finally:
            _free(context.device)
        if reason := judge.why_wrong(found):
            for execution in executions:
                emit(context.rows.make(task, name, execution, "wrong", reason, built.model, errors=found))
            continue
        for execution in executions:
            if task.kind == "accuracy":
                emit(context.rows.make(task, name, execution, "ok", None, built.model, errors=found))
            elif task.kind == "memory":
                context.stage(name, execution, "memory")
                held = memory.held(built, problem)
                emit(context.rows.make(task, name, execution, "ok", None, built.model, errors=found, bytes=held))
            elif execution == "graph":
                context.stage(name, execution, "capture")
                try:
                    ready[name, execution] = built, found, _graph(built, judge)
                except Exception as error:
                    emit(context.rows.make(task, name, execution, "failed", f"CUDA graph: {brief(error)}", built.model))
                    reraise_fatal(error)
            else:
                ready[name, execution] = built, found, built.timed
    del truth, judge
    _time(task, context, emit, ready)


def _graph(built: Built, judge: "_Judge") -> Callable[[], Any]:
    """The replay of a graph of what eager rows time, its results checked."""
    with torch.set_grad_enabled(judge.problem.case.mode == "train"):
        replay, returned = timing.graphed(built.timed)
    replay()
    torch.cuda.synchronize()
    if reason := judge.why_wrong(judge.errors(built.named(returned), built.model)):
        raise RuntimeError(f"replayed, {reason}")
    return replay


def _time(task: Task, context: Context, emit: Emit, ready: dict[tuple[str, str], Any]) -> None:
    """Time all at once; a provider that fails gets its row, and the others start again."""
    while ready:
        context.stage(" and ".join(dict.fromkeys(n for n, _ in ready)), "eager", "timing")
        try:
            with torch.set_grad_enabled(task.case.mode == "train"):
                calls = {key: call for key, (_, _, call) in ready.items()}
                samples = timing.interleaved(calls, context.clock, context.seconds)
        except timing.Failed as failure:
            culprit: tuple[str, str] = failure.key  # type: ignore[assignment]
            cause = failure.__cause__ or failure
            emit(context.rows.make(task, *culprit, "failed", brief(cause), ready.pop(culprit)[0].model))
            reraise_fatal(cause)
            continue
        roof = floor.floor(task.case, context.roofs) if context.roofs else None
        state = context.rows.state()
        for (name, execution), sample in samples.items():
            built, found, _ = ready[name, execution]
            took = sample.to_json(task.case.length, context.clock)
            emit(
                context.rows.make(
                    task, name, execution, "ok", None, built.model, errors=found, timing=took, state=state,
                    floor=roof.to_json() if roof else None,
                    distance=took["us_per_step"] / roof.us_per_step if roof else None,
                )
            )  # fmt: skip
        return


class _Judge:
    """Compares results with the truth, and knows torch's own errors on the problem."""

    def __init__(self, problem: Problem, truth: Mapping[str, Tensor]) -> None:
        self.problem, self.truth = problem, truth
        self.torchs: dict[str, dict[str, float]] | None = None
        self._from_zeros: Mapping[str, Tensor] | None = None

    def ask_torch(self, torchs: Provider, context: Context) -> None:
        context.stage(torchs.name, "eager", "check")
        try:
            built = build(torchs, self.problem, states=True)
            self.torchs = self.errors(built.call(), built.model)
        except Exception as error:  # it gets a row of its own where it was asked for
            reraise_fatal(error)
        finally:
            _free(context.device)

    def errors(self, results: Mapping[str, Tensor], model: Model) -> dict[str, dict[str, float]]:
        truth = self.truth
        if not model.takes_initial_state:
            if self._from_zeros is None:
                p = self.problem
                zeros = Problem(
                    p.case,
                    p.device,
                    p.x,
                    torch.zeros_like(p.h0),
                    torch.zeros_like(p.c0),
                    p.weights,
                    p.lengths,
                    p.resets,
                    p.dy,
                )
                self._from_zeros = problems.truth(zeros)
            truth = self._from_zeros
        return accuracy.errors(results, truth)

    def why_wrong(self, found: Mapping[str, Mapping[str, float]]) -> str | None:
        return accuracy.why_wrong(self.problem.case, found, self.torchs)


def brief(error: BaseException) -> str:
    """The kind and the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def reraise_fatal(error: BaseException) -> None:
    """Raise Fatal from an error after which the device answers nothing any more."""
    if why := why_lost():
        raise Fatal(why.splitlines()[0][:300]) from error


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
