"""The readout's kernels as PyTorch operators, and their autograd; built as `ops` is for the cell."""

import functools

import torch
from torch import Tensor

from . import reference
from .ops import (
    call,
    empty_for_none,
    formula_precision,
    implements,
    is_jit_tracing,
    library,
    sees_operators,
    takes_formula,
)

library.define("softmax_readout(Tensor h, Tensor weight, Tensor? bias, str? precision, ScalarType dtype) -> Tensor")
library.define(
    # bias is not read: differentiating once more needs it.
    "softmax_readout_backward(Tensor dy, Tensor h, Tensor weight, Tensor? bias, Tensor y, bool[] needs, str? precision)"
    " -> (Tensor, Tensor, Tensor)"
)


@functools.cache
def _launchers():
    from .kernels.readout import softmax_readout_forward
    from .kernels.readout_backward import softmax_readout_backward

    return softmax_readout_forward, softmax_readout_backward


@implements("softmax_readout")
def _softmax_readout(h, weight, bias, precision, dtype):
    launch, _ = _launchers()
    return launch(h, weight, bias, precision=precision, dtype=dtype)


@torch.library.register_fake("lstm_triton::softmax_readout", lib=library)
def _(h, weight, bias, precision, dtype):
    return h.new_empty((h.shape[0], weight.shape[0]), dtype=dtype)


def _softmax_readout_backward(dy, h, weight, bias, y, needs, precision):
    _, launch = _launchers()
    # The kernels take what was saved to be contiguous, but a hook on saved tensors may return any strides.
    return launch(dy, y.contiguous(), h, weight, tuple(needs), precision=precision)


@implements("softmax_readout_backward")
def _(dy, h, *args):
    return empty_for_none(_softmax_readout_backward(dy, h, *args), h)


@torch.library.register_fake("lstm_triton::softmax_readout_backward", lib=library)
def _(dy, h, weight, bias, y, needs, precision):
    shapes = (h.shape, weight.shape, weight.shape[:1])
    return tuple(h.new_empty(shape if n else (0,)) for shape, n in zip(shapes, needs))


def _forward(h, weight, bias, precision, dtype):
    sees = sees_operators(h, weight, bias)
    forward = torch.ops.lstm_triton.softmax_readout if sees else _softmax_readout
    return forward(h, weight, bias, precision, dtype)


def formula(h: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The reference formula, computed in `dtype`: under autocast that of the result, wider than the arguments'."""
    return reference.softmax_readout(h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _backward_formula(dy: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    wide = None if bias is None else bias.to(dy.dtype)
    grads = reference.softmax_readout_backward(dy, h.to(dy.dtype), weight.to(dy.dtype), wide)
    return [g.to(h.dtype) for g in grads]


class SoftmaxReadoutBackwardFunction(torch.autograd.Function):
    """The backward kernels as a function of its own: differentiating it again goes through the reference formula."""

    @staticmethod
    def forward(dy, h, weight, bias, y, needs, precision):
        sees = sees_operators(dy, h, weight, y)
        backward = torch.ops.lstm_triton.softmax_readout_backward if sees else _softmax_readout_backward
        return backward(dy, h, weight, bias, y, needs, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.precision = inputs[5:]

    @staticmethod
    def backward(ctx, *grads):
        wanted = [g if n else None for g, n in zip(grads, ctx.needs)]
        with formula_precision(ctx.saved_tensors[1].dtype, ctx.precision):
            found = reference.back_through(_backward_formula, wanted, ctx.saved_tensors)
        return (*found, None, None, None)


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
        h, weight, bias, y = ctx.saved_tensors
        if dy is None:
            return (None,) * 5
        needs = list(ctx.needs_input_grad[:3])
        if takes_formula(dy):
            with formula_precision(h.dtype, ctx.precision):
                grads = _backward_formula(dy, h, weight, bias)
        else:
            grads = call(SoftmaxReadoutBackwardFunction, dy, h, weight, bias, y.detach(), needs, ctx.precision)
        return (*(g if n else None for g, n in zip(grads, needs)), None, None)


# The functions above serve eager calls. A compiler sees the operators themselves, and so does an exported program.
torch.library.register_autograd(
    "lstm_triton::softmax_readout",
    SoftmaxReadoutFunction.backward,
    setup_context=SoftmaxReadoutFunction.setup_context,
    lib=library,
)
torch.library.register_autograd(
    "lstm_triton::softmax_readout_backward",
    SoftmaxReadoutBackwardFunction.backward,
    setup_context=SoftmaxReadoutBackwardFunction.setup_context,
    lib=library,
)


def softmax_readout(
    h: Tensor, weight: Tensor, bias: Tensor | None, precision: str | None, dtype: torch.dtype
) -> Tensor:
    """y [B, V] through the kernels; arguments as `kernels.readout.softmax_readout_forward`.

    Inference does not pass through autograd.
    """
    if takes_formula():
        return formula(h, weight, bias, dtype)
    differentiable = torch.is_grad_enabled() and (
        h.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if differentiable and not torch.compiler.is_compiling() and not is_jit_tracing():
        return call(SoftmaxReadoutFunction, h, weight, bias, precision, dtype)
    return _forward(h, weight, bias, precision, dtype)
