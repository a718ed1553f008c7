"""Calls of LSTM and Recurrent with every feature at once: drawing them, and running them through any backend."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_triton import LSTM, Recurrent
from lstm_triton.cells import Cell
from lstm_triton.operators import dropped

from . import philox, tolerance
from .lstms import flat
from .problems import Problem, normal_from
from .problems import judge as judge_results


@dataclass(frozen=True)
class Case:
    """A call of LSTM, or of Recurrent for a cell; everything random about it comes from the seed."""

    T: int = 4
    B: int = 3
    I: int = 2
    H: int = 3
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0  # with the masks of the kernels, the same whatever the dtype and memory order
    projection: bool = False
    rows: str = "full"  # or "lengths", or "packed"
    # None, or to "zero"; of LSTM also to a state "stored" per step, or to one "shared" by steps and rows.
    resets: str | None = None
    cells: bool = False  # of LSTM
    recompute: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0
    cell: Cell | None = None
    precision: str = "ieee"

    @property
    def R(self) -> int:
        return self.H // 2 if self.projection and self.H > 1 else 0

    @property
    def states(self) -> tuple[str, ...]:
        return ("h", "c") if self.cell is None else ("h", *self.cell.states)

    def module(self, backend: str) -> LSTM | Recurrent:
        dropout = self.dropout if self.num_layers > 1 else 0.0
        sizes = (self.I, self.H, self.num_layers, self.bias, self.batch_first, dropout, self.bidirectional)
        options = dict(dtype=self.dtype, device="meta", backend=backend, precision=self.precision)
        if self.cell is not None:
            return Recurrent(self.cell, *sizes, **options, recompute=self.recompute)
        return LSTM(*sizes, self.R, **options, recompute=self.recompute)


@dataclass(frozen=True)
class Drawn(Problem):
    """inputs: x, h0 and other states, the parameters, and where there are any reset_h and reset_c."""

    resets: Tensor | None = None
    lengths: Tensor | None = None


def draw(case: Case, device: torch.device) -> Drawn:
    generator = torch.Generator().manual_seed(case.seed)
    normal = normal_from(generator, case.dtype, device)
    T, B, D = case.T, case.B, 2 if case.bidirectional else 1
    L, R = case.num_layers * D, case.R or case.H
    states = [(L, B, R if name == "h" else case.H) for name in case.states]
    inputs = [normal(*((B, T) if case.batch_first else (T, B)), case.I), *(normal(*shape) for shape in states)]
    if "n" in case.states:  # a normalizer is positive
        inputs[1 + case.states.index("n")].exp_()
    inputs += [normal(*p.shape, size=case.H**-0.5) for p in case.module("reference").parameters()]
    if case.resets in ("stored", "shared"):
        rows = (T, L, B) if case.resets == "stored" else (L, 1)
        inputs += [normal(*rows, R), normal(*rows, case.H)]
    resets = torch.rand(inputs[0].shape[:2], generator=generator) < 0.4
    lengths = torch.randint(1 if case.rows == "packed" else 0, T + 1, (B,), generator=generator)
    lengths[-1] = T
    steps = (int(lengths.sum()),) if case.rows == "packed" else inputs[0].shape[:2]
    cotangents = [normal(*shape) for shape in ((*steps, D * R), *states, (*steps, D * case.H))]
    cotangents = cotangents if case.cells else cotangents[:-1]
    marks, ends = resets.to(device) if case.resets else None, lengths if case.rows != "full" else None
    names = tuple(f"result {k} of {case}" for k in range(len(inputs) + len(cotangents)))
    return Drawn(tuple(inputs), tuple(cotangents), names, case.precision, marks, ends)


def function(case: Case, drawn: Drawn, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """output, states and cell states, from tensors like drawn.inputs."""
    module, n = case.module(backend), len(case.states)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx, parameters, reset_state = rest[:n], rest[n : n + len(names)], rest[n + len(names) :]
        options: dict[str, Any] = {"resets": drawn.resets, "reset_state": reset_state or None}
        given: Any = x
        if case.rows == "packed":
            given = pack_padded_sequence(x, drawn.lengths, case.batch_first, enforce_sorted=False)
        elif case.rows == "lengths":
            options["lengths"] = drawn.lengths.to(x.device)
        if case.cells:
            options["return_cell_states"] = True
        seeds = itertools.count(
            case.seed
        )  # one for each layer, as philox.seeded gives the kernels and the masks of cells

        def dropout(x: Tensor, p: float) -> Tensor:
            return dropped(x, p, torch.tensor([next(seeds)], device=x.device))

        with philox.seeded(case.seed), mock.patch("torch.nn.functional.dropout", dropout):
            call = (given, hx if len(hx) > 1 else hx[0])
            return tuple(flat(torch.func.functional_call(module, dict(zip(names, parameters)), call, options)))

    return run


def results(case: Case, drawn: Drawn, backend: str, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
    """Outputs, and the gradients of all inputs; tensors: inputs and cotangents in place of those drawn."""
    return (drawn.with_tensors(tensors) if tensors else drawn).run(function(case, drawn, backend))


def judge(
    case: Case,
    device: torch.device,
    backend: str = "triton",
    context: contextlib.AbstractContextManager | None = None,
) -> None:
    """The backend, run in this context, is as accurate as the rule wants."""
    drawn = draw(case, device)
    with context or contextlib.nullcontext():
        found = results(case, drawn, backend)
    assert_accurate(found, case, drawn)


def assert_accurate(found: Sequence[Tensor], case: Case, drawn: Drawn) -> None:
    """These results are as close to the float64 reference as the reference in the same dtype, by the rule of `tolerance`."""

    def reference(tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        with tolerance.torchs_products(case.precision):
            return results(case, drawn, "reference", tensors)

    def truth(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.cpu() for t in results(case, drawn, "reference", [t.double() for t in tensors])]

    if case.dtype == torch.float64:  # no truth is better than that
        close = dict(rtol=0, atol=1e-12) if case.cell is None else dict(rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(list(found), reference(), **close)
    else:
        judge_results(found, drawn.names, drawn.tensors, reference, truth)


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows that hold every value of each factor together with every value of each other, not many more than needed."""

    def pairs(row: Mapping[str, Any]) -> set[frozenset]:
        return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}

    missing = {
        frozenset(((a, u), (b, v))): None  # a set in order
        for a, b in itertools.combinations(factors, 2)
        for u in factors[a]
        for v in factors[b]
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name, values in factors.items():
            if name not in row:
                row[name] = max(values, key=lambda v: len(pairs({**row, name: v}) & missing.keys()))
        rows.append({name: row[name] for name in factors})  # in one order: the tests are named after it
        for pair in pairs(row):
            missing.pop(pair, None)
    return rows
