"""The readout's kernels as PyTorch operators, and their autograd; built as `ops` is for the cell."""

import torch
from torch import Tensor

from . import reference
from .ops import implements, library, sees_operators

library.define("softmax_readout(Tensor h, Tensor weight, Tensor? bias, str? precision, ScalarType dtype) -> Tensor")
library.define(
    "softmax_readout_backward(Tensor dy, Tensor y, Tensor h, Tensor weight, bool[] needs, str? precision)"
    " -> (Tensor, Tensor, Tensor)"
)


@implements("softmax_readout")
def _softmax_readout(h, weight, bias, precision, dtype):
    from .kernels.readout import softmax_readout_forward

    return softmax_readout_forward(h, weight, bias, precision=precision, dtype=dtype)


@torch.library.register_fake("lstm_triton::softmax_readout", lib=library)
def _(h, weight, bias, precision, dtype):
    return h.new_empty((h.shape[0], weight.shape[0]), dtype=dtype)


@implements("softmax_readout_backward")
def _softmax_readout_backward(dy, y, h, weight, needs, precision):
    from .kernels.readout_backward import softmax_readout_backward

    grads = softmax_readout_backward(dy, y, h, weight, tuple(needs), precision=precision)
    return tuple(h.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("lstm_triton::softmax_readout_backward", lib=library)
def _(dy, y, h, weight, needs, precision):
    shapes = (h.shape, weight.shape, weight.shape[:1])
    return tuple(h.new_empty(shape if n else (0,)) for shape, n in zip(shapes, needs))


def _forward(h, *args):
    return (torch.ops.lstm_triton.softmax_readout if sees_operators(h) else _softmax_readout)(h, *args)


def _reference_backward(dy: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    # Under autocast y and dy are float32 and the others are not.
    wide = None if bias is None else bias.to(dy.dtype)
    grads = reference.softmax_readout_backward(dy, h.to(dy.dtype), weight.to(dy.dtype), wide)
    return [g.to(h.dtype) for g in grads]


class SoftmaxReadoutBackwardFunction(torch.autograd.Function):
    """The backward kernels as a function of its own: differentiating it again goes through the reference formula."""

    @staticmethod
    def forward(dy, h, weight, bias, y, needs, precision):
        backward = torch.ops.lstm_triton.softmax_readout_backward if sees_operators(h) else _softmax_readout_backward
        return backward(dy, y, h, weight, needs, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.set_materialize_grads(False)
        ctx.needs = inputs[5]

    @staticmethod
    def backward(ctx, *grads):
        wanted = [g if n else None for g, n in zip(grads, ctx.needs)]
        return (*reference.back_through(_reference_backward, wanted, ctx.saved_tensors), None, None, None)


class SoftmaxReadoutFunction(torch.autograd.Function):
    """y [B, V], differentiable: at most two launches forward and three backward."""

    @staticmethod
    def forward(h, weight, bias, precision, dtype):
        return _forward(h, weight, bias, precision, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], output)
        ctx.set_materialize_grads(False)
        ctx.precision = inputs[3]

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 5
        h, weight, bias, y = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads = SoftmaxReadoutBackwardFunction.apply(dy, h, weight, bias, y.detach(), needs, ctx.precision)
        return (*(g if n else None for g, n in zip(grads, needs)), None, None)


def softmax_readout(
    h: Tensor, weight: Tensor, bias: Tensor | None, precision: str | None, dtype: torch.dtype
) -> Tensor:
    """y [B, V] through the kernels; arguments as `kernels.readout.softmax_readout_forward`.

    Inference does not pass through autograd.
    """
    if torch.is_grad_enabled() and (
        h.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return SoftmaxReadoutFunction.apply(h, weight, bias, precision, dtype)
    return _forward(h, weight, bias, precision, dtype)
