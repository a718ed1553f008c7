"""One LSTM layer as PyTorch operators, built as `ops` is for the cell."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import implements, library, outside_autocast, sees_operators

# seed: of the random numbers of dropout. Without dropout it is None and its probability 0.
_SEGMENTS = "Tensor? resets, Tensor? reset_h, Tensor? reset_c, Tensor? lengths, Tensor? seed"
library.define(
    f"lstm_layer(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, int directions, {_SEGMENTS}, float dropout,"
    " str? precision, bool save_cells, bool save_gates, bool stepwise) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "lstm_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor h0, Tensor c0, Tensor[] weights,"
    f" int directions, Tensor h, Tensor c, Tensor gates, {_SEGMENTS}, float dropout, bool[] needs, str? precision,"
    " bool stepwise) -> Tensor[]"
)
library.define("lstm_dropout_kept(Tensor seed, float dropout, int T, int B, int N) -> Tensor")


def by_direction(weights: Sequence[Tensor], directions: int) -> list[tuple[Any, ...]]:
    """[w_ih, w_hh] or [w_ih, w_hh, b_ih, b_hh] of each direction, one after the other -> four of each."""
    n = len(weights) // directions
    return [(*weights[d * n : (d + 1) * n], *(None,) * (4 - n)) for d in range(directions)]


# Hooks on saved tensors and callers of the operators may give any strides, the kernels do not take all of them.


def _segments(resets, reset_h, reset_c, lengths):
    from .kernels.layer import Segments

    reset_h, reset_c = (s if s is None or s.stride(3) == 1 else s.contiguous() for s in (reset_h, reset_c))
    return Segments(resets, reset_h, reset_c, None if lengths is None else lengths.contiguous())


def _dropout(p, seed):
    if seed is None:
        return None
    from .kernels.dropout import Dropout

    return Dropout(p, seed)


@implements("lstm_dropout_kept")
def _lstm_dropout_kept(seed, dropout, T, B, N):
    from .kernels.dropout import Dropout, kept

    return kept(Dropout(dropout, seed), T, B, N)


@torch.library.register_fake("lstm_triton::lstm_dropout_kept", lib=library)
def _(seed, dropout, T, B, N):
    return seed.new_empty((T, B, N), dtype=torch.bool)


def _forward_results(h, h_n, c_n, c, gates):
    """All dense in one memory order, that of h; time-major where the gates are to be rebuilt."""
    from .kernels.layer import Forward, is_time_major

    gates = gates if gates.numel() else None
    if gates is None or is_time_major(h):
        return Forward(h.contiguous(), h_n, c_n, c.contiguous(), None if gates is None else gates.contiguous())
    h, c, gates = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (h, c, gates))
    return Forward(h, h_n, c_n, c, gates)


def _new_like_input(x: Tensor, size: int) -> Tensor:
    """[T, B, size] in the memory order that the kernels give their results: that of x forward, of y backward.

    What `kernels.layer` does with `is_time_major` and `new_states`; but compilers ask for it where there may be no triton.
    """
    T, B = x.shape[:2]
    if x.stride(0) >= x.stride(1) or T == 1 or B == 1:
        return x.new_empty((T, B, size))
    return x.new_empty((B, T, size)).transpose(0, 1)


@implements("lstm_layer")
def _lstm_layer(
    x, h0, c0, weights, directions, resets, reset_h, reset_c, lengths, seed,
    dropout, precision, save_cells, save_gates, stepwise,
):  # fmt: skip
    from .kernels import layer

    with outside_autocast():
        forward = layer.lstm_layer_forward(
            x, h0, c0,
            [layer.Direction(*w) for w in by_direction(weights, directions)],
            _segments(resets, reset_h, reset_c, lengths), dropout=_dropout(dropout, seed),
            precision=precision, save_cells=save_cells, save_gates=save_gates, stepwise=stepwise,
        )  # fmt: skip
    return (*forward[:3], *(x.new_empty(0) if t is None else t for t in forward[3:]))


@torch.library.register_fake("lstm_triton::lstm_layer", lib=library)
def _(
    x, h0, c0, weights, directions, resets, reset_h, reset_c, lengths, seed,
    dropout, precision, save_cells, save_gates, stepwise,
):  # fmt: skip
    H = h0.shape[2]
    wanted = (True, save_cells, seed is not None)
    y, c, h = (_new_like_input(x, directions * H) if n else x.new_empty(0) for n in wanted)
    gates = _new_like_input(x, directions * H * 4).unflatten(2, (directions, H, 4)) if save_gates else x.new_empty(0)
    return y, h0.new_empty(h0.shape), c0.new_empty(c0.shape), c, gates, h


@implements("lstm_layer_backward")
def _lstm_layer_backward(
    dy, dh_n, dc_n, dc, x, h0, c0, weights, directions, h, c, gates, resets, reset_h, reset_c, lengths, seed,
    dropout, needs, precision, stepwise,
):  # fmt: skip
    from .kernels import layer, layer_backward

    needs_dx, needs_states, needs_resets, needs_weights = needs
    with outside_autocast():
        grads = layer_backward.lstm_layer_backward(
            dy, dh_n, dc_n, dc, x, h0, c0,
            [layer.Direction(*w) for w in by_direction(weights, directions)],
            _forward_results(h, h0, c0, c, gates),
            _segments(resets, reset_h, reset_c, lengths), dropout=_dropout(dropout, seed),
            needs_dx=needs_dx, needs_weights=needs_weights, needs_h0=needs_states, needs_resets=needs_resets,
            precision=precision, stepwise=stepwise,
        )  # fmt: skip
    results: list[Tensor | None] = [grads.dx, grads.dh0, grads.dc0, grads.dreset_h, grads.dreset_c]
    if grads.dw_ih is not None and grads.dw_hh is not None and grads.db is not None:
        for of_direction in zip(grads.dw_ih, grads.dw_hh, grads.db):
            results += of_direction
    return [x.new_empty(0) if t is None else t for t in results]


@torch.library.register_fake("lstm_triton::lstm_layer_backward", lib=library)
def _(
    dy, dh_n, dc_n, dc, x, h0, c0, weights, directions, h, c, gates, resets, reset_h, reset_c, lengths, seed,
    dropout, needs, precision, stepwise,
):  # fmt: skip
    needs_dx, needs_states, needs_resets, needs_weights = needs
    (T, B, I), (D, _, H) = x.shape, h0.shape
    h = h if gates.dim() > 1 else h.contiguous()  # as in `_forward_results`
    none = (0,)
    reset = (T, D, B, H)
    results = [
        _new_like_input(h, I) if needs_dx else x.new_empty(none),
        x.new_empty(h0.shape if needs_states else none),
    ]
    results += [x.new_empty(c0.shape), x.new_empty(reset if needs_resets else none)]
    results += [
        _new_like_input(h, D * H).unflatten(2, (D, H)).permute(0, 2, 1, 3) if needs_resets else x.new_empty(none)
    ]
    if needs_weights:
        results += [x.new_empty(shape) for _ in range(D) for shape in ((4 * H, I), (4 * H, H), (4 * H,))]
    return results


def forward(x, h0, c0, weights, directions, segments, *options):
    """segments: (resets, reset_h, reset_c, lengths, seed)"""
    sees = sees_operators(x, h0, c0, *weights, *segments)
    forward = torch.ops.lstm_triton.lstm_layer if sees else _lstm_layer
    return forward(x, h0, c0, weights, directions, *segments, *options)


def backward(dy, dh_n, dc_n, dc, x, h0, c0, weights, directions, h, c, gates, segments, *options):
    sees = sees_operators(dy, dh_n, dc_n, dc, x, h0, c0, *weights, h, c, gates, *segments)
    backward = torch.ops.lstm_triton.lstm_layer_backward if sees else _lstm_layer_backward
    return backward(dy, dh_n, dc_n, dc, x, h0, c0, weights, directions, h, c, gates, *segments, *options)


def dropped(y: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """y [T, B, N], computed otherwise, with the kernels' dropout; differentiable."""
    if seed is None:
        return y
    kept = torch.ops.lstm_triton.lstm_dropout_kept(seed, dropout, *y.shape[-3:])
    return y * (1 / (1 - dropout) if dropout < 1 else 0.0) * kept
