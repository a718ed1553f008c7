"""The kernels as PyTorch operators: torch.library definitions (which torch.compile and export see) and autograd.

In eager mode the launchers are called directly; the dispatcher, several microseconds a call, is passed through only where
something has to see the operator: while compiling or tracing, under a dispatch mode, with tensor subclasses or lazily negated
tensors. Where no kernel can serve (second derivatives, torch.func.vmap and jvp, forward-mode AD) the reference formula does.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import reference

library = torch.library.Library("lstm_triton", "DEF")
library.define(
    "lstm_cell(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, str? precision,"
    " bool save_gates) -> (Tensor, Tensor, Tensor)"
)
library.define(
    # b_ih and b_hh are not read: differentiating once more needs them.
    "lstm_cell_backward(Tensor? dh, Tensor? dc, Tensor x, Tensor h_prev, Tensor c_prev, Tensor w_ih, Tensor w_hh,"
    " Tensor? b_ih, Tensor? b_hh, Tensor gates, Tensor c, bool[] needs, str? precision)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def implements(name: str):
    """Register for the devices where kernels run: NVIDIA GPUs, and the CPU for Triton's interpreter."""

    def register(function):
        for key in ("CUDA", "CPU"):
            library.impl(name, function, key)
        return function

    return register


def empty_for_none(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns no None."""
    return tuple(like.new_empty(0) if t is None else t for t in results)


@functools.cache
def _launchers():
    # Imported where a kernel first runs, since elsewhere there may be no triton; and once, since an import costs on every call.
    from .kernels.cell import lstm_cell_forward
    from .kernels.cell_backward import lstm_cell_backward

    return lstm_cell_forward, lstm_cell_backward


@implements("lstm_cell")
def _lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh, precision, save_gates):
    launch, _ = _launchers()
    h, c, gates = launch(x, h, c, w_ih, w_hh, b_ih, b_hh, precision=precision, save_gates=save_gates)
    return h, c, x.new_empty(0) if gates is None else gates


@torch.library.register_fake("lstm_triton::lstm_cell", lib=library)
def _(x, h, c, w_ih, w_hh, b_ih, b_hh, precision, save_gates):
    B, H = h.shape
    return x.new_empty((B, H)), x.new_empty((B, H)), x.new_empty((B, H, 4) if save_gates else (0,))


def _lstm_cell_backward(dh, dc, x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, gates, c, needs, precision):
    _, launch = _launchers()
    # The kernel takes what was saved to be contiguous, but a hook on saved tensors may return any strides.
    gates, c = gates.contiguous(), c.contiguous()
    return launch(dh, dc, gates, x, h_prev, c_prev, c, w_ih, w_hh, tuple(needs), precision=precision)


@implements("lstm_cell_backward")
def _(dh, dc, x, *args):
    return empty_for_none(_lstm_cell_backward(dh, dc, x, *args), x)


@torch.library.register_fake("lstm_triton::lstm_cell_backward", lib=library)
def _(dh, dc, x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, gates, c, needs, precision):
    shapes = (x.shape, h_prev.shape, c_prev.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1])
    return tuple(x.new_empty(shape if n else (0,)) for shape, n in zip(shapes, needs))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace records operators: for calls with and without gradients, whichever the one recorded is."""
    return torch._C._get_tracing_state() is not None


def is_batched(t: Tensor) -> bool:
    """Whether t stands for several tensors, one for each call under torch.func.vmap."""
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            return True
        t = _functorch.get_unwrapped(t)
    return False


def sees_operators(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher has to see the operator; elsewhere a kernel may take the memory of the tensors as it is.

    It has to for compilers, torch.jit.trace, dispatch modes (fake tensors), torch.func and what it leaves behind, tensor
    subclasses, and tensors whose elements are negated when read (the imaginary part of a conjugate).
    """
    if (
        torch.compiler.is_compiling()
        or is_jit_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or _functorch.is_functorch_wrapped_tensor(t)):
            return True
    return False


def takes_formula(*gradients: Tensor | None) -> bool:
    """Whether only the reference formula can serve: under torch.func.vmap and jvp, forward-mode AD, batched gradients."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0 or any(
        g is not None and _functorch.is_legacy_batchedtensor(g) for g in gradients
    ):
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(i.key() != _functorch.TransformType.Grad for i in _functorch.get_interpreter_stack())


@functools.cache
def _with_context(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same Function in the older style, forward(ctx, ...), which torch.func does not know."""

    def forward(ctx, *args):
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), members)


def call(function: type[torch.autograd.Function], *args):
    """function.apply(*args), which on every call binds the arguments to the signature, at several times the cost of the rest.

    So in eager mode the older style serves, and where no gradient is recorded forward alone. A compiler that meets a Function
    of any number of arguments there takes it for the older style.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(*args)
    return (function if torch.compiler.is_compiling() else _with_context(function)).apply(*args)


def outside_autocast() -> contextlib.AbstractContextManager:
    """What torch computes inside keeps its dtype: arguments were cast before, and a backward may be called under autocast."""
    return torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else contextlib.nullcontext()


@contextlib.contextmanager
def formula_precision(dtype: torch.dtype, precision: str | None, *, recurrent: bool = False) -> Iterator[None]:
    """torch's own products inside, those of the reference formulas: in the dtype and precision of the kernels'."""
    from .kernels import launch

    precision = launch.matmul_precision(dtype, precision, recurrent=recurrent)
    with outside_autocast(), launch.torch_matmul_precision(dtype, precision):
        yield


def _forward(x, h, c, w_ih, w_hh, b_ih, b_hh, precision, save_gates):
    if sees_operators(x, h, c, w_ih, w_hh, b_ih, b_hh):
        return torch.ops.lstm_triton.lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh, precision, save_gates)
    return _launchers()[0](x, h, c, w_ih, w_hh, b_ih, b_hh, precision=precision, save_gates=save_gates)


class LSTMCellBackwardFunction(torch.autograd.Function):
    """The backward kernel as a function of its own, so that differentiating it again goes through the reference formula."""

    @staticmethod
    def forward(dh, dc, x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, gates, c, needs, precision):
        sees = sees_operators(dh, dc, x, h_prev, c_prev, w_ih, w_hh, gates, c)
        backward = torch.ops.lstm_triton.lstm_cell_backward if sees else _lstm_cell_backward
        return backward(dh, dc, x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, gates, c, needs, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:9])
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.precision = inputs[11:]

    @staticmethod
    def backward(ctx, *grads):
        dh, dc, *inputs = ctx.saved_tensors
        zeros = torch.zeros_like(inputs[2])
        wanted = [g if n else None for g, n in zip(grads, ctx.needs)]
        with formula_precision(zeros.dtype, ctx.precision):
            found = reference.lstm_cell_double_backward(
                wanted, (zeros if dh is None else dh, zeros if dc is None else dc, *inputs)
            )
        found[:2] = [None if t is None else g for t, g in zip((dh, dc), found)]
        return (*found, None, None, None, None)


class LSTMCellFunction(torch.autograd.Function):
    """(h, c, gates) of one timestep, differentiable, one kernel launch each way."""

    @staticmethod
    def forward(x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, precision):
        return _forward(x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, precision, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, c, gates = output
        ctx.save_for_backward(*inputs[:7], c, gates)
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.precision = inputs[7]

    @staticmethod
    def backward(ctx, dh, dc, _):
        x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, c, gates = ctx.saved_tensors
        if dh is None and dc is None:
            return (None,) * 8
        asked = ctx.needs_input_grad
        needs = [*asked[:5], asked[5] or asked[6]]
        inputs = x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh
        if takes_formula(dh, dc):
            zeros = torch.zeros_like(c)
            with formula_precision(c.dtype, ctx.precision):
                grads = reference.lstm_cell_backward(zeros if dh is None else dh, zeros if dc is None else dc, *inputs)
        else:
            grads = call(LSTMCellBackwardFunction, dh, dc, *inputs, gates, c.detach(), needs, ctx.precision)
        dx, dh_prev, dc_prev, dw_ih, dw_hh, db = (g if n else None for g, n in zip(grads, needs))
        return dx, dh_prev, dc_prev, dw_ih, dw_hh, db if asked[5] else None, db if asked[6] else None, None


def _setup_operator(ctx, inputs, output):
    LSTMCellFunction.setup_context(ctx, inputs[:8], output)
    ctx.has_gates = inputs[8]


def _operator_backward(ctx, *grads):
    if not ctx.has_gates:
        raise RuntimeError("lstm_triton::lstm_cell was called with save_gates=False and cannot be differentiated")
    return *LSTMCellFunction.backward(ctx, *grads), None


# The functions above serve eager calls. A compiler sees the operators themselves, and so does an exported program.
torch.library.register_autograd(
    "lstm_triton::lstm_cell", _operator_backward, setup_context=_setup_operator, lib=library
)
torch.library.register_autograd(
    "lstm_triton::lstm_cell_backward",
    LSTMCellBackwardFunction.backward,
    setup_context=LSTMCellBackwardFunction.setup_context,
    lib=library,
)


def lstm_cell(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    precision: str | None,
) -> tuple[Tensor, Tensor]:
    """(h, c) through the kernels; arguments as `kernels.cell.lstm_cell_forward`. Inference does not pass through autograd."""
    if takes_formula():
        return reference.lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad or h.requires_grad or c.requires_grad or w_ih.requires_grad or w_hh.requires_grad
        or (b_ih is not None and b_ih.requires_grad) or (b_hh is not None and b_hh.requires_grad)
    )  # fmt: skip
    compiling, tracing = torch.compiler.is_compiling(), is_jit_tracing()
    if differentiable and not compiling and not tracing:
        h, c, _ = call(LSTMCellFunction, x, h, c, w_ih, w_hh, b_ih, b_hh, precision)
    else:
        h, c, _ = _forward(x, h, c, w_ih, w_hh, b_ih, b_hh, precision, differentiable or tracing)
    return h, c
