"""Measuring one task: build every provider, compare it with float64, then time those that are right, interleaved."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lstm_triton import process, timing
from lstm_triton.process import Fatal, brief, raise_if_lost
from lstm_triton.tolerance import Errors

from . import problem as problems
from . import providers, roofs
from .cases import Case, Pair, Task
from .device import RowMaker
from .problem import Judge, Model, Unavailable
from .rows import Row, Timing


@dataclass
class Context:
    """All tasks of a run share a context. seconds: of sampling, for each provider. roofs: figures of that suite. stage:
    receives provider, execution and what is done next, so that what hangs can be named."""

    maker: RowMaker
    clock: timing.Clock
    seconds: float = 1.0
    roofs: Mapping[str, float] = field(default_factory=dict)
    stage: Callable[..., None] = lambda provider, execution, what: None


def measure(task: Task, context: Context, emit: Callable[[Row], None], pairs: Sequence[Pair] | None = None) -> None:
    """Emit a row for each pair, by default for all of the task. Raises Fatal, after its row, when the device is lost."""
    pairs = providers.pairs_of(task, context.maker.on.type) if pairs is None else pairs
    with problems.precision(task.case):
        _Measurement(task, context, emit).run(pairs)


@dataclass
class _Measurement:
    """The measurement of one task: it holds what is `ready` to be timed, and emits the rows of all else."""

    task: Task
    context: Context
    emit: Callable[[Row], None]
    ready: dict[Pair, tuple[Model, dict[str, Errors], Callable[[], Any]]] = field(default_factory=dict)

    def run(self, pairs: Sequence[Pair]) -> None:
        judge: Any = None
        if self.task.kind not in ("roof", "cold-start"):
            with self._failing(pairs, "no float64 truth to compare with: "):
                self.context.stage("float64", "eager", "truth")
                judge = Judge(problems.make(self.task.case, self.context.maker.on), providers.true(self.task.case))
                self.context.stage(torchs := providers.torchs(self.task.case), "eager", "check")
                judge.ask_torch(providers.PROVIDERS[torchs])
            if judge is None:
                return
        for name in dict.fromkeys(n for n, _ in pairs):
            mine = [pair for pair in pairs if pair[0] == name]
            with self._failing(mine):
                self._check(mine, judge)
            torch.cuda.empty_cache()
        del judge
        while self.ready:
            self._time()

    def tell(self, pairs: Sequence[Pair], status: str, reason: str | None = None, **measured: Any) -> None:
        for pair in pairs:
            self.emit(self.context.maker.make(self.task, *pair, status, reason, **measured))

    @contextlib.contextmanager
    def _failing(self, pairs: Sequence[Pair], what: str = "", **known: Any) -> Iterator[None]:
        """Let an exception within cost these pairs alone, whose rows name it. Raises Fatal where the device is lost."""
        try:
            yield
        except Fatal:
            raise
        except Exception as error:
            # A forced backend of this package says at its first call what it cannot do: that is no failure.
            unable = isinstance(error, Unavailable)
            status = "skipped" if unable or "cannot serve: " in str(error) else "failed"
            self.tell(pairs, status, str(error) if unable else what + brief(error), **known)
            raise_if_lost(error)

    def _check(self, pairs: list[Pair], judge: Judge | None) -> None:
        name, stage, kind, on = pairs[0][0], self.context.stage, self.task.kind, self.context.maker.on
        if judge is None:  # roofs and first calls are compared with no truth
            stage(*pairs[0], kind)
            values = roofs.PARTS[name](on) if kind == "roof" else cold_start(self.task.case, name, on)
            return self.tell(pairs, "ok", values=values)
        stage(*pairs[0], "build")
        model = providers.PROVIDERS[name](replace(judge.problem, states=kind == "accuracy"))
        stage(*pairs[0], "check")
        found = judge.errors(model)
        known: dict[str, Any] = dict(model=model, errors=found)
        if reason := judge.why_wrong(found):
            self.tell(pairs, "wrong", reason, **known)
        elif kind in ("accuracy", "memory"):
            stage(*pairs[0], kind)
            self.tell(pairs, "ok", **known, values=held(model) if kind == "memory" else None)
        else:
            for pair in pairs:
                with self._failing([pair], "CUDA graph: ", model=model):
                    stage(*pair, "build")
                    self.ready[pair] = model, found, _graph(model, judge) if pair[1] == "graph" else model.call

    def _time(self) -> None:
        """Time all at once; a provider that fails gets its row and is left out, and the others start again."""
        context, host, calls = self.context, self.task.kind == "overhead", {p: of[2] for p, of in self.ready.items()}
        clock = timing.Clock(context.maker.on, host=True) if host else context.clock
        samples: dict[Pair, timing.Samples] = {}
        try:
            with torch.set_grad_enabled(self.task.case.mode == "train"):
                samples = timing.interleaved(calls, clock, context.seconds, lambda pair: context.stage(*pair, "timing"))
        except timing.Failed as failure:
            with self._failing([failure.key], model=self.ready.pop(failure.key)[0]):
                raise failure.__cause__ or failure from None
        floor = roofs.floor(self.task.case, {} if host else context.roofs)
        for pair, sample in samples.items():
            model, found, _ = self.ready.pop(pair)
            took = Timing.of(sample, self.task.case.length, clock.name)
            distance = took.us_per_step / floor.us_per_step if floor else None
            known: dict[str, Any] = dict(model=model, errors=found, floor=floor, distance=distance)
            self.tell([pair], "ok", timing=took, **known)


def _graph(model: Model, judge: Judge) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of what eager rows time, after a check of its results."""
    with torch.set_grad_enabled(model.problem.training):
        replay, returned = graphed(model.call)

    def replayed() -> Any:
        replay()
        torch.cuda.synchronize()
        return returned

    if reason := judge.why_wrong(judge.errors(model, replayed)):
        raise RuntimeError(f"replayed, {reason}")
    return replay


def graphed(call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Capture a call in a CUDA graph: return its replay, and what the call returned, which every replay writes anew."""
    current, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    current.wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            result = call()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
    return graph.replay, result


def cold_start(case: Case, provider: str, device: torch.device) -> dict[str, float]:
    """Time imports, first and second call in new processes, in seconds; this package also with a warm cache of kernels."""
    values: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="lstm-triton-cold-") as cache:
        environment = {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": None}
        for kind in ("empty", "warm") if provider.startswith("lstm_triton") else ("empty",):
            child = process.Process(f"{__name__}:first_calls", (case, provider, str(device)), environment)
            try:
                values |= {f"{kind}_{name}": seconds for name, seconds in child.receive(300.0).items()}
            finally:
                child.end()
    return values


def first_calls(connection: Any, request: tuple[Case, str, str]) -> None:
    """Send, from a new process, import_s, first_call_s and second_call_s of (case, provider, device), or Unavailable."""
    case, provider, device = request[0], request[1], torch.device(request[2])
    torch.cuda.set_device(device if device.index is not None and device.type == "cuda" else -1)  # -1 changes nothing
    try:
        model, clock = providers.PROVIDERS[provider](problems.make(case, device)), timing.Clock(device)
    except Unavailable as error:
        return connection.send(error)
    clock.sample(lambda: None, 1)  # CUDA itself starts before the first call does
    with torch.set_grad_enabled(model.problem.training):
        first, second = (clock.sample(model.call, 1)[1] / 1e6 for _ in range(2))
    connection.send({"import_s": process.imports_s, "first_call_s": first, "second_call_s": second})


def held(model: Model) -> dict[str, float]:
    """Return bytes of one training step. saved: in tensors that autograd keeps for backward, each storage once, without inputs
    and weights. On a GPU also, above what there was before: after_forward, and peak over forward and backward, which take in
    what no tensor shows."""
    device = model.problem.device
    with torch.set_grad_enabled(model.problem.training):
        given, saved = _storages((*model.inputs, *model.weights.values())), dict[int, int]()

        def pack(t: Tensor) -> Tensor:
            saved.update(_storages([t]).items() - given.items())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = model.forward()
        # saved tensors stay alive with the outputs, so that no address is counted for two of them
        others = dict(_storages(outputs).items() - saved.items())
        found: dict[str, float] = {"saved_bytes": sum(saved.values()), "outputs_bytes": sum(others.values())}
        del outputs
        if device.type == "cuda":
            model.call()  # compiled, workspaces allocated
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            outputs = model.forward()
            found["after_forward_bytes"] = torch.cuda.memory_allocated(device) - before
            if model.leaves:
                model.backward(outputs)
            found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return found


def _storages(tensors: Any) -> dict[int, int]:
    """Return the bytes of the storages by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
