"""Modules: `LSTMCell`, a replacement for torch.nn.LSTMCell, and `SoftmaxReadout`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import (
    _VF,  # noqa: F401, a name in the source of torch.nn.LSTMCell.forward
    Tensor,
)

from . import dispatch, functional


def check_options(precision: str | None, backend: str) -> None:
    dispatch.check_precision(precision)
    dispatch.check_backend(backend)


def options_repr(module: torch.nn.Module) -> str:
    text = "" if module.precision is None else f", precision={module.precision!r}"
    return text + ("" if module.backend == "auto" else f", backend={module.backend!r}")


def scripted_as(source: Callable) -> Callable:
    """Return a decorator by which TorchScript compiles `source`, with this module's names, instead of the method."""

    def decorate(method: Callable) -> Callable:
        method.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        method.__wrapped__ = source  # type: ignore[attr-defined]
        return method

    return decorate


def scripted_lstm(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run torch's own kernels on a padded or an unbatched input; TorchScript compiles this in place of `LSTM.forward`."""
    if input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batch_dim = 0 if self.batch_first else 1
    x = input if input.dim() == 3 else input.unsqueeze(batch_dim)
    if hx is None:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        c = x.new_zeros(rows, x.size(batch_dim), self.hidden_size)
        hx = (c[:, :, : self.proj_size] if self.proj_size > 0 else c, c)
    elif input.dim() == 2:
        hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    self.check_forward_args(x, hx, None)
    y, h_n, c_n = torch._VF.lstm(
        x,
        hx,
        self._flat_weights,
        self.bias,
        self.num_layers,
        self.dropout,
        self.training,
        self.bidirectional,
        self.batch_first,
    )
    if input.dim() == 2:
        return y.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))
    return y, (h_n, c_n)


def is_proxy(input: object) -> bool:
    """Return whether torch.fx.symbolic_trace is recording the call."""
    return isinstance(input, torch.fx.Proxy)


def leaf(module: torch.nn.Module, input: Any, *args, **kwargs) -> Any:
    """Record the call as one node of torch.fx's graph, as for a module of torch.nn."""
    tracer: Any = input.tracer
    if module is tracer.root:
        raise torch.fx.proxy.TraceError(f"{type(module).__name__} is a leaf of torch.fx: trace a model that holds it")
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), given)


class LSTMCell(torch.nn.LSTMCell):
    """A replacement for torch.nn.LSTMCell, with each step in one kernel launch on NVIDIA GPUs, forward and backward.

    It has the constructor, parameters, initial values for a given seed, state_dict and errors of torch.nn.LSTMCell.

    Args:
        input_size, hidden_size: I and H.
        bias: whether there are biases.
        device, dtype: of the parameters.
        precision: of float32 products on a GPU: "ieee", "tf32", "tf32x3", or None for the setting of torch.backends.cuda.matmul
            ("ieee" unless you changed it), as torch.nn.LSTMCell.
        backend: "auto" (the kernels on a GPU that runs them, else torch's own; `lstm_triton.explain(cell)` says which and why),
            "triton", "reference".

    Inputs: input [B, I] or [I]; hx: (h, c), each [B, H] or [H], zeros when None.
    Outputs: (h, c) after the step, of the shapes of hx, in the dtype of the input (or of autocast). Twice differentiable.

    Raises ValueError for ranks and RuntimeError for sizes, dtypes and devices that do not fit, as torch.nn.LSTMCell does.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        precision: str | None = None,
        backend: str = "auto",
    ) -> None:
        check_options(precision, backend)
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype)
        self.precision = precision
        self.backend = backend

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self)

    @scripted_as(torch.nn.LSTMCell.forward)
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if is_proxy(input):
            return leaf(self, input, hx)
        if hx is None:
            if input.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
            zeros = torch.zeros(*input.shape[:-1], self.hidden_size, dtype=input.dtype, device=input.device)
            hx = (zeros, zeros)
        return functional.lstm_cell(
            input,
            hx,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            precision=self.precision,
            backend=self.backend,
        )


class SoftmaxReadout(torch.nn.Linear):
    """The readout Y = softmax(h W^T + b), torch.nn.Linear and torch.nn.Softmax(-1), in at most two launches on NVIDIA GPUs.

    It has the constructor, parameters, initial values for a given seed and state_dict of torch.nn.Linear.

    Args:
        in_features, out_features: H and V.
        bias: whether there is a bias.
        device, dtype: of the parameters.
        precision: of float32 products on a GPU: "ieee", "tf32", "tf32x3", or None for the setting of torch.backends.cuda.matmul
            ("ieee" unless you changed it), as torch.nn.Linear.
        backend: "auto" (the kernels on a GPU that runs them, else torch's own; `lstm_triton.explain(readout)` says which and
            why), "triton", "reference".

    Input: [..., H]. Output: [..., V], each row of which sums to 1, in the dtype of the input. Twice differentiable.

    Raises RuntimeError for ranks, sizes, dtypes and devices that do not fit, as torch.nn.Linear does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        precision: str | None = None,
        backend: str = "auto",
    ) -> None:
        check_options(precision, backend)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.precision = precision
        self.backend = backend

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript compiles only this branch
            return torch.nn.functional.linear(input, self.weight, self.bias).softmax(-1)
        elif is_proxy(input):
            return leaf(self, input)
        else:
            return functional.softmax_readout(
                input, self.weight, self.bias, precision=self.precision, backend=self.backend
            )
