"""Recurrent cells as plain torch functions, run by the kernels of the LSTM."""

from .declaration import Cell, CellError, cell
from .gru import GRU, GRUCell
from .modules import Recurrent, RecurrentCell

__all__ = ["GRU", "Cell", "CellError", "GRUCell", "Recurrent", "RecurrentCell", "cell"]
