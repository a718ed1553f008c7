"""Calls of `Recurrent`, judged by the tolerance rule, with the cell's own function as truth in float64 and as yardstick."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lstm_triton import Recurrent
from lstm_triton.cells import Cell

from . import cell_grammar, philox, tolerance
from .problems import judge


@dataclass(frozen=True)
class Problem:
    """A cell's layers with everything random, drawn in float64 and rounded; options: resets and lengths, of the call."""

    cell: Cell
    tensors: tuple[Tensor, ...]  # x [T, B, I], hx, the parameters, and the cotangents of y and hx
    sizes: tuple[int, int, int, bool]  # I, H, layers, bidirectional
    options: dict[str, Any]
    precision: str | None = None  # of float32 products; the masks of a cell are the same in all runs

    def run(self, backend: str, recompute: bool = False) -> list[Tensor]:
        """y, hx, and the gradients of all but the cotangents."""
        n = 1 + len(self.cell.states)
        I, H, layers, bidirectional = self.sizes
        dtype, device = self.tensors[0].dtype, self.tensors[0].device
        module = Recurrent(
            self.cell,
            I,
            H,
            layers,
            bidirectional=bidirectional,
            dtype=dtype,
            device=device,
            backend=backend,
            precision=self.precision,
            recompute=recompute,
        )
        leaves = [t.clone().requires_grad_() for t in self.tensors[: -1 - n]]
        names = [name for name, _ in module.named_parameters()]
        x, *states = leaves[: 1 + n]
        hx = tuple(states) if self.cell.states else states[0]
        given = dict(zip(names, leaves[1 + n :]))
        with philox.seeded(1):
            y, found = torch.func.functional_call(module, given, (x, hx), self.options)
        results = [y, *(found if self.cell.states else (found,))]
        gradients = torch.autograd.grad(
            results, leaves, self.tensors[-1 - n :], materialize_grads=True, allow_unused=True
        )
        return [t.detach() for t in results] + list(gradients)

    def moved(self, tensors: Sequence[Tensor]) -> Problem:
        return replace(self, tensors=tuple(tensors))


def draw(
    cell: Cell | int,
    T: int,
    B: int,
    I: int,
    H: int,
    dtype: torch.dtype,
    *,
    layers: int = 1,
    bidirectional: bool = False,
    resets: bool = False,
    lengths: bool = False,
    precision: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """A random problem of a cell, or of the random cell of this number."""
    if isinstance(cell, int):
        cell = Cell(*cell_grammar.random_cell(random.Random(cell), smooth=True)[:5])
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    D = 2 if bidirectional else 1
    states = [normal(layers * D, B, H) for _ in ("h", *cell.states)]
    if "n" in cell.states:  # a normalizer is positive
        states[1 + cell.states.index("n")].exp_()
    parameters = Recurrent(cell, I, H, layers, bidirectional=bidirectional, device="meta").parameters()
    weights = [normal(*p.shape) / H**0.5 for p in parameters]
    tensors = [normal(T, B, I), *states, *weights, normal(T, B, D * H), *(normal(*s.shape) for s in states)]
    options = {}
    if resets:
        options["resets"] = (torch.rand(T, B, generator=generator) < 0.3).to(device)
    if lengths:
        options["lengths"] = torch.randint(0, T + 1, (B,), generator=generator).to(device)
    rounded = tuple(t.to(dtype).to(device) for t in tensors)
    return Problem(cell, rounded, (I, H, layers, bidirectional), options, precision)


def assert_as_accurate_as_torch(results: Sequence[Tensor], problem: Problem) -> None:
    """By the tolerance rule, with the cell's function in torch as its yardstick."""
    if problem.tensors[0].dtype == torch.float64:  # no truth is better than that
        torch.testing.assert_close(list(results), problem.run("reference"), rtol=1e-9, atol=1e-9)
        return

    def torchs(tensors: Sequence[Tensor]) -> list[Tensor]:
        with tolerance.Tf32Products() if problem.precision == "tf32" else contextlib.nullcontext():
            return problem.moved(tensors).run("reference")

    def truth(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.cpu() for t in problem.moved([t.double() for t in tensors]).run("reference")]

    judge(results, [f"result {k}" for k in range(len(results))], problem.tensors, torchs, truth)
