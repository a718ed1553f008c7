"""Convert models to and from torch.nn, and weights to and from one matrix per gate."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from . import hooks
from .modules import LSTMCell, check_options

_REFUSED = torch.nn.LSTM, torch.nn.GRU  # by torch.compile
_log = logging.getLogger(__package__)


def convert(
    model: torch.nn.Module,
    *,
    precision: str | None = None,
    backend: str = "auto",
    recompute: bool = False,
    compilable: bool = False,
) -> torch.nn.Module:
    """Let this package run every torch.nn.LSTM, LSTMCell, GRU and GRUCell of a model, in place.

    Modules, their classes, parameters, hooks and state stay the same objects, so isinstance(module, torch.nn.LSTM) holds, and
    optimizers and references go on working. Classes derived from torch's, parametrized modules among them, are converted too
    unless they have a forward of their own. `print(model)` shows a backend in each converted module;
    `lstm_triton.explain(model)` says more.

    torch.compile refuses every instance of torch.nn.LSTM and torch.nn.GRU, converted or not, unless
    torch._dynamo.config.allow_rnn is set. With compilable=True they become instances of `lstm_triton.LSTM` and `GRU`, which it
    compiles.

    Args:
        model: the model, or a single module.
        precision, backend, recompute: as in `LSTM` and `LSTMCell`.
        compilable: change the class of every torch.nn.LSTM to `lstm_triton.LSTM`, and of every GRU likewise. They are then no
            longer instances of torch's classes.

    Returns:
        The model.

    Warns:
        UserWarning: a module was not converted, with the reason; or there was nothing to convert. The logger "lstm_triton"
            lists at level INFO which modules were converted now and which before. Those converted before keep their options.

    Raises:
        ValueError: unknown precision or backend.
    """
    check_options(precision, backend)
    converted, already, left = [], [], []
    for name, module in model.named_modules():
        name = f"{name or 'the module itself'} ({type(module).__name__})"
        if not hooks.is_torchs(module):
            if hooks.stands_for(module) is not None:
                already.append(name)
        elif reason := hooks.why_not(module):
            left.append(f"{name}: {reason}")
        elif compilable and isinstance(module, _REFUSED) and type(module) not in _REFUSED:
            left.append(f"{name}: torch.compile refuses its class, which compilable=True would have to change")
        else:
            hooks.mark(module, precision, backend, recompute)
            if compilable and isinstance(module, _REFUSED):
                hooks.rename(module, hooks.ours(module))
            converted.append(name)
    for verb, names in (("converted", converted), ("had been converted before", already)):
        if names:
            _log.info("%s: %s", verb, ", ".join(names))
    if not converted and not left:
        found = f"; {', '.join(already)} had been converted before" if already else ""
        warnings.warn(f"convert() found nothing to convert in {type(model).__name__}{found}", stacklevel=2)
    for text in left:
        warnings.warn(f"convert() left {text}", stacklevel=2)
    return model


def to_torch(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert` in place, so that torch runs all modules again, and return the model."""
    for module in model.modules():
        if hooks.is_marked(module):
            hooks.unmark(module)
        elif (theirs := hooks.stands_for(module)) is not None and type(module) is hooks.kind(module):
            hooks.unmark(module)
            module.__class__ = theirs
    return model


@contextlib.contextmanager
def patch(*, precision: str | None = None, backend: str = "auto", recompute: bool = False) -> Iterator[None]:
    """Convert every torch.nn.LSTM, LSTMCell, GRU and GRUCell that any code constructs inside, under any name.

    Derived classes are converted too, unless they have a forward of their own. Arguments and errors are those of `convert`.
    """
    check_options(precision, backend)
    before = [theirs.__init__ for theirs in hooks.THEIRS]

    def converting(construct):
        @functools.wraps(construct)
        def __init__(self, *args, **kwargs):
            construct(self, *args, **kwargs)
            if hooks.is_marked(self) or (hooks.is_torchs(self) and hooks.why_not(self) is None):
                hooks.mark(self, precision, backend, recompute)

        return __init__

    for theirs, construct in zip(hooks.THEIRS, before):
        theirs.__init__ = converting(construct)
    try:
        yield
    finally:
        for theirs, construct in zip(hooks.THEIRS, before):
            theirs.__init__ = construct


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
    """Make a cell from one matrix per gate, which multiplies X = X_t | H_{t-1}.

        f = sigmoid(X W_f + b_f)   u = sigmoid(X W_u + b_u)   r = sigmoid(X W_r + b_r)   X' = tanh(X W_c + b_c)
        C_t = f * C_{t-1} + u * X'   H_t = r * tanh(C_t)

    In PyTorch u is the input gate i, X' the candidate g, r the output gate o.

    Args:
        W_f, W_u, W_r, W_c: [p + n, n] for p input features and n hidden units; rows 0 ... p - 1 multiply X_t.
        b_f, b_u, b_r, b_c: [n].

    Returns:
        An `LSTMCell(p, n)` with copies of the values, in the matrices' dtype, on their device; bias_hh is zero.

    Raises:
        ValueError: shapes that do not fit. TypeError: different dtypes or devices, or a dtype that is not floating-point.
    """
    matrices, biases = (W_u, W_f, W_c, W_r), (b_u, b_f, b_c, b_r)  # in PyTorch's order i, f, g, o
    rows, n = W_f.shape if W_f.dim() == 2 else (-1, -1)
    p = rows - n
    if n < 0 or p < 0 or any(W.shape != (rows, n) for W in matrices) or any(b.shape != (n,) for b in biases):
        shapes = ", ".join(str(list(t.shape)) for t in (W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c))
        raise ValueError(f"expected four matrices [p + n, n] and four biases [n], got {shapes}")
    if any(t.dtype != W_f.dtype or t.device != W_f.device for t in (*matrices, *biases)):
        raise TypeError("the matrices and biases must have one dtype and one device")
    if not W_f.is_floating_point():
        raise TypeError(f"the matrices and biases must be of a floating-point dtype, got {W_f.dtype}")
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
    """Undo `from_gate_matrices`: return W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c of a cell, as detached copies.

    W_* are [p + n, n] and b_* [n], in the cell's dtype. The two biases of each gate are added; without biases b_* are zeros.
    """
    with torch.no_grad():
        W = torch.cat((cell.weight_ih, cell.weight_hh), dim=1)
        b = cell.bias_ih + cell.bias_hh if cell.bias else W.new_zeros(W.shape[0])
        W_u, W_f, W_c, W_r = (w.t().contiguous() for w in W.chunk(4))
        b_u, b_f, b_c, b_r = (v.clone() for v in b.chunk(4))
    return W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c
