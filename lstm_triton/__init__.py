"""lstm_triton: the LSTM for PyTorch on NVIDIA GPUs, written in Triton."""

from . import functional
from ._version import __version__
from .convert import convert, from_gate_matrices, patch, to_gate_matrices, to_torch
from .environment import info
from .explain import explain
from .lstm import LSTM
from .modules import LSTMCell, SoftmaxReadout

__all__ = [
    "LSTM",
    "LSTMCell",
    "SoftmaxReadout",
    "__version__",
    "convert",
    "explain",
    "from_gate_matrices",
    "functional",
    "info",
    "patch",
    "to_gate_matrices",
    "to_torch",
]
