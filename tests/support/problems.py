"""A step's inputs and cotangents; and the tolerance rule for whatever computes results and gradients from such tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import tolerance
from .extended import Extended

Function = Callable[..., tuple[Tensor, ...]]
Results = Sequence["Tensor | Extended | None"]


@dataclass(frozen=True)
class Problem:
    """Inputs (None where there is none), the cotangents of the outputs, and the names of outputs and gradients."""

    inputs: tuple[Tensor | None, ...]
    cotangents: tuple[Tensor, ...]
    names: tuple[str, ...]
    precision: str | None = "ieee"

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self.inputs, *self.cotangents

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Problem:
        n = len(self.inputs)
        return replace(self, inputs=tuple(tensors[:n]), cotangents=tuple(tensors[n:]))

    def wide(self) -> list[Tensor | Extended | None]:
        """Its tensors in float64; of a float64 problem in more."""
        if self.dtype == torch.float64:
            return [Extended.of(t) for t in self.tensors]
        return [None if t is None else t.detach().cpu().double() for t in self.tensors]

    def run(self, function: Function) -> list[Tensor | None]:
        """Outputs, and the gradient of every input, in the order of `names`."""
        leaves = [None if t is None else t.detach().requires_grad_() for t in self.inputs]
        outputs = function(*leaves)
        found = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], self.cotangents))
        return [*(t.detach() for t in outputs), *(None if t is None else next(found) for t in leaves)]


def normal_from(generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> Callable[..., Tensor]:
    """normal(*shape, size=1): random numbers, drawn in float64 and rounded."""

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)

    return normal


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
