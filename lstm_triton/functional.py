"""The LSTM cell, an LSTM layer and the softmax readout as functions of explicit weights."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import casting, dispatch, layers, operators, reference
from .kernels.cell_equations import probabilities_of, states_of, step_of
from .kernels.inputs import CellInputs, CellOptions, ReadoutInputs, ReadoutOptions
from .layers import lstm
from .modes import is_batched

__all__ = ["lstm", "lstm_cell", "softmax_readout"]


def lstm_cell(
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    precision: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute one LSTM timestep, as torch.nn.LSTMCell; on an NVIDIA GPU in one kernel launch forward and one backward.

    Args:
        x: [B, I], or [I] unbatched.
        hx: (h, c), each [B, H], or [H] unbatched.
        w_ih, w_hh: [4H, I] and [4H, H], gates in the order i, f, g, o; b_ih, b_hh: [4H] or None.
            All tensors have one floating-point dtype and device, and any strides; under autocast they are cast to its dtype.
        precision: of float32 products on a GPU: "ieee", "tf32", "tf32x3", or None for the setting of torch.backends.cuda.matmul
            ("ieee" unless you changed it).
        backend: "auto", "triton" (the kernels, or an error), "reference" (plain PyTorch).

    Returns:
        (h, c) after the step, of the shapes of hx, in the dtype of x (or of autocast). Twice differentiable.

    Raises:
        ValueError: x, h or c of a wrong rank; unknown precision or backend.
        RuntimeError: sizes, dtypes or devices that do not fit; a named backend that cannot run the call.
        TypeError: no tensor where one is expected.
    """
    dispatch.check_precision(precision)
    if isinstance(hx, Tensor):
        raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    _require_tensors("lstm_cell", (("w_ih", w_ih), ("w_hh", w_hh)))
    h, c = step(cell_inputs(x, hx, w_ih, w_hh, b_ih, b_hh), precision, backend)
    return (h.squeeze(0), c.squeeze(0)) if x.dim() == 1 else (h, c)


def cell_inputs(x: Tensor, hx: tuple[Tensor, Tensor], *weights: Tensor | None) -> CellInputs:
    """Return the inputs with a batch dimension, of 1 where the input has none. Raises ValueError for a wrong rank."""
    if x.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {x.dim()}D instead")
    for index, state in enumerate(hx):
        if state.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
    rows = (t.unsqueeze(0) if x.dim() == 1 else t for t in (x, *hx))
    return CellInputs(*rows, *weights)


def step(
    inputs: CellInputs, precision: str | None, backend: str, cell: str = "lstm", draws: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute (h, c) of a batch by the equations of the cell of this name. draws: whether its masks are random."""
    x = inputs.x
    chosen = dispatch.cell_backend(backend, x.device, x.dtype)
    if chosen == "torch" and cell == "lstm":
        check_cell(inputs, dtypes=False)  # torch's kernel may read past the end of tensors of wrong sizes
        return torch.lstm_cell(x, (inputs.h, inputs.c), inputs.w_ih, inputs.w_hh, inputs.b_ih, inputs.b_hh)
    if casting.is_autocast(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        inputs = CellInputs._make(None if t is None else casting.cast(t, dtype) for t in inputs)
    check_cell(inputs, states=states_of(cell))
    seed = layers.random_seed(x) if draws and chosen == "triton" else None
    if chosen in ("reference", "torch") or (seed is not None and is_batched(seed)):
        of_cell = step_of(cell)
        if of_cell is not None and draws:
            masks = layers.random_masks(inputs.x, probabilities_of(cell), inputs.h.shape)
            of_cell = functools.partial(of_cell, masks=masks)
        x, h, c, w_ih, w_hh, b_ih, b_hh, _ = inputs
        return reference.lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh, of_cell)
    h, c, _ = operators.lstm_cell(inputs._replace(seed=seed), CellOptions(precision, cell))
    return h, c


def _require_tensors(function: str, arguments: Iterable[tuple[str, object]]) -> None:
    for name, t in arguments:
        if not isinstance(t, Tensor):
            raise TypeError(f"{function}(): argument {name!r} must be Tensor, not {type(t).__name__}")


def check_cell(inputs: CellInputs, dtypes: bool = True, states: int = 1) -> None:
    """Check the arguments in one pass; the first wrong one raises with torch's own message."""
    x, h, c, w_ih, w_hh, b_ih, b_hh, _ = inputs
    B, I = x.shape
    H = w_hh.shape[-1]
    dtype, device = x.dtype, x.device
    if w_ih.shape != (4 * H, I) or h.shape != (B, H) or c.shape != (B, states * H) or w_hh.shape != (4 * H, H):
        _raise_cell_sizes(inputs)
    for t in inputs:
        if t is not None and ((dtypes and t.dtype != dtype) or t.device != device):
            casting.check_alike("input", x, inputs._asdict().items(), dtypes)
    for b in (b_ih, b_hh):
        if b is not None and b.shape != (4 * H,):
            name = "b_ih" if b is b_ih else "b_hh"
            raise RuntimeError(f"{name} must have size 4 * hidden_size = {4 * H}, but got {list(b.shape)}")


def _raise_cell_sizes(inputs: CellInputs) -> None:
    x, h, c, w_ih, w_hh, *biases, _ = inputs
    (B, I), H = x.shape, w_hh.shape[-1]
    for name, w in (("weight_ih", w_ih), ("weight_hh", w_hh)):
        if w.dim() != 2:
            raise RuntimeError(f"{name} must be 2D, got {w.dim()}D instead")
    if I != w_ih.shape[1] or any(state.shape[:2] != (B, H) for state in (h, c)):
        # Let this version of torch raise its own message: it checks sizes before it computes.
        meta: Any = [None if t is None else t.detach().to("meta") for t in (x, h, c, w_ih, w_hh, *biases)]
        torch.lstm_cell(meta[0], meta[1:3], *meta[3:])
    for index, state in enumerate((h, c)):
        if state.shape != (B, H):
            raise RuntimeError(f"hidden{index} must have size {[B, H]}, but got {list(state.shape)}")
    name, w = ("weight_ih", w_ih) if w_ih.shape[0] != 4 * H else ("weight_hh", w_hh)
    raise RuntimeError(f"{name} first dim must be 4 * hidden_size = {4 * H}, but got {w.shape[0]}")


def softmax_readout(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(h W^T + b), as torch.softmax(torch.nn.functional.linear(h, weight, bias), -1).

    On an NVIDIA GPU this takes at most two kernel launches and no other tensor of the result's size; logits are in float32.

    Args:
        h: [..., H].
        weight: [V, H]; bias: [V] or None. All tensors have one floating-point dtype and device, and any strides; under autocast
            they are cast to its dtype.
        precision: of float32 products on a GPU: "ieee", "tf32", "tf32x3", or None for the setting of torch.backends.cuda.matmul
            ("ieee" unless you changed it).
        backend: "auto", "triton" (the kernels, or an error), "reference" (plain PyTorch).

    Returns:
        y: [..., V], each row of which sums to 1, in the dtype of h; in float32 under autocast on a GPU, as torch's
        softmax. A row with a NaN, or whose largest logit is infinite, is NaN. Twice differentiable.

    Raises:
        ValueError: unknown precision or backend.
        RuntimeError: ranks, sizes, dtypes or devices that do not fit; a named backend that cannot run the call.
        TypeError: no tensor where one is expected.
    """
    dispatch.check_precision(precision)
    _require_tensors("softmax_readout", (("h", h), ("weight", weight)))
    chosen = dispatch.readout_backend(backend, h.device, h.dtype)
    if chosen == "torch":
        casting.check_alike("h", h, (("weight", weight), ("bias", bias)), dtypes=False)
        return torch.softmax(torch.nn.functional.linear(h, weight, bias), -1)
    dtype = h.dtype
    device_type = h.device.type
    if casting.is_autocast(device_type):
        autocast_dtype = torch.get_autocast_dtype(device_type)
        h, weight = casting.cast(h, autocast_dtype), casting.cast(weight, autocast_dtype)
        bias = None if bias is None else casting.cast(bias, autocast_dtype)
        dtype = torch.float32 if device_type == "cuda" and h.dtype != torch.float64 else h.dtype
    _check_readout(h, weight, bias)
    options = ReadoutOptions(precision, dtype)
    if chosen == "reference":
        return operators.softmax_readout.reference(ReadoutInputs(h, weight, bias), options)[0]
    V, H = weight.shape
    rows = h.reshape(math.prod(h.shape[:-1]), H)
    (y,) = operators.softmax_readout(ReadoutInputs(rows, weight, bias), options)
    return y.view(*h.shape[:-1], V)


def _check_readout(h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the arguments; the first wrong one raises as torch.nn.functional.linear does."""
    if h.dim() == 0 or weight.dim() != 2:
        raise RuntimeError(f"h must be [..., H] and weight [V, H], but they are {h.dim()}D and {weight.dim()}D")
    if h.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"h and weight shapes cannot be multiplied: {list(h.shape)} and {list(weight.shape)}")
    casting.check_alike("h", h, (("weight", weight), ("bias", bias)))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"bias must have size {weight.shape[0]}, but got {list(bias.shape)}")
