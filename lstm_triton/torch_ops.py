"""torch's own LSTM (cuDNN on a GPU) as an operator that torch.compile does not trace into.

torch's CPU kernel fails under aot_eager and inductor if it is traced. As one operator, whose backward runs it again, it
compiles everywhere.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import casting
from .kernels.device import fp32_precision
from .library import implements, library
from .modes import is_jit_tracing

_cudnn_setting = threading.RLock()


@contextlib.contextmanager
def cudnn_precision(precision: str | None) -> Iterator[None]:
    """Let cuDNN's recurrent layers compute float32 in this precision; None leaves torch's setting."""
    if precision is None:
        yield
        return
    with _cudnn_setting, fp32_precision(torch.backends.cudnn.rnn, precision):
        yield


# tensors: x, h0, c0, then the weights.
library.define(
    "torch_lstm(Tensor[] tensors, bool bias, int num_layers, bool train, bool bidirectional, str? precision)"
    " -> (Tensor, Tensor, Tensor)"
)
library.define(
    "torch_lstm_backward(Tensor[] gradients, Tensor[] tensors, bool bias, int num_layers, bool bidirectional, str? precision)"
    " -> Tensor[]"
)


@implements("torch_lstm")
def _torch_lstm(tensors, bias, num_layers, train, bidirectional, precision):
    x, h0, c0, *weights = tensors
    with cudnn_precision(precision):
        results = torch._VF.lstm(x, (h0, c0), weights, bias, num_layers, 0.0, train, bidirectional, False)
    return tuple(t.contiguous() for t in results)


@torch.library.register_fake("lstm_triton::torch_lstm", lib=library)
def _(tensors, bias, num_layers, train, bidirectional, precision):
    x, h0, c0, *_ = tensors
    y = x.new_empty((x.shape[0], x.shape[1], h0.shape[2] * (2 if bidirectional else 1)))
    return y, h0.new_empty(h0.shape), c0.new_empty(c0.shape)


@implements("torch_lstm_backward")
def _torch_lstm_backward(gradients, tensors, bias, num_layers, bidirectional, precision):
    with torch.enable_grad(), cudnn_precision(precision):
        x, h0, c0, *weights = inputs = [t.detach().requires_grad_() for t in tensors]
        results = torch._VF.lstm(x, (h0, c0), weights, bias, num_layers, 0.0, True, bidirectional, False)
        return [g.contiguous() for g in torch.autograd.grad(results, inputs, gradients)]


@torch.library.register_fake("lstm_triton::torch_lstm_backward", lib=library)
def _(gradients, tensors, bias, num_layers, bidirectional, precision):
    return [t.new_empty(t.shape) for t in tensors]


class _LSTMBackwardFunction(torch.autograd.Function):
    """The backward as a Function of its own, so that differentiating it again is an error and not wrong."""

    @staticmethod
    def forward(ctx, dy, dh_n, dc_n, options, *tensors):
        return tuple(torch.ops.lstm_triton.torch_lstm_backward([dy, dh_n, dc_n], tensors, *options))

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("a compiled LSTM has no second derivatives; call it outside torch.compile for those")


def _save(ctx, inputs, output):
    tensors, bias, num_layers, _, bidirectional, precision = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = bias, num_layers, bidirectional, precision


def _backward(ctx, dy, dh_n, dc_n):
    found = _LSTMBackwardFunction.apply(dy, dh_n, dc_n, ctx.options, *ctx.saved_tensors)
    return list(found), None, None, None, None, None


# The backward operator has no autograd of its own: it would not let torch's LSTM record one inside.
torch.library.register_autograd("lstm_triton::torch_lstm", _backward, setup_context=_save, lib=library)


class _InPrecision(torch.autograd.Function):
    """Return run(*tensors), with a backward in this precision too, because cuDNN's backward reads the setting when it runs.

    It keeps the graph that torch records of run, as long as torch would, and has no second derivatives, as cuDNN has none.
    """

    @staticmethod
    def forward(ctx, run, precision, *tensors):
        ctx.precision = precision
        with torch.enable_grad(), cudnn_precision(precision):
            ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            ctx.results = run(*ctx.inputs)
        return tuple(t.detach() for t in ctx.results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        wanted = [t for t in ctx.inputs if t.requires_grad]
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        with cudnn_precision(ctx.precision):
            found = iter(torch.autograd.grad(ctx.results, wanted, gradients, retain_graph=keep))
        return None, None, *(next(found) if t.requires_grad else None for t in ctx.inputs)


def _in_precision(run, precision: str | None, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run run(*tensors) and its backward with cuDNN's float32 products in this precision."""
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if precision is not None and recorded and torch._C._are_functorch_transforms_active():
        rnn: Any = torch.backends.cudnn.rnn
        if rnn.fp32_precision != precision:
            raise RuntimeError(
                f"under torch.func precision={precision!r} does not reach cuDNN's backward: set"
                " torch.backends.cudnn.rnn.fp32_precision to it as well, or take backend='triton'"
            )
    elif precision is not None and recorded and not is_jit_tracing():
        return _InPrecision.apply(run, precision, *tensors)
    with cudnn_precision(precision):
        return run(*tensors)


class Options(NamedTuple):
    """The options of torch's own layers. precision: of float32 products on a GPU; None for torch's setting."""

    bias: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    precision: str | None = None


def options_of(module) -> Options:
    """Return the options of torch's own kernels, with train set where gradients are enabled.

    cuDNN cannot run backward in evaluation mode. A trace has the module's mode, as torch's has: it must not depend on whether
    gradients are enabled.
    """
    train = module.training or (torch.is_grad_enabled() and not is_jit_tracing())
    dropout = module.dropout if module.training else 0.0
    return Options(module.bias, module.num_layers, dropout, train, module.bidirectional, module.precision)


def lstm(x: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, h_n, c_n) of torch._VF.lstm on x [T, B, I]; a batch-major x is not copied.

    Under autocast the tensors have its dtype already. torch's own autocast is off, because it would cast to float16 for
    bfloat16 on a GPU.
    """
    if casting.is_autocast(x.device.type):
        with casting.without_autocast(x.device.type):
            return lstm(x, hx, weights, options)
    tracing = torch.compiler.is_compiling()
    compiling = tracing and not torch.onnx.is_in_onnx_export()  # ONNX has torch's own operator
    batch_first = x.stride(1) > x.stride(0) and not tracing
    x = x.transpose(0, 1) if batch_first else x
    bias, _, dropout, train, bidirectional, precision = options
    precision = precision if _has_cudnn(x) else None

    def run(x, states, weights, layers):
        if compiling:
            return torch.ops.lstm_triton.torch_lstm(
                [x, *states, *weights], bias, layers, train, bidirectional, precision
            )

        def torchs(x, h0, c0, *weights):
            drop = dropout if layers > 1 else 0.0
            return torch._VF.lstm(x, (h0, c0), weights, bias, layers, drop, train, bidirectional, batch_first)

        return _in_precision(torchs, precision, x, *states, *weights)

    y, h_n, c_n = _in_steps(run, x, hx, weights, options, compiling)
    if not tracing:
        separate_bias_gradients(h_n)
    return (y.transpose(0, 1) if batch_first else y), h_n, c_n


def separate_bias_gradients(h_n: Tensor) -> None:
    """Clone the gradient of a bias in oneDNN's backward: if it is recorded it returns one tensor for both biases.

    h_n: [num_layers * D, B, H] of torch._VF.lstm, or [num_layers * D, H] made from that by a squeeze.
    """
    node: Any = h_n.grad_fn
    if node is None:
        return
    if h_n.dim() == 2:
        node = node.next_functions[0][0]
    for layer, _ in node.next_functions:
        if layer is not None and layer.name() == "MkldnnRnnLayerBackward0":
            layer._register_hook_dict(_when_differentiated)


def _separate_if_recorded(_) -> None:
    if torch.is_grad_enabled():
        torch._C._current_autograd_node().register_hook(_with_own_bias_gradient)


# Called before the node's backward. The hooks are shared, because new ones would cost each forward several microseconds.
_when_differentiated = torch.empty(0, requires_grad=True)
_when_differentiated.register_hook(_separate_if_recorded)


def _with_own_bias_gradient(gradients: tuple[Tensor | None, ...], _) -> tuple[Tensor | None, ...] | None:
    x, w_ih, w_hh, b_ih, b_hh, *states = gradients
    return (x, w_ih, w_hh, b_ih, b_hh.clone(), *states) if b_hh is not None and b_hh is b_ih else None


def packed_lstm(
    data: Tensor, batch_sizes: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (data of y, h_n, c_n) of torch._VF.lstm on a packed sequence."""
    bias, _, dropout, train, bidirectional, precision = options
    precision = precision if _has_cudnn(data) else None

    def run(data, states, weights, layers):
        def torchs(data, h0, c0, *weights):
            drop = dropout if layers > 1 else 0.0
            return torch._VF.lstm(data, batch_sizes, (h0, c0), weights, bias, layers, drop, train, bidirectional)

        return _in_precision(torchs, precision, data, *states, *weights)

    return _in_steps(run, data, hx, weights, options, False)


def _has_cudnn(x: Tensor) -> bool:
    """Return whether cuDNN computes x and has a choice of precision."""
    return x.is_cuda and x.dtype == torch.float32


def _in_steps(
    run, x: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor], options: Options, compiling: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run run(x, states, weights, layers) for all layers at once, or one by one with torch's own dropout between them.

    With dropout it runs them one by one if it is compiled, as compilers have their own random numbers, and on a GPU: cuDNN's
    dropout takes its seed once in a process, and would not give the same result for the same seed.
    """
    num_layers, dropout = options.num_layers, options.dropout
    directions = 2 if options.bidirectional else 1
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
