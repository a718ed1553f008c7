"""The reference of a layer as one operator, because traces would record its loop for one number of steps only."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import Operator
from .kernels.cell_equations import step_of
from .kernels.inputs import CellOptions, Direction, LayerGradients, Records, Segments
from .modes import is_jit_tracing


class _Inputs(NamedTuple):
    """The tensors of `kernels.inputs.LayerInputs`, with projections and without dropout."""

    x: Tensor
    h0: Tensor
    c0: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    w_ih_reverse: Tensor | None
    w_hh_reverse: Tensor | None
    b_ih_reverse: Tensor | None
    b_hh_reverse: Tensor | None
    w_hr_reverse: Tensor | None
    resets: Tensor | None
    reset_h: Tensor | None
    reset_c: Tensor | None
    lengths: Tensor | None
    masks: Tensor | None

    @property
    def directions(self) -> list[Direction]:
        forward = Direction(self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr)
        if self.w_ih_reverse is None or self.w_hh_reverse is None:
            return [forward]
        reverse = Direction(
            self.w_ih_reverse, self.w_hh_reverse, self.b_ih_reverse, self.b_hh_reverse, self.w_hr_reverse
        )
        return [forward, reverse]


class _Outputs(NamedTuple):
    y: Tensor
    h_n: Tensor
    c_n: Tensor
    c: Tensor


def _reference(inputs: _Inputs, options: CellOptions) -> tuple[Tensor, ...]:
    states, segments = (inputs.h0, inputs.c0), Segments(inputs.resets, inputs.reset_h, inputs.reset_c, inputs.lengths)
    step = step_of(options.cell)
    return reference.lstm_layer(inputs.x, *states, inputs.directions, segments, step=step, masks=inputs.masks)


def _fake(inputs: _Inputs, options: CellOptions, save: bool) -> _Outputs:
    x, h0, c0 = inputs.x, inputs.h0, inputs.c0
    (T, B), (D, _, R), H = x.shape[:2], h0.shape, c0.shape[2]
    return _Outputs(x.new_empty(T, B, D * R), h0.new_empty(h0.shape), c0.new_empty(c0.shape), x.new_empty(T, B, D * H))


_operator = Operator(
    "lstm_reference",
    Records(_Inputs, CellOptions, _Outputs, LayerGradients),
    _reference,
    fake=_fake,
)


def is_recorded() -> bool:
    """Return whether the call has to hold for other numbers of steps. ONNX has no such operator, and records the loop."""
    recorded = is_jit_tracing() or torch.compiler.is_exporting()
    return recorded and not torch.onnx.is_in_onnx_export()


def lstm_layer(
    x: Tensor,
    states: Sequence[Tensor],
    directions: Sequence[Direction],
    segments: Segments,
    cell: str,
    masks: Tensor | None,
) -> Sequence[Any]:
    """Run `reference.lstm_layer` of the cell of this name."""
    reverse = directions[1] if len(directions) == 2 else (None,) * 5
    return _operator(_Inputs._make((x, *states, *directions[0], *reverse, *segments, masks)), CellOptions(cell=cell))
