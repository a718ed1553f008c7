"""lstm_triton: the LSTM for PyTorch on NVIDIA GPUs, written in Triton."""

import typing

from . import functional
from ._version import __version__
from .convert import convert, from_gate_matrices, patch, to_gate_matrices, to_torch
from .environment import info
from .explain import explain
from .lstm import LSTM
from .modules import LSTMCell, SoftmaxReadout
from .tuning import tune

if typing.TYPE_CHECKING:
    from .cells import GRU, Cell, GRUCell, Recurrent, RecurrentCell, cell

__all__ = [
    "GRU",
    "LSTM",
    "Cell",
    "GRUCell",
    "LSTMCell",
    "Recurrent",
    "RecurrentCell",
    "SoftmaxReadout",
    "__version__",
    "cell",
    "convert",
    "explain",
    "from_gate_matrices",
    "functional",
    "info",
    "patch",
    "to_gate_matrices",
    "to_torch",
    "tune",
]


def __getattr__(name: str) -> typing.Any:
    """Import the names of `cells` at their first use, because that imports torch's tracer, in about a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import cells

    return getattr(cells, name)
