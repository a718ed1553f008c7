"""One LSTM layer as PyTorch operators, and its autograd; built as `ops` is for the cell."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import call, formula_precision, implements, is_jit_tracing, library, sees_operators, takes_formula

_SEGMENTS = "Tensor? resets, Tensor? reset_h, Tensor? reset_c, Tensor? lengths"
library.define(
    f"lstm_layer(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, int directions, {_SEGMENTS}, str? precision,"
    " bool save_cells, bool save_gates, bool stepwise) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "lstm_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor h0, Tensor c0, Tensor[] weights,"
    f" int directions, Tensor y, Tensor c, Tensor gates, {_SEGMENTS}, bool[] needs, str? precision, bool stepwise) -> Tensor[]"
)


def _by_direction(weights: Sequence[Tensor], directions: int) -> list[tuple[Any, ...]]:
    """[w_ih, w_hh] or [w_ih, w_hh, b_ih, b_hh] of each direction, one after the other -> four of each."""
    n = len(weights) // directions
    return [(*weights[d * n : (d + 1) * n], *(None,) * (4 - n)) for d in range(directions)]


# Hooks on saved tensors and callers of the operators may give any strides, the kernels do not take all of them.


def _segments(resets, reset_h, reset_c, lengths):
    from .kernels.layer import Segments

    reset_h, reset_c = (s if s is None or s.stride(3) == 1 else s.contiguous() for s in (reset_h, reset_c))
    return Segments(resets, reset_h, reset_c, None if lengths is None else lengths.contiguous())


def _forward_results(y, h_n, c_n, c, gates):
    """All dense in one memory order, that of y; time-major where the gates are to be rebuilt."""
    from .kernels.layer import Forward, is_time_major

    gates = gates if gates.numel() else None
    if gates is None or is_time_major(y):
        return Forward(y.contiguous(), h_n, c_n, c.contiguous(), None if gates is None else gates.contiguous())
    y, c, gates = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (y, c, gates))
    return Forward(y, h_n, c_n, c, gates)


def _new_like_input(x: Tensor, size: int) -> Tensor:
    """[T, B, size] in the memory order that the kernels give their results: that of x forward, of y backward."""
    T, B = x.shape[:2]
    if x.stride(0) >= x.stride(1) or T == 1 or B == 1:
        return x.new_empty((T, B, size))
    return x.new_empty((B, T, size)).transpose(0, 1)


@implements("lstm_layer")
def _lstm_layer(
    x, h0, c0, weights, directions, resets, reset_h, reset_c, lengths, precision, save_cells, save_gates, stepwise
):
    from .kernels import layer

    forward = layer.lstm_layer_forward(
        x,
        h0,
        c0,
        [layer.Direction(*w) for w in _by_direction(weights, directions)],
        _segments(resets, reset_h, reset_c, lengths),
        precision=precision,
        save_cells=save_cells,
        save_gates=save_gates,
        stepwise=stepwise,
    )
    return (*forward[:3], *(x.new_empty(0) if t is None else t for t in forward[3:]))


@torch.library.register_fake("lstm_triton::lstm_layer", lib=library)
def _(x, h0, c0, weights, directions, resets, reset_h, reset_c, lengths, precision, save_cells, save_gates, stepwise):
    H = h0.shape[2]
    states = [_new_like_input(x, directions * H) if n else x.new_empty(0) for n in (True, save_cells)]
    gates = _new_like_input(x, directions * H * 4).unflatten(2, (directions, H, 4)) if save_gates else x.new_empty(0)
    return states[0], h0.new_empty(h0.shape), c0.new_empty(c0.shape), states[1], gates


@implements("lstm_layer_backward")
def _lstm_layer_backward(
    dy, dh_n, dc_n, dc, x, h0, c0, weights, directions, y, c, gates, resets, reset_h, reset_c, lengths,
    needs, precision, stepwise,
):  # fmt: skip
    from .kernels import layer, layer_backward

    needs_dx, needs_states, needs_resets, needs_weights = needs
    grads = layer_backward.lstm_layer_backward(
        dy, dh_n, dc_n, dc, x, h0, c0,
        [layer.Direction(*w) for w in _by_direction(weights, directions)],
        _forward_results(y, h0, c0, c, gates),
        _segments(resets, reset_h, reset_c, lengths),
        needs_dx=needs_dx, needs_weights=needs_weights, needs_h0=needs_states, needs_resets=needs_resets,
        precision=precision, stepwise=stepwise,
    )  # fmt: skip
    results: list[Tensor | None] = [grads.dx, grads.dh0, grads.dc0, grads.dreset_h, grads.dreset_c]
    if grads.dw_ih is not None and grads.dw_hh is not None and grads.db is not None:
        for of_direction in zip(grads.dw_ih, grads.dw_hh, grads.db):
            results += of_direction
    return [x.new_empty(0) if t is None else t for t in results]


@torch.library.register_fake("lstm_triton::lstm_layer_backward", lib=library)
def _(
    dy, dh_n, dc_n, dc, x, h0, c0, weights, directions, y, c, gates, resets, reset_h, reset_c, lengths,
    needs, precision, stepwise,
):  # fmt: skip
    needs_dx, needs_states, needs_resets, needs_weights = needs
    (T, B, I), (D, _, H) = x.shape, h0.shape
    y = y if gates.dim() > 1 else y.contiguous()  # as in `_forward_results`
    none = (0,)
    reset = (T, D, B, H)
    results = [
        _new_like_input(y, I) if needs_dx else x.new_empty(none),
        x.new_empty(h0.shape if needs_states else none),
    ]
    results += [x.new_empty(c0.shape), x.new_empty(reset if needs_resets else none)]
    results += [
        _new_like_input(y, D * H).unflatten(2, (D, H)).permute(0, 2, 1, 3) if needs_resets else x.new_empty(none)
    ]
    if needs_weights:
        results += [x.new_empty(shape) for _ in range(D) for shape in ((4 * H, I), (4 * H, H), (4 * H,))]
    return results


def _forward(x, h0, c0, weights, directions, resets, reset_h, reset_c, lengths, *options):
    sees = sees_operators(x, h0, c0, *weights, resets, reset_h, reset_c, lengths)
    forward = torch.ops.lstm_triton.lstm_layer if sees else _lstm_layer
    return forward(x, h0, c0, weights, directions, resets, reset_h, reset_c, lengths, *options)


class LSTMLayerBackwardFunction(torch.autograd.Function):
    """The backward kernels as a function of its own: differentiating it again goes through the reference."""

    @staticmethod
    def forward(
        dy, dh_n, dc_n, dc, y, c, gates, needs, directions, precision, stepwise,
        x, h0, c0, resets, reset_h, reset_c, lengths, *weights,
    ):  # fmt: skip
        sees = sees_operators(
            dy, dh_n, dc_n, dc, y, c, gates, x, h0, c0, resets, reset_h, reset_c, lengths, *weights
        )  # fmt: skip
        backward = torch.ops.lstm_triton.lstm_layer_backward if sees else _lstm_layer_backward
        return tuple(
            backward(
                dy, dh_n, dc_n, dc, x, h0, c0, weights, directions, y, c, gates, resets, reset_h, reset_c, lengths,
                needs, precision, stepwise,
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4], *inputs[11:])
        ctx.set_materialize_grads(False)
        ctx.directions, ctx.precision = inputs[8:10]

    @staticmethod
    def backward(ctx, *grads):
        directions = ctx.directions
        *tensors, resets, reset_h, reset_c, lengths = ctx.saved_tensors[:11]
        weights = ctx.saved_tensors[11:]

        def reference_backward(dy, dh_n, dc_n, dc, x, h0, c0, reset_h, reset_c, *weights):
            cotangents = (dy, dh_n, dc_n, dc)
            return reference.lstm_layer_backward(
                cotangents, x, h0, c0, reset_h, reset_c, weights, directions, resets, lengths
            )

        # What was not needed came back empty, and has no gradient.
        wanted = [g if g is None or g.numel() else None for g in grads]
        with formula_precision(tensors[4].dtype, ctx.precision, recurrent=True):
            found = reference.back_through(reference_backward, wanted, (*tensors, reset_h, reset_c, *weights))
        d_cotangents, d_inputs, (dreset_h, dreset_c), d_weights = found[:4], found[4:7], found[7:9], found[9:]
        return *d_cotangents, *(None,) * 7, *d_inputs, None, dreset_h, dreset_c, None, *d_weights


def _formula(directions, resets, lengths):
    """`reference.lstm_layer` as a function of what has a gradient, weights flat."""

    def formula(x, h0, c0, reset_h, reset_c, *weights):
        return reference.lstm_layer(x, h0, c0, _by_direction(weights, directions), resets, reset_h, reset_c, lengths)

    return formula


class LSTMLayerFunction(torch.autograd.Function):
    """(y, h_n, c_n, c, gates) of one layer, differentiable."""

    @staticmethod
    def forward(
        directions, precision, stepwise, return_cells, recompute, x, h0, c0, resets, reset_h, reset_c, lengths, *weights
    ):
        # Gates are rebuilt some steps at a time, which are contiguous where y is time-major. What is saved is the caller's x.
        run = x.contiguous() if recompute else x
        return _forward(
            run, h0, c0, weights, directions, resets, reset_h, reset_c, lengths, precision, True, not recompute, stepwise
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, _, _, c, gates = output
        ctx.save_for_backward(*inputs[5:], y, c, gates)
        ctx.mark_non_differentiable(*([gates] if inputs[3] else [c, gates]))
        ctx.set_materialize_grads(False)
        ctx.directions, ctx.precision, ctx.stepwise = inputs[:3]

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dc, _):
        saved = ctx.saved_tensors
        inputs, (y, c, gates) = saved[:-3], saved[-3:]
        asked = ctx.needs_input_grad[5:]  # of inputs
        if dy is None and dh_n is None and dc_n is None and dc is None:
            return (None,) * (5 + len(asked))
        if takes_formula(dy, dh_n, dc_n, dc):
            x, h0, c0, resets, reset_h, reset_c, lengths, *weights = inputs
            formula = _formula(ctx.directions, resets, lengths)
            with formula_precision(x.dtype, ctx.precision, recurrent=True):
                found = reference.back_through(formula, (dy, dh_n, dc_n, dc), (x, h0, c0, reset_h, reset_c, *weights))
            found[3:3], found[6:6] = [None], [None]  # resets, lengths
            return (None,) * 5 + tuple(g if n else None for g, n in zip(found, asked))
        weights_asked = asked[7:]
        needs = [asked[0], asked[1], asked[4] or asked[5], any(weights_asked)]
        grads = call(
            LSTMLayerBackwardFunction, dy, dh_n, dc_n, dc, y.detach(), c.detach(), gates, needs,
            ctx.directions, ctx.precision, ctx.stepwise, *inputs,
        )  # fmt: skip
        dx, dh0, dc0, dreset_h, dreset_c = grads[:5]
        dweights = []
        if needs[3]:
            with_bias = len(weights_asked) == 4 * ctx.directions
            for d in range(ctx.directions):
                dw_ih, dw_hh, db = grads[5 + 3 * d : 8 + 3 * d]
                dweights += [dw_ih, dw_hh, db, db] if with_bias else [dw_ih, dw_hh]
        else:
            dweights = [None] * len(weights_asked)
        found = [dx, dh0, dc0, None, dreset_h, dreset_c, None, *dweights]
        return (None,) * 5 + tuple(g if n else None for g, n in zip(found, asked))


def _setup_operator(ctx, inputs, output):
    x, h0, c0, weights, directions, *segments, precision, save_cells, save_gates, stepwise = inputs
    ctx.is_saved = save_cells and save_gates
    arguments = (directions, precision, stepwise, True, False, x, h0, c0, *segments, *weights)
    LSTMLayerFunction.setup_context(ctx, arguments, output)


def _operator_backward(ctx, *grads):
    if not ctx.is_saved:
        raise RuntimeError(
            "lstm_triton::lstm_layer was called without saving cells and gates and cannot be differentiated"
        )
    asked = ctx.needs_input_grad
    ctx.needs_input_grad = (*(False,) * 5, *asked[:3], *asked[5:9], *asked[3])
    dx, dh0, dc0, _, dreset_h, dreset_c, _, *dweights = LSTMLayerFunction.backward(ctx, *grads)[5:]
    return dx, dh0, dc0, dweights, None, None, dreset_h, dreset_c, None, None, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "an exported or compiled LSTM layer has no second derivatives; call it outside torch.compile for those"
    )


# The functions above serve eager calls. Exported and some compiled programs call the operators themselves.
torch.library.register_autograd(
    "lstm_triton::lstm_layer", _operator_backward, setup_context=_setup_operator, lib=library
)
torch.library.register_autograd("lstm_triton::lstm_layer_backward", _no_second_derivative, lib=library)


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    lengths: Tensor | None,
    precision: str | None,
    return_cells: bool,
    recompute: bool,
    stepwise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n, c or None) through the kernels; arguments as `kernels.layer.lstm_layer_forward`, weights flat."""
    if takes_formula():
        with formula_precision(x.dtype, precision, recurrent=True):
            y, h_n, c_n, c = _formula(directions, resets, lengths)(x, h0, c0, reset_h, reset_c, *weights)
        return y, h_n, c_n, c if return_cells else None
    tracing = is_jit_tracing()
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h0, c0, reset_h, reset_c, *weights)
    )
    if differentiable and not tracing:
        y, h_n, c_n, c, _ = call(
            LSTMLayerFunction, directions, precision, stepwise, return_cells, recompute,
            x, h0, c0, resets, reset_h, reset_c, lengths, *weights,
        )  # fmt: skip
    else:
        y, h_n, c_n, c, _ = _forward(
            x, h0, c0, weights, directions, resets, reset_h, reset_c, lengths, precision,
            return_cells or tracing, tracing, stepwise,
        )  # fmt: skip
    return y, h_n, c_n, c if return_cells else None
