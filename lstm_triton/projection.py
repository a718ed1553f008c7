"""One LSTM layer with projection (h of size R is W_hr u, where u = o * tanh(c)) on the kernels of one without.

From one step to the next W_hh h = (W_hh W_hr) u, so u is the h of a layer whose W_hh is this product. Where a batch row starts
from a given h there is no u: that h joins the input x of that step, W_hh joins W_ih, and u before the step is zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import operators
from .kernels.inputs import CellOptions, Direction, LayerInputs, LayerOptions, Segments


def lstm_layer(
    x: Tensor, hx: tuple[Tensor, Tensor], directions: Sequence[Direction], segments: Segments, options: LayerOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return y, h_n, c_n and c or None, without dropout, for directions with w_hr.

    h0 and reset_h have size R and w_hh is [4H, R]; y is [T, B, D * R].
    """
    (h0, c0), (resets, _, reset_c, lengths) = hx, segments

    def product(a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b of [m, k] and [k, n]; it and its derivatives have the precision of the kernels' products."""
        return operators.product(operators.Product(a, b), CellOptions(options.precision))[0]

    combined = []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(directions):
        assert w_hr is not None
        # The given h of each direction has columns of its own.
        columns = [w_hh if k == d else w_hh.new_zeros(w_hh.shape) for k in range(len(directions))]
        combined.append(Direction(torch.cat([w_ih, *columns], dim=1), product(w_hh, w_hr), b_ih, b_hh))
    given = [_given_states(x.shape[0], h0[d], d, segments) for d in range(len(directions))]
    zeros = x.new_zeros(c0.shape[2])
    no_h = None if reset_c is None else zeros.expand(reset_c.shape)
    inputs = LayerInputs.of(
        torch.cat([x, *given], dim=2), (zeros.expand(c0.shape), c0), combined, Segments(resets, no_h, reset_c, lengths)
    )
    u, u_n, c_n, c, *_ = operators.lstm_layer(inputs, options)
    projections = [d.w_hr.t() for d in directions if d.w_hr is not None]
    pairs = zip(u.chunk(len(directions), dim=2), projections)
    y = torch.cat([product(u_d.flatten(0, 1), w).unflatten(0, u.shape[:2]) for u_d, w in pairs], dim=2)
    h_n = torch.stack([product(u_d, w) for u_d, w in zip(u_n, projections)])
    if lengths is not None:
        h_n = torch.where((lengths == 0)[:, None], h0, h_n)  # for a batch row of length 0, h_n is h0
        # y is zero there already, but a gradient that arrives there, perhaps NaN, must reach no product.
        y = torch.where((torch.arange(x.shape[0], device=x.device)[:, None] < lengths)[..., None], y, 0.0)
    return y, h_n, c_n, c


def _given_states(T: int, h0: Tensor, d: int, segments: Segments) -> Tensor:
    """Return [T, B, R], the given h of direction d before each step; zero where h comes from the step before."""
    resets, reset_h, _, lengths = segments
    steps = torch.arange(T, device=h0.device)
    t = steps[:, None]
    if lengths is None:
        begins = t == (0 if d == 0 else T - 1)
    else:
        begins = t == (lengths * 0 if d == 0 else lengths - 1)
    h = torch.where(begins[..., None], h0, 0.0)
    if resets is None:
        return h
    # The segment that direction 1 enters at t is marked at t + 1.
    flags = resets if d == 0 else resets[(steps + 1).clamp(max=T - 1)] & (t + 1 < T)
    if lengths is not None:
        flags = flags & (t + d < lengths)
    return torch.where(flags[..., None], 0.0 if reset_h is None else reset_h[:, d], h)
