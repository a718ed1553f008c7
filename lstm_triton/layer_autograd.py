"""One LSTM layer through the kernels, and its autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import layer_ops, reference
from .ops import call, formula_precision, is_jit_tracing, library, takes_formula


class LSTMLayerBackwardFunction(torch.autograd.Function):
    """The backward kernels as a function of its own: differentiating it again goes through the reference."""

    @staticmethod
    def forward(
        dy, dh_n, dc_n, dc, h, c, gates, needs, directions, dropout, precision, stepwise,
        x, h0, c0, resets, reset_h, reset_c, lengths, seed, *weights,
    ):  # fmt: skip
        segments = (resets, reset_h, reset_c, lengths, seed)
        return tuple(
            layer_ops.backward(
                dy, dh_n, dc_n, dc, x, h0, c0, weights, directions, h, c, gates, segments,
                dropout, needs, precision, stepwise,
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4], *inputs[12:])
        ctx.set_materialize_grads(False)
        ctx.directions, ctx.dropout, ctx.precision = inputs[8:11]

    @staticmethod
    def backward(ctx, *grads):
        directions = ctx.directions
        *tensors, resets, reset_h, reset_c, lengths, seed = ctx.saved_tensors[:12]
        weights = ctx.saved_tensors[12:]

        def reference_backward(dy, dh_n, dc_n, dc, x, h0, c0, reset_h, reset_c, *weights):
            dy = None if dy is None else layer_ops.dropped(dy, ctx.dropout, seed)
            cotangents = (dy, dh_n, dc_n, dc)
            return reference.lstm_layer_backward(
                cotangents, x, h0, c0, reset_h, reset_c, weights, directions, resets, lengths
            )

        # What was not needed came back empty, and has no gradient.
        wanted = [g if g is None or g.numel() else None for g in grads]
        with formula_precision(tensors[4].dtype, ctx.precision, recurrent=True):
            found = reference.back_through(reference_backward, wanted, (*tensors, reset_h, reset_c, *weights))
        d_cotangents, d_inputs, (dreset_h, dreset_c), d_weights = found[:4], found[4:7], found[7:9], found[9:]
        return *d_cotangents, *(None,) * 8, *d_inputs, None, dreset_h, dreset_c, None, None, *d_weights


def _formula(directions, resets, lengths, dropout, seed):
    """`reference.lstm_layer` as a function of what has a gradient, weights flat."""

    def formula(x, h0, c0, reset_h, reset_c, *weights):
        by_direction = layer_ops.by_direction(weights, directions)
        y, *states = reference.lstm_layer(x, h0, c0, by_direction, resets, reset_h, reset_c, lengths)
        return layer_ops.dropped(y, dropout, seed), *states

    return formula


class LSTMLayerFunction(torch.autograd.Function):
    """(y, h_n, c_n, c, gates, h) of one layer, differentiable; h is y before dropout."""

    @staticmethod
    def forward(
        directions, dropout, precision, stepwise, return_cells, recompute,
        x, h0, c0, resets, reset_h, reset_c, lengths, seed, *weights,
    ):  # fmt: skip
        # Gates are rebuilt some steps at a time, which are contiguous where y is time-major. What is saved is the caller's x.
        run = x.contiguous() if recompute else x
        return layer_ops.forward(
            run, h0, c0, weights, directions, (resets, reset_h, reset_c, lengths, seed),
            dropout, precision, True, not recompute, stepwise,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, _, _, c, gates, h = output
        ctx.save_for_backward(*inputs[6:], y if inputs[13] is None else h, c, gates)
        ctx.mark_non_differentiable(*([gates, h] if inputs[4] else [c, gates, h]))
        ctx.set_materialize_grads(False)
        ctx.directions, ctx.dropout, ctx.precision, ctx.stepwise = inputs[:4]

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dc, *_):
        saved = ctx.saved_tensors
        inputs, (h, c, gates) = saved[:-3], saved[-3:]
        asked = ctx.needs_input_grad[6:]  # of inputs
        if dy is None and dh_n is None and dc_n is None and dc is None:
            return (None,) * (6 + len(asked))
        if takes_formula(dy, dh_n, dc_n, dc):
            x, h0, c0, resets, reset_h, reset_c, lengths, seed, *weights = inputs
            formula = _formula(ctx.directions, resets, lengths, ctx.dropout, seed)
            with formula_precision(x.dtype, ctx.precision, recurrent=True):
                found = reference.back_through(formula, (dy, dh_n, dc_n, dc), (x, h0, c0, reset_h, reset_c, *weights))
            found[3:3], found[6:6] = [None], [None, None]  # resets; lengths, seed
            return (None,) * 6 + tuple(g if n else None for g, n in zip(found, asked))
        weights_asked = asked[8:]
        needs = [asked[0], asked[1], asked[4] or asked[5], any(weights_asked)]
        grads = call(
            LSTMLayerBackwardFunction, dy, dh_n, dc_n, dc, h.detach(), c.detach(), gates, needs,
            ctx.directions, ctx.dropout, ctx.precision, ctx.stepwise, *inputs,
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
        found = [dx, dh0, dc0, None, dreset_h, dreset_c, None, None, *dweights]
        return (None,) * 6 + tuple(g if n else None for g, n in zip(found, asked))


def _setup_operator(ctx, inputs, output):
    x, h0, c0, weights, directions, *segments, dropout, precision, save_cells, save_gates, stepwise = inputs
    ctx.is_saved = save_cells and save_gates
    arguments = (directions, dropout, precision, stepwise, True, False, x, h0, c0, *segments, *weights)
    LSTMLayerFunction.setup_context(ctx, arguments, output)


def _operator_backward(ctx, *grads):
    if not ctx.is_saved:
        raise RuntimeError(
            "lstm_triton::lstm_layer was called without saving cells and gates and cannot be differentiated"
        )
    asked = ctx.needs_input_grad
    ctx.needs_input_grad = (*(False,) * 6, *asked[:3], *asked[5:10], *asked[3])
    dx, dh0, dc0, _, dreset_h, dreset_c, _, _, *dweights = LSTMLayerFunction.backward(ctx, *grads)[6:]
    return dx, dh0, dc0, dweights, None, None, dreset_h, dreset_c, *(None,) * 7


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
    seed: Tensor | None,
    dropout: float,
    precision: str | None,
    return_cells: bool,
    recompute: bool,
    stepwise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n, c or None) through the kernels; arguments as `kernels.layer.lstm_layer_forward`, weights flat.

    seed, dropout: of y, or None and 0.
    """
    if takes_formula():
        with formula_precision(x.dtype, precision, recurrent=True):
            formula = _formula(directions, resets, lengths, dropout, seed)
            y, h_n, c_n, c = formula(x, h0, c0, reset_h, reset_c, *weights)
        return y, h_n, c_n, c if return_cells else None
    tracing = is_jit_tracing()
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h0, c0, reset_h, reset_c, *weights)
    )
    if differentiable and not tracing:
        y, h_n, c_n, c, *_ = call(
            LSTMLayerFunction, directions, dropout, precision, stepwise, return_cells, recompute,
            x, h0, c0, resets, reset_h, reset_c, lengths, seed, *weights,
        )  # fmt: skip
    else:
        y, h_n, c_n, c, *_ = layer_ops.forward(
            x, h0, c0, weights, directions, (resets, reset_h, reset_c, lengths, seed),
            dropout, precision, return_cells or tracing, tracing, stepwise,
        )  # fmt: skip
    return y, h_n, c_n, c if return_cells else None
