"""torch's own LSTM (cuDNN on a GPU) as an operator that torch.compile does not look into.

Traced, the CPU's kernel fails under aot_eager and inductor; as one operator whose backward runs it again it compiles
everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import casting
from .ops import implements, library

library.define(
    "torch_lstm(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, bool bias, int num_layers, bool train, bool bidirectional)"
    " -> (Tensor, Tensor, Tensor)"
)
library.define(
    "torch_lstm_backward(Tensor dy, Tensor dh_n, Tensor dc_n, Tensor x, Tensor h0, Tensor c0, Tensor[] weights, bool bias,"
    " int num_layers, bool bidirectional) -> Tensor[]"
)


@implements("torch_lstm")
def _torch_lstm(x, h0, c0, weights, bias, num_layers, train, bidirectional):
    results = torch._VF.lstm(x, (h0, c0), weights, bias, num_layers, 0.0, train, bidirectional, False)
    return tuple(t.contiguous() for t in results)


@torch.library.register_fake("lstm_triton::torch_lstm", lib=library)
def _(x, h0, c0, weights, bias, num_layers, train, bidirectional):
    y = x.new_empty((x.shape[0], x.shape[1], h0.shape[2] * (2 if bidirectional else 1)))
    return y, h0.new_empty(h0.shape), c0.new_empty(c0.shape)


@implements("torch_lstm_backward")
def _torch_lstm_backward(dy, dh_n, dc_n, x, h0, c0, weights, bias, num_layers, bidirectional):
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (x, h0, c0, *weights)]
        results = torch._VF.lstm(inputs[0], inputs[1:3], inputs[3:], bias, num_layers, 0.0, True, bidirectional, False)
        return [g.contiguous() for g in torch.autograd.grad(results, inputs, (dy, dh_n, dc_n))]


@torch.library.register_fake("lstm_triton::torch_lstm_backward", lib=library)
def _(dy, dh_n, dc_n, x, h0, c0, weights, bias, num_layers, bidirectional):
    return [t.new_empty(t.shape) for t in (x, h0, c0, *weights)]


class _LSTMBackwardFunction(torch.autograd.Function):
    """The backward as a Function of its own, so that differentiating it again is an error and not wrong."""

    @staticmethod
    def forward(ctx, dy, dh_n, dc_n, bias, num_layers, bidirectional, x, h0, c0, *weights):
        return tuple(
            torch.ops.lstm_triton.torch_lstm_backward(
                dy, dh_n, dc_n, x, h0, c0, weights, bias, num_layers, bidirectional
            )
        )

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("a compiled LSTM has no second derivatives; call it outside torch.compile for those")


def _save(ctx, inputs, output):
    x, h0, c0, weights, bias, num_layers, _, bidirectional = inputs
    ctx.save_for_backward(x, h0, c0, *weights)
    ctx.options = bias, num_layers, bidirectional


def _backward(ctx, dy, dh_n, dc_n):
    dx, dh0, dc0, *dweights = _LSTMBackwardFunction.apply(dy, dh_n, dc_n, *ctx.options, *ctx.saved_tensors)
    return dx, dh0, dc0, dweights, None, None, None, None


# The backward operator has no autograd of its own: it would not let torch's LSTM record one inside.
torch.library.register_autograd("lstm_triton::torch_lstm", _backward, setup_context=_save, lib=library)


def lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h_n, c_n) of torch._VF.lstm on x [T, B, I]; x batch-major in memory is run so, without a copy.

    Under autocast all are in its dtype already: torch's own would take float16 for bfloat16 on a GPU.
    """
    if casting.is_autocast(x.device.type):
        with casting.without_autocast(x.device.type):
            return lstm(x, hx, weights, bias, num_layers, dropout, train, bidirectional)
    compiling = torch.compiler.is_compiling()
    batch_first = x.stride(1) > x.stride(0) and not compiling
    x = x.transpose(0, 1) if batch_first else x

    def run(x, states, weights, layers):
        if compiling:
            return torch.ops.lstm_triton.torch_lstm(x, *states, weights, bias, layers, train, bidirectional)
        drop = dropout if layers > 1 else 0.0
        return torch._VF.lstm(x, states, weights, bias, layers, drop, train, bidirectional, batch_first)

    y, h_n, c_n = _in_steps(run, x, hx, weights, num_layers, dropout, bidirectional, compiling)
    return (y.transpose(0, 1) if batch_first else y), h_n, c_n


def packed_lstm(
    data: Tensor,
    batch_sizes: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(data of y, h_n, c_n) of torch._VF.lstm on a packed sequence."""

    def run(data, states, weights, layers):
        drop = dropout if layers > 1 else 0.0
        return torch._VF.lstm(data, batch_sizes, states, weights, bias, layers, drop, train, bidirectional)

    return _in_steps(run, data, hx, weights, num_layers, dropout, bidirectional, False)


def _in_steps(
    run, x: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor], num_layers: int, dropout: float,
    bidirectional: bool, compiling: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """run(x, states, weights, layers) for all layers at once, or one by one with torch's own dropout between them.

    One by one where a compiler has random numbers of its own, and on a GPU: cuDNN's own dropout takes its seed once in the life
    of a process, and would not give the same result for the same seed.
    """
    directions = 2 if bidirectional else 1
    step = 1 if dropout and (compiling or x.is_cuda) else num_layers
    per_layer = len(weights) // num_layers
    last = []
    for k in range(0, num_layers, step):
        rows = slice(k * directions, (k + step) * directions)
        x, *states = run(x, (hx[0][rows], hx[1][rows]), list(weights[k * per_layer : (k + step) * per_layer]), step)
        last.append(states)
        if k + step < num_layers:
            x = torch.nn.functional.dropout(x, dropout)
    h_n, c_n = last[0] if len(last) == 1 else (torch.cat(states) for states in zip(*last))
    return x, h_n, c_n
