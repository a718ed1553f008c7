"""One LSTM layer for a single step, by the kernels of the cell: one launch for each direction, forward and backward.

No program waits for another, so the products of x need no launch of their own and no memory between launches.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .cell import launch_step
from .cell_backward import lstm_cell_backward
from .inputs import (
    CellGradients,
    CellInputs,
    CellOptions,
    CellOutputs,
    CellSaved,
    LayerGradients,
    LayerInputs,
    LayerOptions,
    LayerOutputs,
    LayerSaved,
)
from .layout import new_states

# Features of a call that the kernels of a cell lack, or whose random numbers they draw differently.
_BEYOND_A_CELL = frozenset({"resets", "lengths", "random", "dropout"})


@dataclass(frozen=True)
class OneStep:
    """A plan without a `SequenceConfig`: the kernels of the cell run the layer, and `config` configures them."""

    launches: int  # one for each direction
    persistent: bool = True


def serves(T: int, features: Collection[str], recompute: bool = False) -> bool:
    """Return whether the cell kernels run a layer. features: of `Problem`. recompute: the backward has no saved gates."""
    return T == 1 and not recompute and _BEYOND_A_CELL.isdisjoint(features)


def _of_direction(inputs: LayerInputs, d: int) -> CellInputs:
    w_ih, w_hh, b_ih, b_hh, _ = inputs.directions[d]
    return CellInputs(inputs.x[0], inputs.h0[d], inputs.c0[d], w_ih, w_hh, b_ih, b_hh)


def _part(t: Tensor, D: int, d: int) -> Tensor:
    """Return direction d of [1, B, D * n] or [1, B, D, ...]: [B, n] or [B, ...]."""
    return (t if t.dim() > 3 else t.unflatten(2, (D, -1)))[0, :, d]


def layer_step_forward(inputs: LayerInputs, options: LayerOptions, precision: str, save: bool) -> LayerOutputs:
    """Run `lstm_layer_forward` where `serves` is true. precision: of the products."""
    x, (D, B, H), size = inputs.x, inputs.h0.shape, inputs.c0.shape[2]
    y, h_n, c_n = (new_states(x, True, *shape) for shape in ((1, B, D * H), (D, B, H), (D, B, size)))
    c = new_states(x, True, 1, B, D * size) if save or options.return_cells else None
    gates = new_states(x, True, 1, B, D, H, 4) if save and not options.recompute else None
    for d in range(D):
        outputs = CellOutputs(h_n[d], c_n[d], None if gates is None else _part(gates, D, d))
        once_more = _part(y, D, d), None if c is None else _part(c, D, d)
        launch_step(_of_direction(inputs, d), CellOptions(precision, options.cell), outputs, *once_more, D)
    return LayerOutputs(y, h_n, c_n, c, gates)


def layer_step_backward(
    grads: LayerGradients, inputs: LayerInputs, saved: LayerSaved, needs: Collection[str], options: CellOptions
) -> dict[str, Tensor]:
    """Run `lstm_layer_backward` where `serves` is true. options: with the precision of the products."""
    D, found, of_directions = len(inputs.h0), dict[str, Tensor](), []
    assert saved.gates is not None
    for d in range(D):
        weights = {name: name + "_reverse" * d for name in CellInputs._fields[3:-1]}
        names = {"x": "x", "h": "h0", "c": "c0", **weights}
        dh, dc = _sum(grads.dy, grads.dh_n, D, d), _sum(grads.dc, grads.dc_n, D, d)
        cell = CellSaved(_part(saved.c, D, d), _part(saved.gates, D, d))
        wanted = {name for name, of_layer in names.items() if of_layer in needs}
        each = lstm_cell_backward(CellGradients(dh, dc), _of_direction(inputs, d), cell, wanted, options)
        found |= {of_layer: each.pop(name) for name, of_layer in weights.items() if name in each}
        of_directions.append(each)
    for name in of_directions[0]:
        of_each = [each[name] for each in of_directions]
        if name == "x":
            found["x"] = (of_each[0] if D == 1 else of_each[0] + of_each[1])[None]
        else:
            found[f"{name}0"] = of_each[0][None] if D == 1 else torch.stack(of_each)
    return found


def _sum(every: Tensor | None, last: Tensor | None, D: int, d: int) -> Tensor | None:
    """Return the gradient of direction d's state: the sum of those of y or cells [1, B, D * n] and of h_n or c_n [D, B, n]."""
    if every is None:
        return None if last is None else last[d]
    return _part(every, D, d) if last is None else _part(every, D, d) + last[d]
