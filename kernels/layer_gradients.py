"""Gradients of a layer's weights and initial states, from the gate gradients dz of all steps, by torch's products.

Rows of weights are unit-major in dz, 4 * unit + gate, and gate-major in the gradients, as torch has them.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from .inputs import LayerInputs, Segments
from .layout import as_rows, is_time_major


def unit_major(w: Tensor) -> Tensor:
    """Reorder rows from gate * H + unit to 4 * unit + gate."""
    return w.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


def _gate_major(w: Tensor) -> Tensor:
    """Undo `unit_major`, always as a copy, because a caller may change the gradient of one bias in place."""
    gates = w.unflatten(0, (-1, 4)).transpose(0, 1)
    return gates.clone(memory_format=torch.contiguous_format).flatten(0, 1)


def weight_gradients(
    dz: Tensor, rows: Tensor, inputs: LayerInputs, h: Tensor, needs: Collection[str]
) -> dict[str, Tensor]:
    """Compute the gradients of weights and biases of all directions. rows: dz as a matrix [T * B, D * 4H]."""
    D, segments, time_major = dz.shape[2], inputs.segments, is_time_major(h)
    x_rows = _rows_within(inputs.x, segments.lengths, time_major)
    dw_ih, db = (rows.t() @ x_rows).chunk(D), rows.sum(0).chunk(D)
    found = {}
    for d in range(D):
        suffix = "_reverse" if d else ""
        found["w_ih" + suffix] = _gate_major(dw_ih[d])
        found["w_hh" + suffix] = _recurrent_weight_gradient(dz, inputs.h0, h, d, segments, time_major)
        for name in ("b_ih" + suffix, "b_hh" + suffix):
            if name in needs:
                found[name] = _gate_major(db[d])
    return found


def _rows_within(x: Tensor, lengths: Tensor | None, time_major: bool) -> Tensor:
    """Return `as_rows` of x with zeros past each batch row's length: dz is zero there, but zero times NaN is NaN."""
    rows = as_rows(x, time_major)
    if lengths is None:
        return rows
    active = torch.arange(len(x), device=x.device)[:, None] < lengths
    return torch.where(as_rows(active[..., None], time_major), rows, 0.0)


def _cleared_before(segments: Segments, d: int, start: int, n: int) -> Tensor:
    """Return bools [n, B]: whether direction d resets before steps t = start ... start + n - 1 (`segments.resets_at`)."""
    resets = segments.resets
    assert resets is not None
    flags = resets[start + d : start + n + d]
    if len(flags) < n:
        flags = torch.cat([flags, torch.zeros_like(resets[:1])])
    if segments.lengths is not None:
        t = torch.arange(start + d, start + n + d, device=flags.device)
        flags = flags & (t[:, None] < segments.lengths.clamp(max=len(resets)))
    return flags


def previous_states(h0: Tensor, y: Tensor, d: int, segments: Segments, start: int, n: int) -> Tensor:
    """Return [n, B, H], the h of direction d before steps t = start ... start + n - 1."""
    T, H = y.shape[0], h0.shape[2]
    y = y[:, :, d * H : (d + 1) * H]
    # A batch row of length 0 does not use its initial state, which may hold anything.
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
    """Return dW_hh [4H, H] of direction d: the sum over steps of dz_t^T h_{t-1}."""
    T, H = y.shape[0], h0.shape[2]
    dz = dz[:, :, d].flatten(2)
    if segments.resets is None and segments.lengths is None and time_major:
        # h_{t-1} is y, shifted by a step, and h0. Two products avoid a copy of it.
        later, earlier = slice(1, T), slice(0, T - 1)
        steps, states, edge = (later, earlier, 0) if d == 0 else (earlier, later, T - 1)
        dw = dz[steps].flatten(0, 1).t() @ y[states, :, d * H : (d + 1) * H].flatten(0, 1)
        return _gate_major(dw.addmm_(dz[edge].t(), h0[d]))
    h_prev = previous_states(h0, y, d, segments, 0, T)
    return _gate_major(dz.flatten(0, 1).t() @ h_prev.flatten(0, 1))


def gradient_at_resets(dz: Tensor, w_hh: Tensor, d: int, segments: Segments) -> Tensor:
    """Return [T, B, H], the gradient of the h that direction d was reset to; 0 where there was no reset."""
    flags = _cleared_before(segments, d, 0, dz.shape[0])
    dh = dz[:, :, d].flatten(2) @ unit_major(w_hh)
    return torch.where(flags[..., None], dh, dh.new_zeros(()))


def initial_state_gradient(dz: Tensor, dh_n: Tensor | None, w_hh: Tensor, d: int, segments: Segments) -> Tensor:
    """Return dh0 [B, H] of direction d."""
    T, B = dz.shape[:2]
    if d == 0 or segments.lengths is None:
        first = dz[0 if d == 0 else T - 1, :, d]
    else:
        first = dz[(segments.lengths - 1).clamp(min=0).long(), torch.arange(B, device=dz.device), d]
    dh0 = first.flatten(1) @ unit_major(w_hh)
    if segments.resets is not None:
        dh0 = torch.where(_cleared_before(segments, d, 0 if d == 0 else T - 1, 1)[0][:, None], dh0.new_zeros(()), dh0)
    if segments.lengths is not None and dh_n is not None:
        dh0 = torch.where((segments.lengths == 0)[:, None], dh_n[d], dh0)  # for a batch row of length 0, h_n is h0
    return dh0
