"""What the package computes, as functions from tensors to tensors: by the kernels, and beside them in torch.

One table for all that does not depend on which of them it is: derivatives, transforms, compilers, autocast, hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lstm_triton import RecurrentCell, operators
from lstm_triton.autograd import Operator
from lstm_triton.cells import Cell, catalogue

from . import layers, problems, segmented
from .problems import normal_from

T, B, I, H, V = 3, 2, 3, 2, 130
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Operation:
    """A function of these tensors, with cotangents of its results."""

    operator: Operator
    inputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    by: Callable[[str], Function]  # a backend -> the function
    torchs: Function | None = None  # torch's own operator, where it has one
    names: Sequence[str] = ()  # of the operator's inputs in order, where these are the function's arguments

    def run(self, *tensors: Tensor, **options) -> tuple[Tensor, ...]:
        return self.by("triton")(*tensors, **options)

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """In differentiable operations of torch, which every transform takes."""
        return self.by("reference")(*tensors)

    def draw(self, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves and cotangents."""
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in self.inputs]
        return leaves, [t.to(device, dtype, copy=True) for t in self.cotangents]

    def trained(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], **options) -> list[Tensor]:
        """Results and gradients, by the kernels."""
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = self.run(*leaves, **options)
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def _of(problem: problems.Problem, operator: Operator, by: Callable[[str], Function], torchs: Function | None = None):
    names = [name[1:] for name in problem.names[len(problem.cotangents) :]]
    return Operation(operator, problem.inputs, problem.cotangents, by, torchs, names)


def _step(step: problems.Step, operator: Operator, *sizes: int) -> Operation:
    def tupled(function: Callable, *tensors: Tensor, **options) -> tuple[Tensor, ...]:
        found = function(*tensors, **options)
        return found if isinstance(found, tuple) else (found,)

    problem = step.draw(*sizes, dtype=torch.float64)
    return _of(problem, operator, lambda of: partial(tupled, step.kernels, backend=of), partial(tupled, step.torchs))


def _layer(problem: layers.Problem) -> Operation:
    return _of(problem, operators.lstm_layer, lambda backend: layers.function(problem, backend))


def _own(cell: Cell, torchs: Function | None = None) -> Operation:
    """A layer of a cell of one's own; with masks those of one seed."""
    case = segmented.Case(T, B, I, H, cell=cell)
    drawn = segmented.draw(case, torch.device("cpu"))
    # Once, since transforms forbid the random numbers of a module's making.
    functions = {backend: segmented.function(case, drawn, backend) for backend in ("triton", "reference")}
    return Operation(operators.lstm_layer, drawn.inputs, drawn.cotangents, functions.__getitem__, torchs)


def _gru_cell() -> Operation:
    module = RecurrentCell(catalogue.gru, I, H, device="meta")
    normal = normal_from(torch.Generator(), torch.float64, "cpu")

    def by(backend: str) -> Function:
        def function(x: Tensor, h: Tensor, *weights: Tensor) -> tuple[Tensor]:
            module.backend, given = backend, dict(zip(dict(module.named_parameters()), weights))
            return (torch.func.functional_call(module, given, (x, h)),)

        return function

    inputs = [normal(*shape) for shape in ((B, I), (B, H), *(p.shape for p in module.parameters()))]
    return Operation(operators.lstm_cell, inputs, [normal(B, H)], by, lambda *tensors: (torch.gru_cell(*tensors),))


in_two_directions = partial(layers.draw, T, B, I, H, 2, torch.float64, precision=None)
cell = _step(problems.cells, operators.lstm_cell, B, I, H)
segments = in_two_directions(resets=True, reset_state="stored", lengths=True, cells=True)
OPERATIONS = {
    "cell": cell,
    "readout": _step(problems.readouts, operators.softmax_readout, 3, I, V),
    "layer": _layer(in_two_directions()),
    "layer without biases": _layer(in_two_directions(bias=False)),
    "layer with segments": _layer(
        replace(segments, resets=torch.tensor([[0, 0], [1, 0], [0, 1]]).bool(), lengths=torch.tensor([3, 2]))
    ),
    "GRU cell": _gru_cell(),
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
