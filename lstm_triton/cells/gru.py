"""`GRU` and `GRUCell`, replacements for torch.nn.GRU and torch.nn.GRUCell."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import casting, dispatch, measurements, shapes
from ..modules import check_options, is_proxy, leaf
from ..segments import check_packed
from .catalogue import gru
from .modules import Recurrent, RecurrentCell

# torch's own functions, whether or not `hooks` has wrapped them.
_torchs_gru: Any = inspect.unwrap(torch.nn.GRU.forward)
_torchs_cell: Any = inspect.unwrap(torch.nn.GRUCell.forward)


class GRU(Recurrent):
    """A replacement for torch.nn.GRU, with resets, lengths, the states of every step, and recomputation.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.GRU, with
            its parameters, initial values for a given seed, state_dict and errors.
        precision, backend, recompute: as in `LSTM`; "cudnn" follows torch's setting of precision.

    Inputs and outputs: as in torch.nn.GRU; resets, reset_state, lengths and return_states as in `Recurrent`. With
    backend="auto" torch's own kernels (on a GPU cuDNN) run a call without these, unless on a GPU precision or recompute is
    set.

    Raises as torch.nn.GRU and `Recurrent` do. It is no instance of torch.nn.GRU, because torch.compile refuses these.
    """

    cell = gru

    def __init__(
        self, *args: Any, precision: str | None = None, backend: str = "auto", recompute: bool = False, **kwargs: Any
    ) -> None:
        check_options(precision, backend)
        if backend == "cudnn" and precision is not None:
            raise ValueError("backend='cudnn' takes torch's setting of precision for a GRU, got precision too")
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        torch.nn.RNNBase.__init__(self, "GRU", *args, **kwargs)
        self.precision, self.backend, self.recompute = precision, backend, recompute

    flatten_parameters = torch.nn.RNNBase.flatten_parameters

    def extra_repr(self) -> str:
        return super().extra_repr().removeprefix("gru, ")

    def forward(self, input: Tensor | PackedSequence, hx: Any = None, **options: Any):
        if is_proxy(input):
            return leaf(self, input, hx, **options)
        if isinstance(input, PackedSequence):
            check_packed(self, input)
        x = input.data if isinstance(input, PackedSequence) else input
        is_tensor = isinstance(x, Tensor) and x.dim() > 0 and x.is_floating_point()  # else super() raises torch's error
        if not options and is_tensor and self._is_torchs(input, x):
            return _torchs_gru(self, input, hx)
        return super().forward(input, hx, **options)

    def choice(self, device: torch.device, dtype: torch.dtype, plain: bool) -> dispatch.Choice:
        """Return the backend for a call, as `Recurrent.choice`."""
        plain = plain and not (device.type == "cuda" and (self.recompute or self.precision is not None))
        found = dispatch.choose_layer(
            self.backend, device.type, dtype, dispatch.environment(device), dispatch.Call(plain, False, None)
        )
        return found if found.backend in ("torch", "cudnn") else Recurrent.choice(self, device, dtype, plain)

    def _is_torchs(self, input: Tensor | PackedSequence, x: Tensor) -> bool:
        plain = not (x.is_cuda and (self.recompute or self.precision is not None))
        T = len(input.batch_sizes) if input is not x else x.shape[int(self.batch_first and x.dim() == 3)]  # type: ignore[union-attr]
        measured = measurements.for_call(self.backend, lambda: shapes.of_call(self, input)[0], T, x.device)
        long = dispatch.is_long(T, x.device)
        chosen = dispatch.layer_backend(self.backend, x.device, x.dtype, plain, long, None, measured=measured)
        return chosen in ("torch", "cudnn")


class GRUCell(RecurrentCell):
    """A replacement for torch.nn.GRUCell, with each step in one kernel launch on NVIDIA GPUs, forward and backward.

    Args:
        input_size, hidden_size, bias, device, dtype: as in torch.nn.GRUCell, with its parameters, initial values for a given
            seed, state_dict and errors.
        precision, backend: as in `LSTMCell`.

    Inputs: input [B, I] or [I]; hx: [B, H] or [H], zeros when None.
    Outputs: h after the step, of the shape of hx. Twice differentiable.
    """

    cell = gru

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(gru, input_size, hidden_size, *args, **kwargs)

    def extra_repr(self) -> str:
        return super().extra_repr().removeprefix("gru, ")

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if is_proxy(input):
            return leaf(self, input, hx)
        if dispatch.cell_backend(self.backend, input.device, input.dtype) == "torch":
            # torch's kernel would read past the end of wrong tensors. `_parameters` does not compute a parametrized weight
            # again.
            casting.check_alike("input", input, self._parameters.items(), dtypes=False)
            if input.dim() == 1 and isinstance(hx, Tensor) and hx.dim() == 2:
                raise RuntimeError(f"hidden must have size {[self.hidden_size]}, but got {list(hx.shape)}")
            return _torchs_cell(self, input, hx)
        return super().forward(input, hx)

    def choice(self, device: torch.device, dtype: torch.dtype, plain: bool) -> dispatch.Choice:
        """Return the backend for a call, as `Recurrent.choice`."""
        found = dispatch.choose_cell(self.backend, device.type, dtype, dispatch.environment(device))
        return found if found.backend == "torch" else RecurrentCell.choice(self, device, dtype, plain)
