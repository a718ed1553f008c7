"""Resets and lengths on torch's own LSTM kernels, which have neither, by filler steps of two kinds.

A clearing step between two segments of a row makes c zero, and h with it: the pre-activations of i and f are so far below zero
that both gates are zero. A holding step past the end of a row keeps c, because there f is 1 and i is 0. x gets one more
feature for each kind, which is 1 in such steps and 0 elsewhere. A layer and direction is then one call of torch's kernel, with
as many steps as the longest batch row and its fillers have. For cell states, which that kernel does not return, it is one
product for the inputs of all steps and a loop. These gates are exactly 0 or 1, so the fillers change neither results nor
gradients, except that 0 * inf is NaN.

Where all batch rows are full, and restart at one common step or nowhere, two calls or one without fillers take less time.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, torch_ops
from .kernels.inputs import Direction, Segments
from .modes import has_values

# More calls of torch's kernel take longer than one with clearing steps (measured on a CPU: T = 64, B = 16, H = 32 to 256).
_MOST_PIECES = 2


def can_serve(x: Tensor, segments: Segments) -> bool:
    """Return whether the host can read where segments begin and end, and all of them start from zeros."""
    resets, reset_h, reset_c, lengths = segments
    return reset_h is None and reset_c is None and all(t is None or has_values(t) for t in (x, resets, lengths))


def lstm_layer(
    x: Tensor, h0: Tensor, c0: Tensor, directions: Sequence[Direction], segments: Segments, return_cells: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Return `reference.lstm_layer`, or None where a segment that is not finite would make the next of its row NaN."""
    cuts = _few_cuts(segments, len(x))

    def run(d: int, direction: Direction):
        if cuts is None:
            return _with_fillers(x, (h0[d], c0[d]), direction, segments, d, return_cells)
        return _in_pieces(x, (h0[d], c0[d]), direction, segments.resets, cuts, d, return_cells)

    ys, h_n, c_n, cs = zip(*(run(d, direction) for d, direction in enumerate(directions)))
    y = _joined(ys, dim=2)
    # Clearing multiplies by zero, which fails for infinity and NaN. A sum finds these faster than a test of each element.
    if cuts is None and segments.resets is not None and not bool(y.detach().sum().isfinite()):
        return None
    return y, torch.stack(h_n), torch.stack(c_n), _joined(cs, dim=2)


def _joined(tensors: Sequence[Any], dim: int) -> Any:
    return torch.cat(list(tensors), dim) if len(tensors) > 1 and tensors[0] is not None else tensors[0]


def _few_cuts(segments: Segments, T: int) -> list[int] | None:
    """Return the steps at which pieces without fillers begin and end, or None where fillers take less time."""
    resets, _, _, lengths = segments
    if lengths is not None and int(lengths.min()) < T:
        return None
    starts = [] if resets is None else [t for t, any_row in enumerate(resets.any(1).tolist()) if any_row and t]
    return [0, *starts, T] if len(starts) < _MOST_PIECES else None


def _in_pieces(  # noqa: PLR0913
    x: Tensor,
    states: Sequence[Tensor],
    direction: Direction,
    resets: Tensor | None,
    cuts: list[int],
    d: int,
    return_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute `_with_fillers` by a call for the steps from each cut to the next."""
    T, ys, cs = len(x), [], []
    if d == 1:  # runs forward over reversed steps
        x, cuts = x.flip(0), [T - t for t in reversed(cuts)]
    for start, stop in itertools.pairwise(cuts):
        t = T - start if d else start  # where resets mark the segment that is entered
        if resets is not None and t < T:
            states = [torch.where(resets[t, :, None], 0.0, s) for s in states]
        y, *states, c = _run(x[start:stop], states, direction, return_cells)
        ys.append(y)
        cs.append(c)
    y, c = _joined(ys, dim=0), _joined(cs, dim=0)
    h_n, c_n = states
    return (y.flip(0), h_n, c_n, None if c is None else c.flip(0)) if d else (y, h_n, c_n, c)


class _Steps(NamedTuple):
    """The places of the steps of x among the fillers.

    places: of each step of x, [T, B]; any number past the end of a row. ends: of the last step of each row, [B]; -1 where
    there is none. past: which steps of x are past the end of their row, [T, B], or None. moved: whether places differ from x.
    """

    places: Tensor
    ends: Tensor
    past: Tensor | None
    moved: bool


def _steps(x: Tensor, segments: Segments, d: int) -> _Steps:
    (T, B, _), (resets, _, _, lengths) = x.shape, segments
    t = torch.arange(T, device=x.device)[:, None]
    past = None if lengths is None else t >= lengths
    places = t.expand(T, B) if resets is None else t + resets.cumsum(0)
    if d == 1:  # runs forward over reversed rows
        places = (places[-1:] if lengths is None else places.gather(0, (lengths - 1).clamp(min=0)[None])) - places
    ends = (places if past is None else places.masked_fill(past, -1)).amax(0)
    return _Steps(places, ends, past, resets is not None or d == 1)


def _with_fillers(
    x: Tensor, states: Sequence[Tensor], direction: Direction, segments: Segments, d: int, return_cells: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute one direction: y [T, B, R], h_n [B, R], c_n [B, H] and, with return_cells, c [T, B, H]."""
    (T, B, _), (h0, c0), steps = x.shape, states, _steps(x, segments, d)
    longer = _spread(x, steps) if steps.moved else _held(x, steps)
    empty, ends = (steps.ends < 0)[:, None], steps.ends.clamp(min=0)
    if steps.past is not None:  # the state of a row without steps reaches nothing, whatever it is
        states = [torch.where(empty, 0.0, s) for s in states]
    y, _, c_n, c = _run(longer, states, direction._replace(w_ih=_with_columns(direction.w_ih)), return_cells)
    b = torch.arange(B, device=x.device)

    def in_place(y: Tensor) -> Tensor:
        if steps.moved:
            at = (steps.places.clamp(0, len(y) - 1) * B + b).flatten()
            y = y.flatten(0, 1).index_select(0, at).view(T, B, -1)
        return y if steps.past is None else torch.where(steps.past[..., None], 0.0, y)

    h_n = torch.where(empty, h0, y[ends, b])
    c_n = torch.where(empty, c0, c_n if c is None else c[ends, b])
    return in_place(y), h_n, c_n, None if c is None else in_place(c)


def _run(
    x: Tensor, states: Sequence[Tensor], direction: Direction, return_cells: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return y, h and c after the last step and, with return_cells, c of every step, by torch's kernel or a loop."""
    h0, c0 = states
    if return_cells:
        y, c = _loop(x, h0, c0, direction)
        return y, y[-1], c[-1], c
    options = torch_ops.Options(direction.b_ih is not None, 1, 0.0, torch.is_grad_enabled(), False)
    weights = [w for w in direction if w is not None]
    y, h_n, c_n = torch_ops.lstm(x, (h0[None], c0[None]), weights, options)
    return y, h_n[0], c_n[0], None


def _loop(x: Tensor, h: Tensor, c: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """Return h and c of every step."""
    w_ih, w_hh, b_ih, b_hh, w_hr = direction
    # The factor 1 gives b_hh a gradient tensor of its own; a plain sum has one for both.
    b = None if b_ih is None or b_hh is None else b_ih + 1 * b_hh
    ys, cs, w_hh = [], [], w_hh.t()
    for z in torch.nn.functional.linear(x, w_ih, b).unbind(0):
        z_i, z_f, z_g, z_o = torch.addmm(z, h, w_hh).chunk(4, dim=1)
        h, c = reference.lstm_step(z_i, z_f, z_g, z_o, c)
        h = h if w_hr is None else h @ w_hr.t()
        ys.append(h)
        cs.append(c)
    return torch.stack(ys), torch.stack(cs)


def _held(x: Tensor, steps: _Steps) -> Tensor:
    """Return x [T, B, I] with the features of fillers, [T, B, I + 2], if all fillers are past the ends of batch rows."""
    holds = (torch.arange(len(x), device=x.device)[:, None] > steps.ends).to(x.dtype)[..., None]
    x = x if steps.past is None else torch.where(steps.past[..., None], 0.0, x)
    return torch.cat([x, holds, torch.zeros_like(holds)], dim=2)


def _spread(x: Tensor, steps: _Steps) -> Tensor:
    """Return [n, B, I + 2]: the steps of x at their places among n, clearing and holding steps at all others."""
    (_, B, I), n = x.shape, max(int(steps.ends.max()) + 1, 1)
    holds = (torch.arange(n, device=x.device)[:, None] > steps.ends).to(x.dtype).view(n * B, 1)
    fillers = torch.cat([x.new_zeros(n * B, I), holds, 1 - holds], dim=1)
    places, rows = (steps.places * B + torch.arange(B, device=x.device)).flatten(), x.flatten(0, 1)
    if steps.past is not None:
        kept = steps.past.flatten().logical_not().nonzero()[:, 0]
        places, rows = places[kept], rows.index_select(0, kept)
    return fillers.index_copy_(0, places, torch.nn.functional.pad(rows, (0, 2))).view(n, B, I + 2)


def _with_columns(w_ih: Tensor) -> Tensor:
    """Return w_ih [4H, I] with columns for holding and for clearing steps, [4H, I + 2]."""
    far = torch.finfo(w_ih.dtype).max / 4
    columns = w_ih.new_tensor([(-far, -far), (far, -far), (0, 0), (0, 0)])  # of i, f, g, o
    return torch.cat([w_ih, columns.repeat_interleave(w_ih.shape[0] // 4, dim=0)], dim=1)
