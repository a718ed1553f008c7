"""Models and weights from and to torch.nn and other notations."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .lstm import LSTM, LSTMSubclass
from .modules import LSTMCell, check_options

_OPTIONS = ("precision", "backend", "recompute")
_TORCH_LSTM, _TORCH_CELL = torch.nn.LSTM, torch.nn.LSTMCell  # also inside `patch`


def convert(
    model: torch.nn.Module,
    *,
    precision: str | None = None,
    backend: str = "auto",
    recompute: bool = False,
    subclass: bool = False,
) -> torch.nn.Module:
    """Turn every torch.nn.LSTM and torch.nn.LSTMCell of a model into this package's, in place.

    Modules, parameters, hooks and state stay the same objects, so optimizers and references to them go on working. Classes
    derived from torch's, parametrized modules among them, are left as they are.

    Args:
        model: the model, or a single module.
        precision, backend, recompute: as in `LSTM` and `LSTMCell`.
        subclass: make the LSTMs instances of torch.nn.LSTM too, for code that asks; torch.compile refuses those.

    Returns:
        The model.
    """
    check_options(precision, backend)
    for module in model.modules():
        if type(module) is _TORCH_LSTM:
            module.__class__ = LSTMSubclass if subclass else LSTM  # type: ignore[assignment]
            module.recompute = recompute
        elif type(module) is _TORCH_CELL:
            module.__class__ = LSTMCell
        else:
            continue
        module.precision, module.backend = precision, backend
    return model


def to_torch(model: torch.nn.Module) -> torch.nn.Module:
    """The inverse of `convert`, in place: plain torch.nn modules again, for scripting, export or other libraries."""
    for module in model.modules():
        if type(module) in (LSTM, LSTMSubclass, LSTMCell):
            module.__class__ = _TORCH_CELL if type(module) is LSTMCell else _TORCH_LSTM
            for name in _OPTIONS:
                module.__dict__.pop(name, None)
    return model


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """Inside, torch.nn.LSTM and torch.nn.LSTMCell are this package's: models built there use it without a change of code."""
    before = torch.nn.LSTM, torch.nn.LSTMCell
    torch.nn.LSTM, torch.nn.LSTMCell = LSTMSubclass, LSTMCell  # type: ignore[misc]
    try:
        yield
    finally:
        torch.nn.LSTM, torch.nn.LSTMCell = before  # type: ignore[misc]


def from_gate_matrices(
    W_f: Tensor,
    b_f: Tensor,
    W_u: Tensor,
    b_u: Tensor,
    W_r: Tensor,
    b_r: Tensor,
    W_c: Tensor,
    b_c: Tensor,
) -> LSTMCell:
    """A cell from the notation that concatenates X = X_t | H_{t-1} and has one matrix per gate.

        f = sigmoid(X W_f + b_f)   u = sigmoid(X W_u + b_u)   r = sigmoid(X W_r + b_r)   X' = tanh(X W_c + b_c)
        C_t = f * C_{t-1} + u * X'   H_t = r * tanh(C_t)

    so u is PyTorch's input gate i, X' its candidate g, r its output gate o.

    Args:
        W_f, W_u, W_r, W_c: [p + n, n] for p input features and n hidden units; rows 0 ... p - 1 multiply X_t.
        b_f, b_u, b_r, b_c: [n].

    Returns:
        An `LSTMCell(p, n)` with copies of the values, in the matrices' dtype, on their device; bias_hh is zero.

    Raises:
        ValueError: shapes that do not fit. TypeError: dtypes or devices that differ.
    """
    matrices, biases = (W_u, W_f, W_c, W_r), (b_u, b_f, b_c, b_r)  # in PyTorch's order i, f, g, o
    rows, n = W_f.shape if W_f.dim() == 2 else (-1, -1)
    p = rows - n
    if n < 0 or p < 0 or any(W.shape != (rows, n) for W in matrices) or any(b.shape != (n,) for b in biases):
        shapes = ", ".join(str(list(t.shape)) for t in (W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c))
        raise ValueError(f"expected four matrices [p + n, n] and four biases [n], got {shapes}")
    if any(t.dtype != W_f.dtype or t.device != W_f.device for t in (*matrices, *biases)):
        raise TypeError("the matrices and biases must have one dtype and one device")
    # Uninitialised parameters, so that building the cell draws nothing from the random number generator.
    cell = LSTMCell(p, n, device="meta", dtype=W_f.dtype).to_empty(device=W_f.device)
    with torch.no_grad():
        stacked = torch.cat([W.t() for W in matrices])
        cell.weight_ih.copy_(stacked[:, :p])
        cell.weight_hh.copy_(stacked[:, p:])
        cell.bias_ih.copy_(torch.cat(biases))
        cell.bias_hh.zero_()
    return cell


def to_gate_matrices(cell: torch.nn.LSTMCell) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inverse of `from_gate_matrices`: (W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c) of a cell, detached copies.

    The two biases of each gate are added; a cell without biases gives zeros.
    """
    with torch.no_grad():
        W = torch.cat((cell.weight_ih, cell.weight_hh), dim=1)
        b = cell.bias_ih + cell.bias_hh if cell.bias else W.new_zeros(W.shape[0])
        W_u, W_f, W_c, W_r = (w.t().contiguous() for w in W.chunk(4))
        b_u, b_f, b_c, b_r = (v.clone() for v in b.chunk(4))
    return W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c
