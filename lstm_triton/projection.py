"""One LSTM layer with projection (h of size R is W_hr u, where u = o * tanh(c)) through the kernels of one without.

From one step to the next W_hh h = (W_hh W_hr) u, so u is the h of a layer whose W_hh is the product. Where a row starts from a
given h there is no u: that h is part of the input of that step, with W_hh as its part of W_ih, and u before it is zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import layer_autograd
from .ops import call, formula_precision


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    lengths: Tensor | None,
    precision: str | None,
    return_cells: bool,
    recompute: bool,
    stepwise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n, c or None); arguments as `layer_autograd.lstm_layer`, w_hr [R, H] last among the weights of a direction.

    h0 and reset_h have size R and w_hh is [4H, R]; y is [T, B, D * R].
    """
    n = len(weights) // directions
    combined, projections = [], []
    for d in range(directions):
        w_ih, w_hh, *biases, w_hr = weights[d * n : (d + 1) * n]
        # The given h of each direction has columns of its own.
        columns = [w_hh if k == d else w_hh.new_zeros(w_hh.shape) for k in range(directions)]
        combined += [torch.cat([w_ih, *columns], dim=1), _product(w_hh, w_hr, precision), *biases]
        projections.append(w_hr)
    given = [_given_states(len(x), h0[d], d, resets, reset_h, lengths) for d in range(directions)]
    zeros = x.new_zeros(c0.shape[2])
    u, u_n, c_n, c = layer_autograd.lstm_layer(
        torch.cat([x, *given], dim=2), zeros.expand(c0.shape), c0, combined, directions,
        resets, None if reset_c is None else zeros.expand(reset_c.shape), reset_c, lengths, None, 0.0,
        precision, return_cells, recompute, stepwise,
    )  # fmt: skip
    y = torch.cat(
        [_product(u_d, w_hr.t(), precision) for u_d, w_hr in zip(u.chunk(directions, dim=2), projections)], dim=2
    )
    h_n = torch.stack([_product(u_d, w_hr.t(), precision) for u_d, w_hr in zip(u_n, projections)])
    if lengths is not None:
        h_n = torch.where((lengths == 0)[:, None], h0, h_n)  # a row without steps ends where it begins
        # Zero already; but a gradient that arrives there, perhaps NaN, must not meet the zeros of u in a product.
        y = torch.where((torch.arange(len(x), device=x.device)[:, None] < lengths)[..., None], y, 0.0)
    return y, h_n, c_n, c


def _product(a: Tensor, b: Tensor, precision: str | None) -> Tensor:
    """a @ b of [..., k] and [k, n], it and its derivatives with the precision of the kernels' products."""
    # A compiler sees torch's setting as part of the program, and keeps to it.
    return a @ b if torch.compiler.is_compiling() else call(_Product, a, b, precision)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, precision):
        with formula_precision(a.dtype, precision, recurrent=True):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        *factors, ctx.precision = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        da = _product(grad, b.t(), ctx.precision)
        return da, _product(a.flatten(0, -2).t(), grad.flatten(0, -2), ctx.precision), None

    @staticmethod
    def jvp(ctx, da, db, _):
        a, b = ctx.saved_tensors
        left = 0 if da is None else _product(da, b, ctx.precision)
        return left + (0 if db is None else _product(a, db, ctx.precision))


def _given_states(
    T: int, h0: Tensor, d: int, resets: Tensor | None, reset_h: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """[T, B, R]: the h that direction d is given before each step, zero where it comes from the step before."""
    t = torch.arange(T, device=h0.device)[:, None]
    if lengths is None:
        begins = t == (0 if d == 0 else T - 1)
    else:
        begins = t == (lengths * 0 if d == 0 else lengths - 1)
    h = torch.where(begins[..., None], h0, 0.0)
    if resets is None:
        return h
    # The segment that direction 1 enters at t is marked at t + 1.
    flags = resets if d == 0 else torch.cat([resets[1:], torch.zeros_like(resets[:1])])
    if lengths is not None:
        flags = flags & (t + d < lengths)
    return torch.where(flags[..., None], 0.0 if reset_h is None else reset_h[:, d], h)
