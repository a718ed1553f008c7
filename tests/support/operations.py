"""What the package computes, as functions from tensors to tensors: by the kernels, and beside them in torch.

One table for all that does not depend on which of them it is: derivatives, transforms, compilers, autocast, hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lstm_triton import Recurrent, RecurrentCell, functional, operators
from lstm_triton.autograd import Operator
from lstm_triton.cells import Cell, catalogue

from . import philox

T, B, I, H, V = 3, 2, 3, 2, 130
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Operation:
    """A function of tensors, of these shapes, to tensors of those shapes."""

    operator: Operator
    shapes: Sequence[tuple[int, ...]]
    results: Sequence[tuple[int, ...]]
    by: Callable[[str], Function]  # a backend -> the function
    torchs: Function | None = None  # torch's own operator, where it has one
    names: Sequence[str] = ()  # of the operator's inputs in order, where these are the function's arguments
    positive: int | None = None  # the argument that is so

    def run(self, *tensors: Tensor, **options) -> tuple[Tensor, ...]:
        return self.by("triton")(*tensors, **options)

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """In differentiable operations of torch, which every transform takes."""
        return self.by("reference")(*tensors)

    def draw(self, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves and cotangents."""
        generator = torch.Generator().manual_seed(0)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        leaves = [normal(shape) for shape in self.shapes]
        if self.positive is not None:
            leaves[self.positive].exp_()
        leaves = [t.to(device, dtype).requires_grad_() for t in leaves]
        return leaves, [normal(shape).to(device, dtype) for shape in self.results]

    def trained(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], **options) -> list[Tensor]:
        """Results and gradients, by the kernels."""
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = self.run(*leaves, **options)
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def _cell(backend: str) -> Function:
    return lambda x, h, c, *weights, **options: functional.lstm_cell(x, (h, c), *weights, backend=backend, **options)


def _readout(backend: str) -> Function:
    return lambda *inputs, **options: (functional.softmax_readout(*inputs, backend=backend, **options),)


def _layer(backend: str, weights: int = 8, segments: bool = False) -> Function:
    def layer(x: Tensor, h0: Tensor, c0: Tensor, *rest: Tensor, **options) -> tuple[Tensor, ...]:
        if segments:
            step = torch.arange(x.shape[0], device=x.device)
            row = torch.arange(x.shape[1], device=x.device)
            options = dict(resets=step[:, None] == 1 + row, lengths=x.shape[0] - row, return_cell_states=True) | options
        y, states, *cells = functional.lstm(
            x, (h0, c0), rest[:weights], reset_state=rest[weights:] or None, backend=backend, **options
        )
        return y, *states, *cells

    return layer


def _of_module(module: torch.nn.Module, n_states: int) -> Callable[[str], Function]:
    """A cell of one's own; with masks those of one seed."""
    names = [name for name, _ in module.named_parameters()]

    def by(backend: str) -> Function:
        def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            module.backend = backend
            states = rest[:n_states] if n_states > 1 else rest[0]
            with philox.seeded(2):
                found = torch.func.functional_call(module, dict(zip(names, rest[n_states:])), (x, states))
            if isinstance(module, RecurrentCell):
                return found if isinstance(found, tuple) else (found,)
            return found[0], *(found[1] if n_states > 1 else found[1:])

        return function

    return by


def _own(cell: Cell, torchs: Function | None = None, one_step: bool = False) -> Operation:
    options = dict(dtype=torch.float64, precision="ieee")
    n = 1 + len(cell.states)
    if one_step:
        module, x, rows, y = RecurrentCell(cell, I, H, **options), (B, I), (B, H), []
    else:
        module, x, rows, y = Recurrent(cell, I, H, **options), (T, B, I), (1, B, H), [(T, B, H)]
    weights = [tuple(p.shape) for p in module.parameters()]
    operator = operators.lstm_cell if one_step else operators.lstm_layer
    positive = 1 + n - 2 if "n" in cell.states else None
    return Operation(
        operator, [x, *[rows] * n, *weights], [*y, *[rows] * n], _of_module(module, n), torchs, positive=positive
    )


WEIGHTS = [(4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
STATES = [(2, B, H)] * 2
RESET_STATE = [(T, 2, B, H)] * 2
NAMES = ("w_ih", "w_hh", "b_ih", "b_hh")
LAYER = ("x", "h0", "c0", *NAMES, *(f"{name}_reverse" for name in NAMES))

cell = Operation(
    operators.lstm_cell,
    [(B, I), (B, H), (B, H), *WEIGHTS],
    [(B, H)] * 2,
    _cell,
    lambda x, h, c, *weights: torch.lstm_cell(x, (h, c), *weights),
    ("x", "h", "c", *NAMES),
)
readout = Operation(
    operators.softmax_readout,
    [(3, I), (V, I), (V,)],
    [(3, V)],
    _readout,
    lambda *inputs: (torch.nn.functional.linear(*inputs).softmax(-1),),
    ("h", "weight", "bias"),
)
layer = Operation(
    operators.lstm_layer,
    [(T, B, I), *STATES, *WEIGHTS * 2],
    [(T, B, 2 * H), *STATES],
    _layer,
    lambda x, h, c, *weights: torch._VF.lstm(x, (h, c), weights, True, 1, 0.0, True, True, False),
    LAYER,
)
without_biases = replace(
    layer,
    shapes=[(T, B, I), *STATES, *WEIGHTS[:2] * 2],
    by=lambda backend: _layer(backend, 4),
    torchs=lambda x, h, c, *weights: torch._VF.lstm(x, (h, c), weights, False, 1, 0.0, True, True, False),
    names=(),
)
segments = replace(
    layer,
    shapes=[*layer.shapes, *RESET_STATE],
    results=[*layer.results, (T, B, 2 * H)],
    by=lambda backend: _layer(backend, segments=True),
    torchs=None,
    names=(*LAYER, "reset_h", "reset_c"),
)
OPERATIONS = {
    "cell": cell,
    "readout": readout,
    "layer": layer,
    "layer without biases": without_biases,
    "layer with segments": segments,
    "GRU cell": _own(catalogue.gru, lambda *tensors: (torch.gru_cell(*tensors),), one_step=True),
    "GRU layer": _own(
        catalogue.gru, lambda x, h, *weights: torch._VF.gru(x, h, weights, True, 1, 0.0, True, False, False)
    ),
    "sLSTM layer": _own(catalogue.slstm),
    "peephole layer": _own(catalogue.peephole_lstm),
    "zoneout layer": _own(catalogue.zoneout(0.3, 0.6)),
}


def operations(*names: str) -> pytest.MarkDecorator:
    """Runs a test for these operations, or for all."""
    return pytest.mark.parametrize("operation", [pytest.param(OPERATIONS[n], id=n) for n in names or OPERATIONS])
