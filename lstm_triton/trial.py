"""The process in which `lstm-triton tune` measures: it checks the contenders for a call, then times them in turns.

A kernel that traps or hangs costs this process and not the one that asks, which knows from the last answer whose it was.
"""

import contextlib
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from . import lstm, tolerance
from .kernels.device import matmul_precision
from .process import answer
from .shapes import Shape
from .timing import Clock, Samples, interleaved

WAYS = ("forward", "backward")


class Contender(NamedTuple):
    """A way to run the call. forward, backward: the configurations of its kernels, or None for those of the cost model."""

    backend: str
    forward: dict | None = None
    backward: dict | None = None


class Work:
    """A call of the given shape on random numbers, without dropout. cell: the `cells.Cell`; None for an LSTM."""

    def __init__(self, shape: Shape, steps: int, device: torch.device, cell: Any = None) -> None:
        torch.manual_seed(0)
        dtype, H, D = getattr(torch, shape.dtype), shape.hidden_size, shape.directions
        # None where torch's setting is this precision, because cuDNN's GRU takes no other.
        usual = dtype != torch.float32 or shape.precision == matmul_precision(dtype, None, recurrent=True)
        options: dict[str, Any] = dict(bidirectional=D == 2, recompute=shape.recompute, device=device, dtype=dtype)
        options |= dict(precision=None if usual else shape.precision)
        self.module = _module(cell, (shape.input_size, H, shape.num_layers), shape.proj_size, options)
        self.module.train(cell is None or not cell.masks)  # in training the reference would draw other masks
        rows = shape.num_layers * D, shape.batch
        states = [torch.randn(*rows, shape.proj_size or H, device=device, dtype=dtype)]
        if cell is None:
            states.append(torch.randn(*rows, H, device=device, dtype=dtype))
        else:  # whose states may have to be positive: zeros all cells take
            states += [torch.zeros(*rows, H, device=device, dtype=dtype) for _ in cell.states]
        x = torch.randn(steps, shape.batch, shape.input_size, device=device, dtype=dtype)
        self.inputs, self.shape = (x, *states), shape
        features, self._features = shape.features.split(","), dict[str, Any]()
        self._lengths = torch.randint(1, steps + 1, (shape.batch,)) if "packed" in features else None
        if "resets" in features:
            self._features["resets"] = torch.rand(steps, shape.batch, device=device) < 0.05
        if "lengths" in features:
            self._features["lengths"] = torch.randint(1, steps + 1, (shape.batch,), device=device)
        if "cells" in features:
            self._features["return_cell_states" if cell is None else "return_states"] = True
        self._cotangents: list[Tensor] = []
        self._truth: list[Tensor] = []

    def run(self, module: torch.nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return outputs and, in training, the gradients of inputs and parameters."""
        with torch.set_grad_enabled(self.shape.train):
            x, *given = leaves = [t.detach().requires_grad_(self.shape.train) for t in inputs]
            packed = x if self._lengths is None else pack_padded_sequence(x, self._lengths, enforce_sorted=False)
            y, last, *every = module(packed, tuple(given) if len(given) > 1 else given[0], **self._features)
            results = [y, *_each(last), *(t for states in every for t in _each(states))]
            found = [t.data if isinstance(t, PackedSequence) else t for t in results]
            if not self.shape.train:
                return found
            self._cotangents = self._cotangents or [torch.randn_like(t) for t in found]
            cotangents = [g.to(t.dtype) for g, t in zip(self._cotangents, found)]
            return found + list(torch.autograd.grad(found, [*leaves, *module.parameters()], cotangents))

    def of(self, contender: Contender) -> tuple[Callable[[], list[Tensor]], Callable[[], dict[str, dict]]]:
        """Return the call by this contender, and the configurations that its kernels had."""
        from .kernels import device, search
        from .kernels.sequence_config import SequenceConfig

        remembered: dict[Any, Any] = {}

        def measured(problem: Any, on: torch.device) -> Any:
            given = getattr(contender, problem.way)
            return None if given is None or problem.stepwise else SequenceConfig(**given)

        def call() -> list[Tensor]:
            search.remembered, device.measured, self.module.backend = remembered, measured, contender.backend
            return self.run(self.module, self.inputs)

        return call, lambda: {problem.way: asdict(config) for (problem, *_), config in remembered.items()}

    def faults(self, results: list[Tensor]) -> list[str]:
        """Return where the results miss the tolerance rule."""
        if not self._truth:
            plain = copy.deepcopy(self.module)
            plain.backend, plain.precision = "reference", None
            double, moved = copy.deepcopy(plain).double(), tolerance.neighbours(self.inputs)[:3]
            truths = [self.run(double, [t.double() for t in inputs if t is not None]) for inputs in moved]
            with tolerance.Tf32Products() if self.shape.precision == "tf32" else contextlib.nullcontext():
                torchs = [self.run(plain, [t for t in inputs if t is not None]) for inputs in moved]
            self._truth, errors = truths[0], [list(map(_error, *pair)) for pair in zip(torchs, truths)]
            self._torchs = [tolerance.worst(each) for each in zip(*errors)]
        missed = (
            tolerance.misses(_error(result, truth), torchs, result.dtype)
            for result, truth, torchs in zip(results, self._truth, self._torchs)
        )
        return [text for texts in missed for text in texts]


def _module(cell: Any, sizes: tuple[int, int, int], proj_size: int, options: dict[str, Any]) -> Any:
    if cell is None:
        return lstm.LSTM(*sizes, proj_size=proj_size, **options)
    from .cells import GRU, Recurrent

    return GRU(*sizes, **options) if cell is GRU.cell else Recurrent(cell, *sizes, **options)


def _each(states: Any) -> Sequence[Any]:
    """Return all tensors of one tensor or packed sequence, or of several."""
    return [states] if isinstance(states, (Tensor, PackedSequence)) else states


def _error(result: Tensor, truth: Tensor) -> tolerance.Errors:
    return tolerance.Errors.of(result.detach().double() - truth.detach(), truth.detach())


def serve(connection: Any, _: None) -> None:
    """Measure what is requested; the events are mappings."""
    answer(connection, lambda request: _measure(request, lambda **event: connection.send(event)))


def _measure(request: dict[str, Any], tell: Callable[..., None]) -> None:
    device = torch.device(request["device"])
    work, clock = Work(request["shape"], request["steps"], device, request["cell"]), Clock(device)
    calls: dict[str, Callable[[], Any]] = {}
    for name, contender in request["contenders"].items():
        tell(doing=name)
        call, configurations = work.of(contender)
        call.__name__ = name
        try:
            faults = [f"wrong: {text}" for text in work.faults(call())]
            clock.sample(call, 1)
        except Exception as error:  # whatever it is, it costs this contender alone
            faults = [str(error).partition("\n")[0][:200] or type(error).__name__]
        if faults:
            tell(name=name, fault=faults[0])
            continue
        tell(name=name, configs=configurations())
        calls[name] = call

    def tell_times(found: Mapping[str, Samples]) -> None:
        tell(times={name: statistics.median(samples.device_us) for name, samples in found.items()})

    if calls:
        seconds = request["seconds"] / len(calls)
        interleaved(calls, clock, seconds, lambda name: tell(doing=name), tell_times)
