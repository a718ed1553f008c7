"""The operators that launch kernels (cell, layer, readout), and the product of a layer's projection."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import Operator
from .kernels import inputs as records
from .kernels.cell_equations import probabilities_of, step_of
from .kernels.layout import is_time_major, new_states
from .library import implements, library


def _cell_fake(inputs: records.CellInputs, options: records.CellOptions, save: bool) -> records.CellOutputs:
    x, shape = inputs.x, inputs.h.shape
    gates = x.new_empty((*shape, 4)) if save else None
    return records.CellOutputs(x.new_empty(shape), x.new_empty(inputs.c.shape), gates)


def _cell_reference(inputs: records.CellInputs, options: records.CellOptions) -> tuple[Tensor, Tensor]:
    (x, h, c, w_ih, w_hh, b_ih, b_hh, seed), step = inputs, step_of(options.cell)
    drawn = masks(seed, probabilities_of(options.cell), (1, *h.shape), h.dtype)
    if step is not None and drawn is not None:
        step = functools.partial(step, masks=drawn[:, 0])
    return reference.lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh, step)


lstm_cell = Operator(
    "lstm_cell",
    records.CELL,
    _cell_reference,
    "cell:lstm_cell_forward",
    "cell_backward:lstm_cell_backward",
    save=lambda outputs: records.CellSaved(outputs.c, outputs.gates),
    fake=_cell_fake,
    read_for={"b_ih": None, "b_hh": None, "x": "w_ih", "w_ih": "x", "w_hh": "h"},
)

# ---- a layer ---------------------------------------------------------------------------------------------------------


def _new_in_order_of(t: Tensor, size: int) -> Tensor:
    """Return [T, B, size] in the memory order of the kernels' results: that of x forward, of y backward."""
    return new_states(t, is_time_major(t), t.shape[0], t.shape[1], size)


def _layer_fake(inputs: records.LayerInputs, options: records.LayerOptions, save: bool) -> records.LayerOutputs:
    x, h0, c0 = inputs[:3]
    D, _, H = h0.shape
    x = x.contiguous() if save and options.recompute else x
    c = _new_in_order_of(x, D * c0.shape[2]) if save or options.return_cells else None
    has_gates = save and not options.recompute
    gates = _new_in_order_of(x, D * H * 4).unflatten(2, (D, H, 4)) if has_gates else None
    h = None if inputs.seed is None or not options.dropout else _new_in_order_of(x, D * H)
    return records.LayerOutputs(_new_in_order_of(x, D * H), h0.new_empty(h0.shape), c0.new_empty(c0.shape), c, gates, h)


def _layer_fake_gradients(inputs: records.LayerInputs, saved: records.LayerSaved) -> dict[str, Tensor]:
    T, B, I = inputs.x.shape
    D, _, H = inputs.h0.shape
    h = saved.h.contiguous() if saved.gates is None else saved.h
    return {
        "x": _new_in_order_of(h, I),
        "reset_h": h.new_empty((T, D, B, H)),
        "reset_c": _new_in_order_of(h, D * inputs.c0.shape[2]).unflatten(2, (D, -1)).permute(0, 2, 1, 3),
    }


def _layer_reference(inputs: records.LayerInputs, options: records.LayerOptions) -> tuple[Tensor, ...]:
    x, (D, _, H), step = inputs.x, inputs.h0.shape, step_of(options.cell)
    drawn = masks(inputs.seed, probabilities_of(options.cell), (*x.shape[:2], D * H), x.dtype)
    given = inputs.h0, inputs.c0, inputs.directions, inputs.segments
    y, *states = reference.lstm_layer(x, *given, step=step, masks=drawn)
    return dropped(y, options.dropout, inputs.seed), *states


lstm_layer = Operator(
    "lstm_layer",
    records.LAYER,
    _layer_reference,
    "layer:lstm_layer_forward",
    "layer_backward:lstm_layer_backward",
    save=lambda outputs: records.LayerSaved(outputs.y if outputs.h is None else outputs.h, outputs.c, outputs.gates),
    fake=_layer_fake,
    fake_backward=_layer_fake_gradients,
    recurrent=True,
)

library.define("lstm_dropout_kept(Tensor seed, float dropout, int number, int T, int B, int N) -> Tensor")


@implements("lstm_dropout_kept")
def _lstm_dropout_kept(seed, dropout, number, T, B, N):
    from .kernels.dropout import kept

    return kept(seed, dropout, (T, B, N), number)


@torch.library.register_fake("lstm_triton::lstm_dropout_kept", lib=library)
def _(seed, dropout, number, T, B, N):
    return seed.new_empty((T, B, N), dtype=torch.bool)


def dropped(y: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """Apply the kernels' dropout to y [T, B, N]; differentiable."""
    if seed is None or not dropout:
        return y
    kept = torch.ops.lstm_triton.lstm_dropout_kept(seed, dropout, 0, *y.shape[-3:])
    return y * (1 / (1 - dropout) if dropout < 1 else 0.0) * kept


def masks(
    seed: Tensor | None, probabilities: Sequence[float], shape: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """Return [n, T, B, N], the masks of a cell that the kernels draw from this seed, for n probabilities."""
    if seed is None or not probabilities:
        return None
    kept = torch.ops.lstm_triton.lstm_dropout_kept
    return 1 - torch.stack([kept(seed, p, number, *shape) for number, p in enumerate(probabilities, 1)]).to(dtype)


# ---- the readout -----------------------------------------------------------------------------------------------------


def _readout_reference(inputs: records.ReadoutInputs, options: records.ReadoutOptions) -> tuple[Tensor]:
    """Compute the readout in the dtype of the result, which under autocast is wider than the inputs'."""
    bias = None if inputs.bias is None else inputs.bias.to(options.dtype)
    return (reference.softmax_readout(inputs.h.to(options.dtype), inputs.weight.to(options.dtype), bias),)


softmax_readout = Operator(
    "softmax_readout",
    records.READOUT,
    _readout_reference,
    "readout:softmax_readout_forward",
    "readout_backward:softmax_readout_backward",
    save=lambda outputs: records.ReadoutSaved(outputs.y),
    read_for={"bias": None, "h": "weight", "weight": "h"},
)

# ---- the product of a projection: torch's own GEMM, in the precision of the kernels' ---------------------------------


class Product(NamedTuple):
    """a [M, K] and b [K, N]."""

    a: Tensor
    b: Tensor


class ProductOutputs(NamedTuple):
    ab: Tensor


def _product_backward(grads, inputs, saved, needs, options) -> dict[str, Tensor]:
    (dy,), (a, b) = grads, inputs
    with product.kernels_products(a.dtype, options.precision):
        ways = {"a": lambda: dy @ b.t(), "b": lambda: a.t() @ dy}
        return {name: ways[name]() for name in needs}


product = Operator(
    "lstm_product",
    records.Records(Product, records.CellOptions, ProductOutputs, records.ReadoutGradients),
    reference=lambda inputs, options: (inputs.a @ inputs.b,),
    backward=_product_backward,
    recurrent=True,
)
