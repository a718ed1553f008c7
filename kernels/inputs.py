"""The NamedTuples that launchers take and return: flat, as operators and autograd need them. This module needs no triton."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Nothing(NamedTuple):
    """Nothing is saved: the backward takes the operator's inputs alone."""


class Records(NamedTuple):
    """The types of an operator's arguments and results.

    inputs: its tensors. options: its other arguments. outputs: tensors. gradients: those of the first outputs, which are the
    differentiable ones. saved: the outputs that the backward takes.
    """

    inputs: Any
    options: Any
    outputs: Any
    gradients: Any
    saved: Any = Nothing


# ---- the cell: [B, I] and [B, H] -------------------------------------------------------------------------------------


class CellInputs(NamedTuple):
    """x [B, I]; h [B, H] and c [B, STATES * H] before the step; w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H] or None.

    STATES, the number of states per unit, is 1 for the LSTM; `interleave` has their order. seed: [1] int64, seed of the cell's
    masks, or None for their expectations.
    """

    x: Tensor
    h: Tensor
    c: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    seed: Tensor | None = None


class CellOptions(NamedTuple):
    """precision: of float32 products, "ieee", "tf32", "tf32x3", or None for torch's setting. cell: its name."""

    precision: str | None = None
    cell: str = "lstm"


class CellOutputs(NamedTuple):
    """h and c after the step, as in `CellInputs`; gates [B, H, 4] (i, f, g, o innermost), or None where no backward follows."""

    h: Tensor
    c: Tensor
    gates: Tensor | None


class CellGradients(NamedTuple):
    """The gradients of h and c; None stands for zero."""

    dh: Tensor | None
    dc: Tensor | None


class CellSaved(NamedTuple):
    """The part of `CellOutputs` that the backward needs."""

    c: Tensor
    gates: Tensor


CELL = Records(CellInputs, CellOptions, CellOutputs, CellGradients, CellSaved)

# ---- a layer over a sequence, in D directions: [T, B, ...] -----------------------------------------------------------


class Direction(NamedTuple):
    """The weights of one direction: w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H] or None.

    With a projection of h to size R also w_hr [R, H], and then w_hh is [4H, R].
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def split_weights(weights: Sequence[Tensor], layers: int, directions: int) -> list[list[Direction]]:
    """Split torch.nn.LSTM's flat list of weights by layer and direction."""
    n = len(weights) // (layers * directions)
    by_direction = []
    for first in range(0, len(weights), n):
        w_ih, w_hh, *rest = weights[first : first + n]
        b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
        by_direction.append(Direction(w_ih, w_hh, b_ih, b_hh, w_hr=rest[-1] if n % 2 else None))
    return [by_direction[first : first + directions] for first in range(0, len(by_direction), directions)]


class Segments(NamedTuple):
    """Segments say where batch rows start, stop and restart. All tensors are on the device of the input.

    resets: [T, B] bool or None; reset_h [T, D, B, H], reset_c [T, D, B, STATES * H], or None for zeros; lengths: [B] int64 in
    0 ... T, or None.
    """

    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    lengths: Tensor | None = None

    def of_rows(self, rows: slice) -> "Segments":
        """Return the segments with the reset states of some layers and directions."""
        reset_h, reset_c = (None if s is None else s[:, rows] for s in (self.reset_h, self.reset_c))
        return Segments(self.resets, reset_h, reset_c, self.lengths)


class LayerInputs(NamedTuple):
    """x [T, B, I]; h0 [D, B, H]; c0 [D, B, STATES * H]; the weights of one `Direction` or two; `Segments`; the seed [1] int64
    of dropout and of the cell's masks, or None without either."""

    x: Tensor
    h0: Tensor
    c0: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_ih_reverse: Tensor | None = None
    w_hh_reverse: Tensor | None = None
    b_ih_reverse: Tensor | None = None
    b_hh_reverse: Tensor | None = None
    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    lengths: Tensor | None = None
    seed: Tensor | None = None

    @staticmethod
    def of(
        x: Tensor,
        hx: Sequence[Tensor],
        directions: Sequence[Direction],
        segments: Segments,
        seed: Tensor | None = None,
    ) -> "LayerInputs":
        h0, c0 = hx
        reverse = directions[1][:4] if len(directions) == 2 else (None,) * 4
        return LayerInputs._make((x, h0, c0, *directions[0][:4], *reverse, *segments, seed))

    @property
    def directions(self) -> list[Direction]:
        forward = Direction(self.w_ih, self.w_hh, self.b_ih, self.b_hh)
        if self.w_ih_reverse is None or self.w_hh_reverse is None:
            return [forward]
        return [forward, Direction(self.w_ih_reverse, self.w_hh_reverse, self.b_ih_reverse, self.b_hh_reverse)]

    @property
    def segments(self) -> Segments:
        return Segments(self.resets, self.reset_h, self.reset_c, self.lengths)


class LayerOptions(NamedTuple):
    """Options of how a layer is computed.

    precision: of float32 products: "ieee", "tf32", "tf32x3", or None for torch's setting of cuDNN's recurrent layers.
    dropout: the probability with which each element of y is zero, for the layer that follows; with a seed only.
    return_cells: return c of every step. recompute: save no gates for the backward, which computes them again by a GEMM.
    stepwise: one launch per step, even where one launch could run them all. cell: its name.
    """

    precision: str | None = None
    dropout: float = 0.0
    return_cells: bool = False
    recompute: bool = False
    stepwise: bool = False
    cell: str = "lstm"


class LayerOutputs(NamedTuple):
    """y [T, B, D * H]; h_n, c_n, as h0 and c0; c of every step [T, B, D * STATES * H] and gates [T, B, D, H, 4] or None.

    h: y before dropout, or None without dropout.
    """

    y: Tensor
    h_n: Tensor
    c_n: Tensor
    c: Tensor | None
    gates: Tensor | None
    h: Tensor | None = None


class LayerGradients(NamedTuple):
    """The gradients of y, h_n, c_n and of c of every step; None stands for zero."""

    dy: Tensor | None
    dh_n: Tensor | None = None
    dc_n: Tensor | None = None
    dc: Tensor | None = None


class LayerSaved(NamedTuple):
    """The part of `LayerOutputs` that the backward needs: y before dropout, c, gates (None: it computes them again)."""

    h: Tensor
    c: Tensor
    gates: Tensor | None


LAYER = Records(LayerInputs, LayerOptions, LayerOutputs, LayerGradients, LayerSaved)

# ---- the readout: [B, H] to [B, V] -----------------------------------------------------------------------------------


class ReadoutInputs(NamedTuple):
    """h [B, H]; weight [V, H]; bias [V] or None."""

    h: Tensor
    weight: Tensor
    bias: Tensor | None = None


class ReadoutOptions(NamedTuple):
    """precision: as in `CellOptions`. dtype: of the result."""

    precision: str | None
    dtype: torch.dtype


class ReadoutOutputs(NamedTuple):
    """y [B, V], each row of which sums to 1."""

    y: Tensor


class ReadoutGradients(NamedTuple):
    """The gradient of y."""

    dy: Tensor


class ReadoutSaved(NamedTuple):
    """The part of `ReadoutOutputs` that the backward needs."""

    y: Tensor


READOUT = Records(ReadoutInputs, ReadoutOptions, ReadoutOutputs, ReadoutGradients, ReadoutSaved)
