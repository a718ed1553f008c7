"""Calls of LSTM with every feature at once: drawing them, and running them through any backend."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_triton import LSTM
from lstm_triton.operators import dropped

from .lstms import assert_close, flat
from .problems import judge as judge_results


@dataclass(frozen=True)
class Case:
    """A call of LSTM; everything random about it comes from the seed."""

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
    resets: str | None = None  # or to "zero", to a state "stored" per step, or to one "shared" by steps and rows
    cells: bool = False
    recompute: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def R(self) -> int:
        return self.H // 2 if self.projection and self.H > 1 else 0

    def module(self, backend: str) -> LSTM:
        return LSTM(
            self.I,
            self.H,
            self.num_layers,
            self.bias,
            self.batch_first,
            self.dropout if self.num_layers > 1 else 0.0,
            self.bidirectional,
            self.R,
            dtype=self.dtype,
            device="meta",
            backend=backend,
            precision="ieee",
            recompute=self.recompute,
        )


@dataclass(frozen=True)
class Drawn:
    """The tensors of a case, differentiable ones first."""

    inputs: list[Tensor]  # x, h0, c0, the parameters, and where there are any reset_h and reset_c
    cotangents: list[Tensor]
    resets: Tensor | None
    lengths: Tensor | None


def draw(case: Case, device: torch.device) -> Drawn:
    generator = torch.Generator().manual_seed(case.seed)
    T, B, L = case.T, case.B, case.num_layers * (2 if case.bidirectional else 1)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(case.dtype).to(device)

    R = case.R or case.H
    inputs = [normal(*((B, T) if case.batch_first else (T, B)), case.I), normal(L, B, R), normal(L, B, case.H)]
    inputs += [normal(*p.shape, size=case.H**-0.5) for p in case.module("reference").parameters()]
    if case.resets in ("stored", "shared"):
        rows = (T, L, B) if case.resets == "stored" else (L, 1)
        inputs += [normal(*rows, R), normal(*rows, case.H)]
    resets = torch.rand(inputs[0].shape[:2], generator=generator) < 0.4
    lengths = torch.randint(1 if case.rows == "packed" else 0, T + 1, (B,), generator=generator)
    lengths[-1] = T
    directions = 2 if case.bidirectional else 1
    steps = (int(lengths.sum()),) if case.rows == "packed" else inputs[0].shape[:2]
    cotangents = [normal(*steps, directions * R), normal(L, B, R), normal(L, B, case.H)]
    if case.cells:
        cotangents.append(normal(*steps, directions * case.H))
    return Drawn(
        inputs, cotangents, None if case.resets is None else resets.to(device), None if case.rows == "full" else lengths
    )


def results(case: Case, drawn: Drawn, tensors: Sequence[Tensor], backend: str) -> list[Tensor]:
    """output, h_n, c_n, cell states, and the gradients of all inputs, with these tensors as inputs and cotangents."""
    module = case.module(backend)
    n = len(drawn.inputs)
    leaves = [t.detach().requires_grad_() for t in tensors[:n]]
    names = [name for name, _ in module.named_parameters()]
    parameters, reset_state = leaves[3 : 3 + len(names)], leaves[3 + len(names) :]
    x, options = leaves[0], {"resets": drawn.resets, "reset_state": tuple(reset_state) or None}
    if case.rows == "packed":
        x = pack_padded_sequence(x, drawn.lengths, case.batch_first, enforce_sorted=False)
    elif case.rows == "lengths":
        options["lengths"] = drawn.lengths.to(x.device)
    options["return_cell_states"] = case.cells
    seeds = (torch.tensor([seed], device=x.data.device) for seed in itertools.count(case.seed))  # one for each layer
    with (
        mock.patch("torch.nn.functional.dropout", lambda x, p: dropped(x, p, next(seeds))),
        mock.patch("lstm_triton.layers.random_seed", lambda x: next(seeds)),
    ):
        outputs = flat(
            torch.func.functional_call(module, dict(zip(names, parameters)), (x, tuple(leaves[1:3])), options)
        )
    return [t.detach() for t in outputs] + list(
        torch.autograd.grad(outputs, leaves, list(tensors[n:]), allow_unused=True, materialize_grads=True)
    )


def judge(
    case: Case,
    device: torch.device,
    backend: str = "triton",
    context: contextlib.AbstractContextManager | None = None,
) -> None:
    """The backend is as close to the float64 reference as the reference in the same dtype, by the rule of `tolerance`.

    It runs in this context.
    """
    drawn = draw(case, device)
    tensors = [*drawn.inputs, *drawn.cotangents]
    with context or contextlib.nullcontext():
        found = results(case, drawn, tensors, backend)

    def reference(tensors):
        return results(case, drawn, tensors, "reference")

    def truth(tensors):
        return [t.cpu() for t in reference([t.double() for t in tensors])]

    if case.dtype == torch.float64:
        assert_close(found, reference(tensors))
    else:
        judge_results(found, [f"result {k} of {case}" for k in range(len(found))], tensors, reference, truth)


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
        rows.append(
            {name: row[name] for name in factors}
        )  # in one order, whatever the hashes: the tests are named after it
        for pair in pairs(row):
            missing.pop(pair, None)
    return rows
