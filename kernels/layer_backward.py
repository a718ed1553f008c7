"""The backward of one LSTM layer over a whole sequence: the sequence kernel, then cuBLAS GEMMs.

One launch computes the gate gradients dz of all steps; from them one GEMM each computes dx and dW_ih, and one or two dW_hh.
Then the rows of the weight gradients are copied from the unit-major order of dz to gate-major order.
"""

from collections.abc import Collection

import torch
import triton.language as tl
from torch import Tensor

from . import cells, stall
from .device import matmul_precision, torch_products
from .input_weights import input_weights
from .inputs import CellOptions, LayerGradients, LayerInputs, LayerOptions, LayerSaved
from .launch import Launcher, accumulator_dtype
from .layer import (
    aligned,
    index_type,
    launch,
    launches,
    mark_as_absent,
    pre_activations,
    reset_state,
    sequence_plan,
    shared_arguments,
)
from .layer_gradients import gradient_at_resets, initial_state_gradient, previous_states, unit_major, weight_gradients
from .layer_step import layer_step_backward, serves
from .layout import as_rows, is_time_major, new_states
from .sequence_backward import _lstm_sequence_backward_kernel
from .sequence_config import Problem
from .specialization import features

_backward = Launcher(_lstm_sequence_backward_kernel)

# The names of the inputs that are weights.
_WEIGHTS = frozenset(name for name in LayerInputs._fields if name.startswith(("w_", "b_")))


def lstm_layer_backward(
    grads: LayerGradients,
    inputs: LayerInputs,
    saved: LayerSaved,
    needs: Collection[str],
    options: LayerOptions = LayerOptions(),
) -> dict[str, Tensor]:
    """Compute the gradients of `lstm_layer_forward`.

    Args:
        grads: tensors of any strides, or None for zero.
        inputs, options: those of the forward.
        saved: from its outputs; where it has no gates, GEMMs compute pre-activations again, some steps at a time.
        needs: the names of the inputs whose gradients are computed.

    Returns:
        These gradients by name, and perhaps others; each with memory of its own.
    """
    precision = matmul_precision(inputs.x.dtype, options.precision, recurrent=True)
    with stall.names_the_kernel, torch_products(inputs.x.dtype, precision):
        given = features(resets=inputs.resets, lengths=inputs.lengths, random=inputs.seed)
        if serves(len(inputs.x), given, saved.gates is None):
            return layer_step_backward(grads, inputs, saved, needs, CellOptions(precision, options.cell))
        saved = _dense(saved)
        needs_resets = "reset_h" in needs or "reset_c" in needs
        dz, found = _gate_gradients(grads, inputs, saved, needs_resets, options)
        x, directions, segments = inputs.x, inputs.directions, inputs.segments
        time_major = is_time_major(saved.h)
        rows = as_rows(dz.flatten(2), time_major)  # [T * B, D * 4H], unit-major
        if "x" in needs:
            found["x"] = new_states(x, time_major, *x.shape)
            w, _ = input_weights(directions, biases=False)
            torch.mm(rows, w, out=as_rows(found["x"], time_major))
        if not _WEIGHTS.isdisjoint(needs):
            found |= weight_gradients(dz, rows, inputs, saved.h, needs)
        if "reset_h" in needs:
            each = [gradient_at_resets(dz, w.w_hh, d, segments) for d, w in enumerate(directions)]
            found["reset_h"] = torch.stack(each, dim=1)
        if "h0" in needs:
            each = [initial_state_gradient(dz, grads.dh_n, w.w_hh, d, segments) for d, w in enumerate(directions)]
            found["h0"] = torch.stack(each)
        return found


def _dense(saved: LayerSaved) -> LayerSaved:
    """Return the saved tensors in one dense memory order, that of h, and time-major where there are no gates.

    The forward saves them so, but a hook on saved tensors may return any strides.
    """
    h, c, gates = saved
    if gates is None or is_time_major(h):
        return LayerSaved(h.contiguous(), c.contiguous(), None if gates is None else gates.contiguous())
    return LayerSaved(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (h, c, gates)))


def _gate_gradients(
    grads: LayerGradients, inputs: LayerInputs, saved: LayerSaved, needs_resets: bool, options: LayerOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute dz [T, B, D, H, 4] by the kernel. Returns it and the gradients of c0 and, where needed, of reset_c."""
    x, (h, c, gates), directions, segments = inputs.x, saved, inputs.directions, inputs.segments
    (T, B, _), (D, _, H), dtype, on = x.shape, inputs.h0.shape, x.dtype, x.device
    time_major = is_time_major(h)
    precision = matmul_precision(dtype, options.precision, recurrent=True)
    dz = new_states(x, time_major, T, B, D, H, 4)
    h0, c0 = aligned(inputs.h0), aligned(inputs.c0)
    dc0 = torch.empty_like(c0)
    dy, dh_n, dc_n, dc_states = grads
    dh_n = None if dh_n is None else aligned(dh_n)
    dc_n = None if dc_n is None else aligned(dc_n)
    if dc_states is not None and (dc_states.stride() != c.stride() or dc_states.data_ptr() % 16 != 0):
        dc_states = torch.empty_like(c).copy_(dc_states)
    dreset_c = torch.zeros_like(c).unflatten(2, (D, -1)) if needs_resets else None
    reset_c = reset_state(segments.resets, segments.reset_c, c0)
    index = index_type(dz, dy, c)
    found = features(
        resets=segments.resets,
        lengths=segments.lengths,
        random=inputs.seed,
        cells=dc_states,
        reset_gradients=dreset_c,
        dy=dy,
        dh_n=dh_n,
        dc_n=dc_n,
    )
    problem = Problem("backward", B, H, D, dtype, precision, options.stepwise, found, gates is None, index == tl.int64)
    problem = problem._replace(cell=options.cell)
    config = sequence_plan(problem, T, on)
    mark_as_absent(dz, config)
    stride_dy_t, stride_dy_b, stride_dy_h = (0, 0, 0) if dy is None else dy.stride()
    arguments = shared_arguments(problem, inputs, options.dropout, h, reset_c)
    arguments |= dict(dy_ptr=dy, stride_dy_t=stride_dy_t, stride_dy_b=stride_dy_b, stride_dy_h=stride_dy_h)
    arguments |= dict(dc_states_ptr=dc_states, dh_n_ptr=dh_n, c_ptr=c, c0_ptr=c0, dz_ptr=dz, dreset_c_ptr=dreset_c)
    arguments |= dict(BACKWARD=cells.backward_of(options.cell), INDEX=index, ACTIVATED=gates is not None)
    state_in, weights = dc_n, input_weights(directions) if gates is None else None
    for first, last in [(0, T)] if gates is not None else recomputed_ranges(T):
        # The two directions run through time in opposite ways, so a range of steps is two ranges of t.
        starts = (0, 0) if gates is not None else (T - last, first)
        pieces = gates
        if weights is not None:
            pieces = _rebuilt_pre_activations(inputs, weights, h0, h, starts, last - first)
        state_out = dc0 if last == T else torch.empty_like(dc0, dtype=accumulator_dtype(dc0.dtype))
        for step, stop, dc_in, dc_out in launches(config, state_in, state_out, first, last):
            steps = dict(first_step=step, last_step=stop, dc_in_ptr=dc_in, dc_out_ptr=dc_out)
            held = dict(gates_ptr=pieces, gates_t=starts[0], gates_reverse_t=starts[1])
            launch(_backward, config, on, arguments | steps | held)
        state_in = state_out
        del pieces, held  # else these pre-activations would be kept while the next are computed
    return dz, {"c0": dc0} if dreset_c is None else {"c0": dc0, "reset_c": dreset_c.permute(0, 2, 1, 3)}


def recomputed_ranges(T: int) -> list[tuple[int, int]]:
    """Return the ranges of steps whose pre-activations are kept at the same time: an eighth of T, but at least 32."""
    size = max(-(-T // 8), 32)
    return [(first, min(first + size, T)) for first in range(0, T, size)]


def _rebuilt_pre_activations(
    inputs: LayerInputs, weights: tuple[Tensor, Tensor | None], h0: Tensor, y: Tensor, starts: tuple[int, int], n: int
) -> Tensor:
    """Return pre-activations [n, B, D, H, 4]; direction d has n steps from t = starts[d] on. weights: from `input_weights`."""
    pieces = []
    for d, direction in enumerate(inputs.directions):
        w, b = weights[0].chunk(len(h0))[d], None if weights[1] is None else weights[1].chunk(len(h0))[d]
        z = pre_activations(inputs.x[starts[d] : starts[d] + n].contiguous(), w, b, 1)
        h_prev = previous_states(h0, y, d, inputs.segments, starts[d], n)
        z.flatten(0, 1).flatten(1).addmm_(h_prev.flatten(0, 1), unit_major(direction.w_hh).t())
        pieces.append(z)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
