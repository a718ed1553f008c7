"""The sizes, dtype and features of a call of an `LSTM` or a `Recurrent`, under which measurements are kept."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import casting
from .kernels.device import matmul_precision


class Shape(NamedTuple):
    """A call of an `LSTM` or a `Recurrent`, without its number of steps. precision: of recurrent products. features: "resets",
    "lengths", "cells" (states) and "packed", joined by commas. cell: the name of its equations in the kernels."""

    input_size: int
    hidden_size: int
    num_layers: int
    directions: int
    proj_size: int
    batch: int
    features: str = ""
    dtype: str = "float32"
    precision: str = "ieee"
    train: bool = False
    recompute: bool = False
    cell: str = "lstm"

    def __str__(self) -> str:
        also = [
            ("proj_size " + str(self.proj_size)) * bool(self.proj_size),
            "recompute" * self.recompute,
            self.features,
        ]
        kind = ["both directions" * (self.directions == 2), self.dtype, self.precision * (self.dtype == "float32")]
        parts = [f"B = {self.batch}", *kind, "training" if self.train else "inference", *also]
        layers = f", {self.num_layers} layers" if self.num_layers > 1 else ""
        name = "LSTM" if self.cell == "lstm" else self.cell.rpartition("_")[0]
        return f"{name}({self.input_size}, {self.hidden_size}{layers}) " + ", ".join(part for part in parts if part)


def with_numbers(sizes: Shape, x: Tensor, weights: Sequence[Tensor], precision: str | None, recompute: bool) -> Shape:
    """Complete the sizes for a call with this input and these weights, under the current autocast and gradient mode."""
    dtype = casting.dtype_of(x)
    train = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights))
    in_precision = matmul_precision(dtype, precision, recurrent=True)
    name = str(dtype).removeprefix("torch.")
    return sizes._replace(dtype=name, precision=in_precision, train=train, recompute=recompute)


def cell_of(module) -> Any:
    """Return the `cells.Cell` of a `Recurrent`; None for an LSTM."""
    return module.cell if getattr(type(module), "_has_cell", False) else None


def features(resets=None, reset_state=None, lengths=None, return_cell_states=False, return_states=False) -> str:
    """Return `Shape.features` of a call with these arguments of `LSTM.forward` or `Recurrent.forward`."""
    given = (
        ("resets", resets is not None or reset_state is not None),
        ("lengths", lengths is not None),
        ("cells", return_cell_states or return_states),
    )
    return ",".join(name for name, is_given in given if is_given)


def of_module(module, x: Tensor, features: str, B: int) -> Shape:
    """Return the shape of a call of this `LSTM`."""
    sizes = module.input_size, module.hidden_size, module.num_layers, 2 if module.bidirectional else 1, module.proj_size
    cell = cell_of(module)
    shape = Shape(*sizes, B, features, cell="lstm" if cell is None else cell.key)
    return with_numbers(shape, x, module._flat_weights, module.precision, module.recompute)


def of_call(
    module, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, **segments: Any
) -> tuple[Shape, int, torch.device]:
    """Return shape, steps and device of `LSTM.forward` with these arguments, without running it."""
    found = features(**segments)
    if isinstance(input, PackedSequence):
        x, T, B = input.data, len(input.batch_sizes), int(input.batch_sizes[0])
        found = ",".join(filter(None, (found, "packed")))
    elif input.dim() == 2:
        x, T, B = input, input.shape[0], 1
    else:
        x, T, B = input, input.shape[int(module.batch_first)], input.shape[int(not module.batch_first)]
    return of_module(module, x, found, B), T, x.device


def zero_state(module, input: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h_size, c_size = state_sizes(module)
    c = input.new_zeros(rows, batch, c_size)
    return (c if h_size == c_size else input.new_zeros(rows, batch, h_size)), c


def state_sizes(module) -> tuple[int, int]:
    """Return the sizes of h and of c, which for a cell with several states holds all of them."""
    cell = cell_of(module)
    return module.proj_size or module.hidden_size, module.hidden_size * (len(cell.states) or 1 if cell else 1)
