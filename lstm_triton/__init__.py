"""lstm_triton: the LSTM for PyTorch on NVIDIA GPUs, written in Triton."""

from . import functional
from ._version import __version__
from .convert import from_gate_matrices, to_gate_matrices
from .dispatch import explain
from .environment import info
from .lstm import LSTM
from .modules import LSTMCell, SoftmaxReadout

__all__ = [
    "LSTM",
    "LSTMCell",
    "SoftmaxReadout",
    "__version__",
    "explain",
    "from_gate_matrices",
    "functional",
    "info",
    "to_gate_matrices",
]
