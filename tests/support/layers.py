"""LSTM layer problems: drawing them, and running them through the kernels, through torch, and in more than float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from lstm_triton import functional, reference
from lstm_triton.kernels import search

from . import problems, tolerance
from .extended import Extended
from .problems import normal_from


@dataclass(frozen=True)
class Problem(problems.Problem):
    """One layer. inputs: x, h0 and c0 [D, B, H], flat weights and, if any, a reset state; cotangents: of y, h_n, c_n and, if
    the cell states are asked for, c. The truth does not know `precision`."""

    n_weights: int = 4
    resets: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    @property
    def hx(self) -> tuple[Tensor, ...]:
        return self.inputs[1:3]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.inputs[3 : 3 + self.n_weights]


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
    """A random problem. scale 4: many gates are saturated. reset_state: "stored" per step, or "shared" by all of them."""
    generator = torch.Generator().manual_seed(seed)
    normal = normal_from(generator, dtype, device)
    w = 1 / math.sqrt(H)
    each = {"w_ih": (4 * H, I), "w_hh": (4 * H, H), **({"b_ih": (4 * H,), "b_hh": (4 * H,)} if bias else {})}
    inputs = {"x": normal(B, T, I).transpose(0, 1) if batch_major else normal(T, B, I)}
    inputs |= {"h0": normal(D, B, H), "c0": normal(D, B, H, size=scale)}
    for suffix in ("", "_reverse")[:D]:
        # Not the recurrent weights: these would make a layer chaotic, where errors follow from chance alone.
        sizes = {name: w if name == "w_hh" else scale * w for name in each}
        inputs |= {name + suffix: normal(*shape, size=sizes[name]) for name, shape in each.items()}
    shapes = {"y": (T, B, D * H), "h_n": (D, B, H), "c_n": (D, B, H), **({"c": (T, B, D * H)} if cells else {})}
    cotangents = tuple(normal(*shape) for shape in shapes.values())
    marks = torch.rand(T, B, generator=generator) < 0.3 if resets else None
    if reset_state:
        shape = (T, D, B, H) if reset_state == "stored" else (D, 1, H)
        inputs |= {"reset_h": normal(*shape), "reset_c": normal(*shape[-2:])}
    n = torch.randint(0, T + 1, (B,), generator=generator) if lengths else None
    if n is not None:
        n[: min(3, B)] = torch.tensor([T, 0, 1])[: min(3, B)]
    marks, n = (None if t is None else t.to(device) for t in (marks, n))
    names = (*shapes, *(f"d{name}" for name in inputs))
    return Problem(tuple(inputs.values()), cotangents, names, precision, D * len(each), marks, n)


def function(problem: Problem, backend: str = "triton", **options) -> Callable[..., tuple[Tensor, ...]]:
    """The layer, of tensors like the problem's inputs."""
    given = dict(precision=problem.precision, backend=backend, return_cell_states=len(problem.cotangents) == 4)

    def layer(x: Tensor, h0: Tensor, c0: Tensor, *rest: Tensor, **more) -> tuple[Tensor, ...]:
        weights, reset_state = rest[: problem.n_weights], rest[problem.n_weights :]
        marks, ends = (None if t is None else t.to(x.device) for t in (problem.resets, problem.lengths))
        segments = dict(resets=marks, reset_state=reset_state or None, lengths=ends)
        y, states, *cells = functional.lstm(x, (h0, c0), weights, **segments, **given | options | more)
        return y, *states, *cells

    return layer


def by_kernels(problem: Problem, backend: str = "triton", **options) -> list[Tensor]:
    """Outputs and gradients in the order of problem.names."""
    return problem.run(function(problem, backend, **options))


def by_torch(problem: Problem) -> list[Tensor]:
    """The same through torch's own layer; where it cannot, and for TF32, through the reference in the same dtype."""
    D = problem.hx[0].shape[0]

    def layer(x, h0, c0, *weights):
        return torch._VF.lstm(x, (h0, c0), weights, len(weights) == 4 * D, 1, 0.0, True, D == 2, False)

    is_plain = problem.resets is None and problem.lengths is None and len(problem.cotangents) == 3
    with tolerance.torchs_products(problem.precision):
        if is_plain and problem.precision != "tf32":
            return problem.run(layer)
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


def truth(problem: Problem) -> list[Extended]:
    """Outputs and gradients in float64, of float64 problems in more: one `reference.lstm_cell` for each step."""
    D, B, H = problem.hx[0].shape
    T, n = problem.x.shape[0], problem.n_weights // D
    kind = np.longdouble if problem.inputs[0].dtype == torch.float64 else np.float64
    x, h0, c0, *rest = (t.detach().cpu().double().numpy().astype(kind) for t in problem.inputs)
    dy, dh_n, dc_n, *dcells = (t.detach().cpu().double().numpy().astype(kind) for t in problem.cotangents)
    weights, given = rest[: D * n], rest[D * n :]
    reset_state = np.stack([np.broadcast_to(s, (T, D, B, H)) for s in given or np.zeros((2, 1))])
    resets, lengths = np.zeros((T + 1, B, 1), bool), np.full((B, 1), T)
    if problem.resets is not None:
        resets[:T, :, 0] = problem.resets.cpu().numpy()
    if problem.lengths is not None:
        lengths[:, 0] = problem.lengths.cpu().numpy()

    h_n, c_n, y, cells = (np.zeros_like(t) for t in (h0, c0, dy, dy))
    dx, dh0, dc0, dreset_state, *dweights = (np.zeros_like(t) for t in (x, h0, c0, reset_state, *weights))
    for d in range(D):
        units, own, steps = slice(d * H, (d + 1) * H), [Extended(w) for w in weights[d * n : (d + 1) * n]], []
        state = np.stack((h0[d], c0[d]))
        for t in range(T) if d == 0 else reversed(range(T)):
            is_step = t < lengths
            # Backwards, a segment is entered at its end, which is before the mark of the next one.
            starts = (t + d < lengths) & resets[t + d]
            state = np.where(starts, reset_state[:, t, d], state)
            inputs = [Extended(part) for part in (x[t], *state)] + own
            steps.append((t, is_step, starts, inputs))
            state = np.where(is_step, np.stack([s.values for s in reference.lstm_cell(*inputs)]), state)
            y[t, :, units], cells[t, :, units] = is_step * state
        h_n[d], c_n[d] = state
        grads = np.stack((dh_n[d], dc_n[d]))
        for t, is_step, starts, inputs in reversed(steps):
            arriving = np.stack([g[t, :, units] for g in (dy, dcells[0] if dcells else np.zeros_like(dy))])
            back = reference.lstm_cell_backward([Extended(g) for g in is_step * (grads + arriving)], *inputs)
            dx_t, *dstate, dw_ih, dw_hh, db = (g.values for g in back)
            dx[t] += dx_t
            for total, g in zip(dweights[d * n : (d + 1) * n], (dw_ih, dw_hh, db, db)):
                total += g
            grads = np.where(is_step, np.stack(dstate), grads)
            dreset_state[:, t, d] = starts * grads
            grads = np.where(starts, 0, grads)
        dh0[d], dc0[d] = grads
    dresets = [_sum_to(g, s.shape) for g, s in zip(dreset_state, given)]
    outputs = (y, h_n, c_n, cells)[: len(problem.cotangents)]
    return [Extended(t) for t in (*outputs, dx, dh0, dc0, *dweights, *dresets)]


def _sum_to(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(k for k, size in enumerate(shape) if size == 1), keepdims=True)


def assert_as_accurate_as_torch(results: list[Tensor], problem: Problem) -> None:
    """Judge results in the order of problem.names by the rule of `tolerance`."""
    by, true = (lambda tensors, f=f: f(problem.with_tensors(tensors)) for f in (by_torch, truth))
    problems.judge(results, problem.names, problem.tensors, by, true)
