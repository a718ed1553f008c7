"""LSTM layer problems: drawing them, and running them through the kernels, through torch, and in more than float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from lstm_triton import functional, reference
from lstm_triton.kernels import search

from . import tolerance
from .extended import Extended
from .problems import judge, normal_from

OUTPUTS = ("y", "h_n", "c_n", "c")


@dataclass(frozen=True)
class Problem:
    """One layer and its cotangents, of y, h_n, c_n and c, all in one dtype. The truth does not know `precision`."""

    x: Tensor  # [T, B, I]
    hx: tuple[Tensor, Tensor]  # [D, B, H]
    weights: tuple[Tensor, ...]  # flat, as functional.lstm takes them
    cotangents: tuple[Tensor, ...]  # three, or four where the cell states are asked for
    reset_state: tuple[Tensor, Tensor] | None = None  # broadcastable to [T, D, B, H]
    resets: Tensor | None = None
    lengths: Tensor | None = None
    precision: str | None = "ieee"

    @property
    def directions(self) -> int:
        return self.hx[0].shape[0]

    @property
    def with_cells(self) -> bool:
        return len(self.cotangents) == 4

    @property
    def is_plain(self) -> bool:
        return self.resets is None and self.lengths is None and not self.with_cells

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x, *self.hx, *self.weights, *(self.reset_state or ()))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.inputs, *self.cotangents

    @property
    def names(self) -> tuple[str, ...]:
        """Of the results, in order: outputs, then a gradient for each of `inputs`."""
        each = ("w_ih", "w_hh", "b_ih", "b_hh")[: len(self.weights) // self.directions]
        weights = [f"d{name}{suffix}" for suffix in ("", "_reverse")[: self.directions] for name in each]
        resets = ("dreset_h", "dreset_c") if self.reset_state else ()
        return (*OUTPUTS[: len(self.cotangents)], "dx", "dh0", "dc0", *weights, *resets)

    def with_tensors(self, tensors: list[Tensor]) -> Problem:
        """The same with these inputs and cotangents."""
        n, k = len(self.weights), len(self.inputs)
        return replace(
            self,
            x=tensors[0],
            hx=tuple(tensors[1:3]),
            weights=tuple(tensors[3 : 3 + n]),
            reset_state=tuple(tensors[3 + n : k]) or None,
            cotangents=tuple(tensors[k:]),
        )


def draw(
    T: int,
    B: int,
    I: int,
    H: int,
    D: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    precision: str | None = "ieee",
    scale: float = 1.0,
    bias: bool = True,
    resets: bool = False,
    reset_state: str | None = None,
    lengths: bool = False,
    cells: bool = False,
    batch_major: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """A random problem. scale 4: most gates are saturated. reset_state: "stored" per step, or "shared" by all of them."""
    generator = torch.Generator().manual_seed(seed)
    normal = normal_from(generator, dtype, device)
    w = scale / math.sqrt(H)
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))[: 4 if bias else 2]
    x = normal(B, T, I).transpose(0, 1) if batch_major else normal(T, B, I)
    problem = Problem(
        x,
        (normal(D, B, H), normal(D, B, H, size=scale)),
        tuple(normal(*shape, size=w) for _ in range(D) for shape in shapes),
        tuple(normal(*shape) for shape in ((T, B, D * H), (D, B, H), (D, B, H), (T, B, D * H))[: 4 if cells else 3]),
        precision=precision,
    )
    if resets:
        problem = replace(problem, resets=(torch.rand(T, B, generator=generator) < 0.3).to(device))
    if reset_state:
        shape = (T, D, B, H) if reset_state == "stored" else (D, 1, H)
        problem = replace(problem, reset_state=(normal(*shape), normal(*shape[-2:])))
    if lengths:
        n = torch.randint(0, T + 1, (B,), generator=generator)
        n[: min(3, B)] = torch.tensor([T, 0, 1])[: min(3, B)]
        problem = replace(problem, lengths=n.to(device))
    return problem


def by_kernels(problem: Problem, backend: str = "triton", **options) -> list[Tensor]:
    """Outputs and gradients in the order of problem.names."""
    given = dict(resets=problem.resets, lengths=problem.lengths, return_cell_states=problem.with_cells, backend=backend)
    options = given | {"precision": problem.precision} | options

    def layer(x, h0, c0, weights, reset_state):
        y, states, *cells = functional.lstm(x, (h0, c0), weights, reset_state=reset_state, **options)
        return y, *states, *cells

    return with_gradients(layer, problem)


def by_torch(problem: Problem) -> list[Tensor]:
    """The same through torch's own layer; where it cannot, and for TF32, through the reference in the same dtype."""
    bias, D = len(problem.weights) // problem.directions == 4, problem.directions

    def layer(x, h0, c0, weights, _):
        return torch._VF.lstm(x, (h0, c0), weights, bias, 1, 0.0, True, D == 2, False)

    with tolerance.torchs_products(problem.precision):
        if problem.is_plain and problem.precision != "tf32":
            return with_gradients(layer, problem)
        return by_kernels(problem, "reference", precision="ieee")


@contextlib.contextmanager
def products_of_warpgroups() -> Iterator[None]:
    """Within, forward tiles multiply with wgmma or tcgen05 where the target has them, as those of large layers do."""
    candidates = search.candidates

    def of_warpgroups(problem: search.Problem, *device: Any) -> list[search.SequenceConfig]:
        wide = problem.way == "forward"
        return [c for c in candidates(problem, *device) if not wide or (c.split_k == 1 and 4 * c.block_h >= 64)]

    with mock.patch.object(search, "candidates", of_warpgroups), mock.patch.dict(search.remembered, clear=True):
        yield


def with_gradients(layer, problem: Problem) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in problem.inputs]
    weights = leaves[3 : 3 + len(problem.weights)]
    outputs = layer(*leaves[:3], weights, tuple(leaves[3 + len(weights) :]) or None)
    found = torch.autograd.grad(outputs, leaves, problem.cotangents, allow_unused=True, materialize_grads=True)
    return [*(t.detach() for t in outputs), *found]


def runs(problem: Problem, d: int) -> Iterator[tuple[slice, list[int], tuple[str, int] | None, bool]]:
    """What direction d computes, as plain LSTMs: rows, steps in order, where the state comes from, is it the rows' last?

    The state before the first of the steps is ("hx", 0), or ("reset", t) of the step t. All rows go together where there are
    no segments. A row without steps is a run without steps.
    """
    T, B = problem.x.shape[:2]
    if problem.resets is None and problem.lengths is None:
        steps = list(range(T))
        yield slice(0, B), steps if d == 0 else steps[::-1], ("hx", 0), True
        return
    for b in range(B):
        length = T if problem.lengths is None else int(problem.lengths[b])
        starts = [] if problem.resets is None else [t for t in range(length) if problem.resets[t, b]]
        cuts = sorted({0, length, *starts})
        if len(cuts) == 1:
            yield slice(b, b + 1), [], ("hx", 0), True
        for start, stop in zip(cuts, cuts[1:]):
            if d == 0:
                yield (
                    slice(b, b + 1),
                    list(range(start, stop)),
                    ("reset" if start in starts else "hx", start),
                    stop == length,
                )
            else:
                # Backwards, a segment is entered at its end; at t = 0 a mark starts what is the first segment anyway.
                source = ("hx", 0) if stop == length else ("reset", stop - 1)
                yield slice(b, b + 1), list(range(start, stop))[::-1], source, start == 0


def truth(problem: Problem) -> list[Extended]:
    """Outputs and gradients in float64; for float64 problems in more.

    Row by row and segment by segment, one `reference.lstm_cell` at a time.
    """
    D, H, (T, B, _) = problem.directions, problem.hx[0].shape[2], problem.x.shape
    wide = np.longdouble if problem.x.dtype == torch.float64 else np.float64
    x, h0, c0, *rest = (t.detach().cpu().double().numpy().astype(wide) for t in problem.inputs)
    n = len(problem.weights) // D
    cotangents = [t.detach().cpu().double().numpy().astype(wide) for t in problem.cotangents]
    outputs = [np.zeros_like(t) for t in cotangents]
    y, h_n, c_n, *_ = outputs
    cells = outputs[3] if problem.with_cells else np.zeros_like(y)
    dy, dh_n, dc_n, *dcells = cotangents
    reset_state = [np.broadcast_to(s, (T, D, B, H)) for s in rest[D * n :]]
    dx, dh0, dc0 = (np.zeros_like(t) for t in (x, h0, c0))
    dweights = [np.zeros_like(w) for w in rest[: D * n]]
    dreset_state = [np.zeros((T, D, B, H), wide) for _ in reset_state]

    for d in range(D):
        units = slice(d * H, (d + 1) * H)
        weights = [Extended(w) for w in rest[d * n : (d + 1) * n]]
        for rows, steps, (source, t0), is_last in runs(problem, d):
            if source == "hx":
                h, c = Extended(h0[d, rows]), Extended(c0[d, rows])
            else:
                h, c = (
                    (Extended(s[t0, d, rows]) for s in reset_state) if reset_state else (Extended(0 * h0[d, rows]),) * 2
                )
            states = []
            for t in steps:
                states.append((h, c))
                h, c = reference.lstm_cell(Extended(x[t, rows]), h, c, *weights)
                y[t, rows, units], cells[t, rows, units] = h.values, c.values
            dh, dc = np.zeros_like(h.values), np.zeros_like(h.values)
            if is_last:
                h_n[d, rows], c_n[d, rows] = h.values, c.values
                dh, dc = dh_n[d, rows], dc_n[d, rows]
            for t, (h, c) in zip(steps[::-1], states[::-1]):
                dh = dh + dy[t, rows, units]
                dc = dc + (dcells[0][t, rows, units] if dcells else 0)
                back = reference.lstm_cell_backward((Extended(dh), Extended(dc)), Extended(x[t, rows]), h, c, *weights)
                dx_t, dh, dc, *dw = (t.values for t in back)
                dx[t, rows] += dx_t
                for k, g in enumerate([*dw, dw[-1]][:n]):
                    dweights[d * n + k] += g
            if source == "hx":
                dh0[d, rows] += dh
                dc0[d, rows] += dc
            elif reset_state:
                dreset_state[0][t0, d, rows] += dh
                dreset_state[1][t0, d, rows] += dc
    dresets = [_sum_to(g, s.shape) for g, s in zip(dreset_state, rest[D * n :])]
    return [Extended(t) for t in (*outputs, dx, dh0, dc0, *dweights, *dresets)]


def _sum_to(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(k for k, size in enumerate(shape) if size == 1), keepdims=True)


def assert_as_accurate_as_torch(results: list[Tensor], problem: Problem) -> None:
    """Judge results in the order of problem.names by the rule of `tolerance`."""
    by, true = (lambda tensors, f=f: f(problem.with_tensors(tensors)) for f in (by_torch, truth))
    judge(results, problem.names, problem.tensors, by, true)


def assert_close(results: list[Tensor], expected: list[Tensor], problem: Problem, ulps: float) -> None:
    """Equal up to some ulp of each tensor's largest element: for two orders of the same roundings."""
    for name, result, wanted in zip(problem.names, results, expected, strict=True):
        scale = wanted.abs().max().item() * torch.finfo(wanted.dtype).eps if wanted.numel() else 0.0
        torch.testing.assert_close(result, wanted, rtol=0, atol=ulps * scale, msg=lambda m, name=name: f"{name}: {m}")
