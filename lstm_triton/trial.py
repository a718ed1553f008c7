"""The process in which `lstm-triton tune` measures: what can run a call of an `LSTM` is checked, then timed in turns.

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

from . import tolerance
from .shapes import Shape
from .timing import Clock, Samples, interleaved

WAYS = ("forward", "backward")


class Contender(NamedTuple):
    """What may run the call; forward, backward: the configurations that its kernels are to have, or None for the model's."""

    backend: str
    forward: dict | None = None
    backward: dict | None = None


class Work:
    """A call of the given shape on random numbers, without dropout."""

    def __init__(self, shape: Shape, steps: int, device: torch.device) -> None:
        from .lstm import LSTM

        torch.manual_seed(0)
        dtype, H, D = getattr(torch, shape.dtype), shape.hidden_size, shape.directions
        options: dict[str, Any] = dict(bidirectional=D == 2, proj_size=shape.proj_size, recompute=shape.recompute)
        options |= dict(precision=shape.precision if dtype == torch.float32 else None)
        self.module = LSTM(shape.input_size, H, shape.num_layers, device=device, dtype=dtype, **options)
        widths = shape.proj_size or H, H
        states = (torch.randn(shape.num_layers * D, shape.batch, n, device=device, dtype=dtype) for n in widths)
        x = torch.randn(steps, shape.batch, shape.input_size, device=device, dtype=dtype)
        self.inputs, self.shape = (x, *states), shape
        features, self._features = shape.features.split(","), dict[str, Any]()
        self._lengths = torch.randint(1, steps + 1, (shape.batch,)) if "packed" in features else None
        if "resets" in features:
            self._features["resets"] = torch.rand(steps, shape.batch, device=device) < 0.05
        if "lengths" in features:
            self._features["lengths"] = torch.randint(1, steps + 1, (shape.batch,), device=device)
        if "cells" in features:
            self._features["return_cell_states"] = True
        self._cotangents: list[Tensor] = []
        self._truth: list[Tensor] = []

    def run(self, module: torch.nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs, and where it trains the gradients of inputs and parameters."""
        with torch.set_grad_enabled(self.shape.train):
            x, h, c = leaves = [t.detach().requires_grad_(self.shape.train) for t in inputs]
            packed = x if self._lengths is None else pack_padded_sequence(x, self._lengths, enforce_sorted=False)
            y, states, *cells = module(packed, (h, c), **self._features)
            found = [t.data if isinstance(t, PackedSequence) else t for t in (y, *states, *cells)]
            if not self.shape.train:
                return found
            self._cotangents = self._cotangents or [torch.randn_like(t) for t in found]
            cotangents = [g.to(t.dtype) for g, t in zip(self._cotangents, found)]
            return found + list(torch.autograd.grad(found, [*leaves, *module.parameters()], cotangents))

    def of(self, contender: Contender) -> tuple[Callable[[], list[Tensor]], Callable[[], dict[str, dict]]]:
        """The call by this contender, and the configurations that its kernels then had."""
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
        """What the results miss of the tolerance rule."""
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


def _error(result: Tensor, truth: Tensor) -> tolerance.Errors:
    return tolerance.Errors.of(result.detach().double() - truth.detach(), truth.detach())


def serve(connection: Any, request: dict[str, Any]) -> None:
    """Measure what is requested; the answers are mappings."""

    def tell(**answer: Any) -> None:
        connection.send(answer)

    device = torch.device(request["device"])
    work, clock = Work(request["shape"], request["steps"], device), Clock(device)
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
    tell(done=True)
