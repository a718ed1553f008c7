"""One LSTM layer back through time: the backward kernel and the GEMMs of the library after it.

One launch gives the gate gradients dz of all steps; from them one GEMM each gives dx, dW_ih and dW_hh. Rows of weight gradients
are put back from the unit-major order of dz to gate-major.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import stall
from .dropout import Dropout, kernel_arguments
from .launch import Launcher, accumulator, matmul_precision, torch_matmul_precision
from .layer import (
    Direction,
    Forward,
    Segments,
    accumulator_dtype,
    aligned,
    as_rows,
    index_type,
    is_time_major,
    launches,
    new_states,
    plan,
    pre_activations,
    recurrent_weights,
    reset_flags,
    reset_state,
    run,
    segment_strides,
    unit_major,
)
from .sequence_backward import _lstm_sequence_backward_kernel
from .sequence_config import sequence_backward_config

_backward = Launcher(_lstm_sequence_backward_kernel)


class Gradients(NamedTuple):
    """What `lstm_layer_backward` returns; None where not asked for. One entry per direction in the lists."""

    dx: Tensor | None  # [T, B, I]
    dh0: Tensor | None  # [D, B, H]
    dc0: Tensor  # [D, B, H]
    dw_ih: list[Tensor] | None
    dw_hh: list[Tensor] | None
    db: list[Tensor] | None
    dreset_h: Tensor | None  # [T, D, B, H]
    dreset_c: Tensor | None  # [T, D, B, H]


def _gate_major(w: Tensor) -> Tensor:
    """The inverse of `unit_major`."""
    return w.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)


@stall.names_the_kernel
def lstm_layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_states: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    directions: list[Direction],
    forward: Forward,
    segments: Segments = Segments(),
    *,
    dropout: Dropout | None = None,
    needs_dx: bool = True,
    needs_weights: bool = True,
    needs_h0: bool = True,
    needs_resets: bool = False,
    precision: str | None = None,
    stepwise: bool = False,
) -> Gradients:
    """Back through `lstm_layer_forward`.

    Args:
        dy: [T, B, D * H] of any strides; dh_n, dc_n: [D, B, H]; dc_states: [T, B, D * H], the gradient of c. None is zero.
        forward: its result, with c. Without gates all of it is time-major; they are rebuilt by GEMMs, some steps at a time.
        The rest as it was given forward.
    """
    (T, B, _), H, D = x.shape, h0.shape[2], len(directions)
    precision = matmul_precision(x.dtype, precision, recurrent=True)
    h, c, gates = forward.y if forward.h is None else forward.h, forward.c, forward.gates
    seed, p = kernel_arguments(dropout)
    time_major = is_time_major(h)
    config = plan(sequence_backward_config, T, B, H, D, x.dtype, precision, x.device, stepwise)

    dz = new_states(x, time_major, T, B, D, H, 4)
    dc0 = torch.empty((D, B, H), dtype=x.dtype, device=x.device)
    h0, c0 = aligned(h0), aligned(c0)
    dh_n = None if dh_n is None else aligned(dh_n)
    dc_n = None if dc_n is None else aligned(dc_n)
    if dc_states is not None and (dc_states.stride() != h.stride() or dc_states.data_ptr() % 16 != 0):
        dc_states = new_states(x, time_major, T, B, D * H).copy_(dc_states)
    dreset_c = new_states(x, time_major, T, B, D, H).zero_() if needs_resets else None
    flags, reset_c = reset_flags(segments.resets), reset_state(segments, segments.reset_c, h0)
    strides = (h.stride(0) // (D * H), h.stride(1) // (D * H), *((0, 0, 0) if dy is None else dy.stride()),
               *segment_strides(flags, reset_c))  # fmt: skip
    constants = (H, D, accumulator(x.dtype), precision, index_type(dz, dy), gates is not None, config.persistent,
                 config.block_b, config.block_h, config.split_k, config.block_k,
                 config.in_flight)  # fmt: skip
    weights = recurrent_weights(directions)
    state_in = dc_n
    for first, last in [(0, T)] if gates is not None else _recomputed_ranges(T):
        # The two directions run through time in opposite ways, so a range of steps is two ranges of t.
        starts = (0, 0) if gates is not None else (T - last, first)
        pieces = gates
        if pieces is None:
            pieces = _rebuilt_pre_activations(x, h0, h, directions, segments, starts, last - first, precision)
        state_out = dc0 if last == T else torch.empty_like(dc0, dtype=accumulator_dtype(dc0.dtype))
        for step, stop, dc_in, dc_out in launches(config, state_in, state_out, first, last):
            tensors = (dy, seed, dc_states, dh_n, dc_in, pieces, c, c0, *weights, flags,
                       reset_c, segments.lengths, dz, dc_out, dreset_c)  # fmt: skip
            run(_backward, config, tensors, T, B, step, stop, (*p, *starts, *strides), constants)
        state_in = state_out
        del pieces, tensors  # else what was rebuilt is held while the next is, and during the products below

    dx = dw_ih = dw_hh = db = dh0 = dreset_h = None
    with torch_matmul_precision(x.dtype, precision):
        rows = as_rows(dz.flatten(2), time_major)  # [T * B, D * 4H], unit-major
        if needs_dx:
            dx = new_states(x, time_major, T, B, x.shape[2])
            torch.mm(rows, torch.cat([unit_major(d.w_ih) for d in directions]), out=as_rows(dx, time_major))
        if needs_weights:
            inputs = _rows_within(x, segments.lengths, time_major)
            dw_ih = [_gate_major(w) for w in (rows.t() @ inputs).chunk(D)]
            db = [_gate_major(b) for b in rows.sum(0).chunk(D)]
            dw_hh = [_recurrent_weight_gradient(dz, h0, h, d, segments, time_major) for d in range(D)]
        if dreset_c is not None:
            dreset_h = torch.stack([_gradient_at_resets(dz, directions[d].w_hh, d, segments) for d in range(D)], dim=1)
            dreset_c = dreset_c.permute(0, 2, 1, 3)
        if needs_h0:
            dh0 = torch.stack([_initial_state_gradient(dz, dh_n, directions[d].w_hh, d, segments) for d in range(D)])
    return Gradients(dx, dh0, dc0, dw_ih, dw_hh, db, dreset_h, dreset_c)


def _rows_within(x: Tensor, lengths: Tensor | None, time_major: bool) -> Tensor:
    """`as_rows` of x with zeros past its rows' ends: dz is zero there, but in a product zero times NaN is NaN."""
    rows = as_rows(x, time_major)
    if lengths is None:
        return rows
    active = torch.arange(len(x), device=x.device)[:, None] < lengths
    return torch.where(as_rows(active[..., None], time_major), rows, 0.0)


def _recomputed_ranges(T: int) -> list[tuple[int, int]]:
    """Steps whose gates are held at the same time: an eighth of them, or 32 where that is more."""
    size = max(-(-T // 8), 32)
    return [(first, min(first + size, T)) for first in range(0, T, size)]


def _rebuilt_pre_activations(
    x: Tensor,
    h0: Tensor,
    y: Tensor,
    directions: list[Direction],
    segments: Segments,
    starts: tuple[int, int],
    n: int,
    precision: str,
) -> Tensor:
    """[n, B, D, H, 4]: of direction d, n steps from t = starts[d] on."""
    pieces = []
    for d, direction in enumerate(directions):
        z = pre_activations(x[starts[d] : starts[d] + n].contiguous(), [direction], precision)
        h_prev = _previous_states(h0, y, d, segments, starts[d], n)
        with torch_matmul_precision(x.dtype, precision):
            z.flatten(0, 1).flatten(1).addmm_(h_prev.flatten(0, 1), unit_major(direction.w_hh).t())
        pieces.append(z)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _cleared_before(segments: Segments, d: int, start: int, n: int) -> Tensor:
    """[n, B] whether direction d clears its state before steps t = start ... start + n - 1: `segments.resets_at` for all."""
    resets = segments.resets
    assert resets is not None
    flags = resets[start + d : start + n + d]
    if len(flags) < n:
        flags = torch.cat([flags, torch.zeros_like(resets[:1])])
    if segments.lengths is not None:
        t = torch.arange(start + d, start + n + d, device=flags.device)
        flags = flags & (t[:, None] < segments.lengths.clamp(max=len(resets)))
    return flags


def _previous_states(h0: Tensor, y: Tensor, d: int, segments: Segments, start: int, n: int) -> Tensor:
    """[n, B, H]: the h that direction d had before steps t = start ... start + n - 1."""
    T, H = y.shape[0], h0.shape[2]
    y = y[:, :, d * H : (d + 1) * H]
    # A row without steps does not use its initial state, which may be anything.
    initial = h0[d] if segments.lengths is None else torch.where((segments.lengths > 0)[:, None], h0[d], 0.0)
    at_edge = start == 0 if d == 0 else start + n == T
    if d == 0:
        h_prev = torch.cat([initial[None], y[: n - 1]]) if at_edge else y[start - 1 : start + n - 1]
    else:
        h_prev = torch.cat([y[start + 1 :], initial[None]]) if at_edge else y[start + 1 : start + n + 1]
    if segments.lengths is not None and d == 1:
        t = torch.arange(start, start + n, device=y.device)
        h_prev = torch.where((t[:, None] == segments.lengths - 1)[..., None], initial, h_prev)
    if segments.resets is not None:
        flags = _cleared_before(segments, d, start, n)[..., None]
        cleared = h_prev.new_zeros(()) if segments.reset_h is None else segments.reset_h[start : start + n, d]
        h_prev = torch.where(flags, cleared, h_prev)
    return h_prev


def _recurrent_weight_gradient(
    dz: Tensor, h0: Tensor, y: Tensor, d: int, segments: Segments, time_major: bool
) -> Tensor:
    """dW_hh [4H, H] of direction d: the sum over steps of dz_t^T h_{t-1}."""
    T, H = y.shape[0], h0.shape[2]
    dz = dz[:, :, d].flatten(2)
    if segments.resets is None and segments.lengths is None and time_major:
        # h_{t-1} is y, shifted by a step, and h0: two products instead of a copy.
        later, earlier = slice(1, T), slice(0, T - 1)
        steps, states, edge = (later, earlier, 0) if d == 0 else (earlier, later, T - 1)
        dw = dz[steps].flatten(0, 1).t() @ y[states, :, d * H : (d + 1) * H].flatten(0, 1)
        return _gate_major(dw.addmm_(dz[edge].t(), h0[d]))
    h_prev = _previous_states(h0, y, d, segments, 0, T)
    return _gate_major(dz.flatten(0, 1).t() @ h_prev.flatten(0, 1))


def _gradient_at_resets(dz: Tensor, w_hh: Tensor, d: int, segments: Segments) -> Tensor:
    """[T, B, H]: the gradient of the state that direction d was reset to, 0 where there was no reset."""
    flags = _cleared_before(segments, d, 0, dz.shape[0])
    dh = dz[:, :, d].flatten(2) @ unit_major(w_hh)
    return torch.where(flags[..., None], dh, dh.new_zeros(()))


def _initial_state_gradient(dz: Tensor, dh_n: Tensor | None, w_hh: Tensor, d: int, segments: Segments) -> Tensor:
    """dh0 [B, H] of direction d."""
    T, B = dz.shape[:2]
    if d == 0 or segments.lengths is None:
        first = dz[0 if d == 0 else T - 1, :, d]
    else:
        first = dz[(segments.lengths - 1).clamp(min=0).long(), torch.arange(B, device=dz.device), d]
    dh0 = first.flatten(1) @ unit_major(w_hh)
    if segments.resets is not None:
        dh0 = torch.where(_cleared_before(segments, d, 0 if d == 0 else T - 1, 1)[0][:, None], dh0.new_zeros(()), dh0)
    if segments.lengths is not None and dh_n is not None:
        dh0 = torch.where((segments.lengths == 0)[:, None], dh_n[d], dh0)  # a row without steps ends where it begins
    return dh0
