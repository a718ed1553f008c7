"""Problems of a step, the cell's or the readout's, computed by the kernels, by torch and in float64; and the tolerance rule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lstm_triton import functional, reference

from . import tolerance
from .extended import Extended

Results = Sequence["Tensor | Extended | None"]


@dataclass(frozen=True)
class Problem:
    """Inputs (None where there is none), the cotangents of the outputs, and the names of outputs and gradients."""

    inputs: tuple[Tensor | None, ...]
    cotangents: tuple[Tensor, ...]
    names: tuple[str, ...]
    precision: str | None = "ieee"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self.inputs, *self.cotangents

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Problem:
        n = len(self.inputs)
        return replace(self, inputs=tuple(tensors[:n]), cotangents=tuple(tensors[n:]))

    def run(self, function: Callable, needed: Sequence[str] | None = None) -> list[Tensor | None]:
        """Outputs, and the gradients of these inputs or of all, in the order of `names`; None for what is not there."""
        gradients = self.names[len(self.cotangents) :]
        leaves = [
            None if t is None else t.detach().requires_grad_(needed is None or name in needed)
            for t, name in zip(self.inputs, gradients, strict=True)
        ]
        outputs = _tuple(function(*leaves))
        chosen = [t is not None and t.requires_grad for t in leaves]
        given = dict(allow_unused=True, materialize_grads=True)
        found = iter(torch.autograd.grad(outputs, [t for t, c in zip(leaves, chosen) if c], self.cotangents, **given))
        return [*(t.detach() for t in outputs), *(next(found) if c else None for c in chosen)]


def _tuple(results: Tensor | tuple) -> tuple:
    return results if isinstance(results, tuple) else (results,)


@dataclass(frozen=True)
class Step:
    """A step, and all that compute it: functions from a problem's inputs to its outputs."""

    draw: Callable[..., Problem]
    kernels: Callable
    torchs: Callable
    reference: Callable
    backward: (
        Callable  # of the reference: from cotangents and inputs to the inputs' gradients; the last is of all biases
    )

    def by_kernels(self, problem: Problem, needed: Sequence[str] | None = None) -> list[Tensor | None]:
        function = functools.partial(self.kernels, precision=problem.precision, backend="triton")
        return problem.run(function, needed)

    def by_torch(self, problem: Problem) -> list[Tensor | None]:
        """Through torch's own; for TF32 in plain PyTorch with such products, as `tolerance.Tf32Products` has them."""
        with tolerance.torchs_products(problem.precision):
            return problem.run(self.reference if problem.precision == "tf32" else self.torchs)

    def truth(self, problem: Problem) -> Results:
        """In float64; for float64 problems in more."""
        if problem.inputs[0].dtype == torch.float64:
            tensors = [Extended.of(t) for t in problem.tensors]
        else:
            tensors = [None if t is None else t.detach().cpu().double() for t in problem.tensors]
        inputs, cotangents = tensors[: len(problem.inputs)], tensors[len(problem.inputs) :]
        gradients = self.backward(cotangents, *inputs)
        gradients = [None if t is None else g for t, g in zip(inputs, (*gradients, gradients[-1]))]
        return [*_tuple(self.reference(*inputs)), *gradients]

    def assert_as_accurate_as_torch(self, results: Sequence[Tensor | None], problem: Problem) -> None:
        """Judge results in the order of `problem.names` by the rule of `tolerance`."""
        by, true = (lambda tensors, f=f: f(problem.with_tensors(tensors)) for f in (self.by_torch, self.truth))
        judge(results, problem.names, problem.tensors, by, true)


def normal_from(generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> Callable[..., Tensor]:
    """normal(*shape, size=1): random numbers, drawn in float64 and rounded."""

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)

    return normal


def _draws(draw: Callable) -> Callable[..., Problem]:
    """From inputs, cotangents and names drawn with `normal` to a problem."""

    def problem(B, n, m, dtype=torch.float32, *, precision="ieee", device="cpu", seed=0, **options) -> Problem:
        normal = normal_from(torch.Generator().manual_seed(seed), dtype, device)
        return Problem(*draw(normal, B, n, m, **options), precision)

    return problem


@_draws
def _draw_cell(normal, B: int, I: int, H: int, *, scale: float = 1.0, biases: Sequence[bool] = (True, True)):
    """With scale 4 most gates are saturated and c reaches beyond 45, where a naive tanh overflows; with 0.01 all is small."""
    w, c = 1 / math.sqrt(max(H, 1)), normal(B, H, size=scale)
    if scale > 1 and c.numel():
        c.view(-1)[:: max(1, c.numel() // 5)] *= 45
    inputs = [normal(B, I, size=scale), normal(B, H, size=scale), c]
    inputs += [normal(4 * H, I, size=w), normal(4 * H, H, size=w)]
    inputs += [normal(4 * H, size=w * min(scale, 1)) if wanted else None for wanted in biases]
    names = ("h", "c", "dx", "dh", "dc", "dw_ih", "dw_hh", "db_ih", "db_hh")
    return tuple(inputs), (normal(B, H), normal(B, H)), names


@_draws
def _draw_readout(normal, B: int, H: int, V: int, *, scale: float = 1.0, bias: bool = True):
    """h [B, H], weight [V, H], bias [V]. The standard deviation of the logits is about 1.4 * scale."""
    inputs = normal(B, H), normal(V, H, size=scale / math.sqrt(max(H, 1))), normal(V, size=scale) if bias else None
    return inputs, (normal(B, V),), ("y", "dh", "dweight", "dbias")


cells = Step(
    _draw_cell,
    lambda x, h, c, *weights, **options: functional.lstm_cell(x, (h, c), *weights, **options),
    lambda x, h, c, *weights: torch.lstm_cell(x, (h, c), *weights),
    reference.lstm_cell,
    reference.lstm_cell_backward,
)
readouts = Step(
    _draw_readout,
    functional.softmax_readout,
    lambda *inputs: torch.softmax(torch.nn.functional.linear(*inputs), -1),
    reference.softmax_readout,
    lambda cotangents, *inputs: reference.softmax_readout_backward(*cotangents, *inputs),
)


def judge(
    results: Sequence[Tensor | None],
    names: Sequence[str],
    tensors: Sequence[Tensor | None],
    torchs: Callable[[Sequence[Tensor | None]], Results],
    truth: Callable[[Sequence[Tensor | None]], Results],
) -> None:
    """The results are as close to the truth as torch's, for these tensors and for slightly moved ones: `tolerance`'s rule."""
    found: list[list[tolerance.Errors]] = [[] for _ in names]
    for moved in tolerance.neighbours(tensors):
        for errors, result, true in zip(found, torchs(moved), truth(moved), strict=True):
            if true is not None:
                errors.append(tolerance.errors(result, true))
    for name, result, true, errors in zip(names, results, truth(tensors), found, strict=True):
        assert (result is None) == (true is None), name
        if true is not None:
            assert result.dtype == tensors[0].dtype, name
            tolerance.assert_as_accurate(result, true, tolerance.worst(errors), name)
