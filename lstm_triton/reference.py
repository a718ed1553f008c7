"""The LSTM in plain PyTorch: the reference that the kernels are tested against, forward and hand-written backward.

It is written to be clear, not fast. It consists of differentiable torch operations, on any device, in the dtype of its
arguments (the tests use float64), so that autograd derives what is not written by hand.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.inputs import Segments

_NO_SEGMENTS = Segments()


def pre_activations(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, ...]:
    """Return z_i, z_f, z_g, z_o [B, H] from x [B, I], h [B, H], w_ih [4H, I], w_hh [4H, H] and biases [4H] or None."""
    z = x @ w_ih.t() + h @ w_hh.t()
    for b in (b_ih, b_hh):
        if b is not None:
            z = z + b
    return z.chunk(4, dim=1)


def gate_activations(z_i: Tensor, z_f: Tensor, z_g: Tensor, z_o: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return i, f, g, o from the pre-activations."""
    return torch.sigmoid(z_i), torch.sigmoid(z_f), torch.tanh(z_g), torch.sigmoid(z_o)


def lstm_step(z_i: Tensor, z_f: Tensor, z_g: Tensor, z_o: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next (h, c) from the pre-activations and the c before, each [B, H]."""
    i, f, g, o = gate_activations(z_i, z_f, z_g, z_o)
    c = f * c + i * g
    h = o * torch.tanh(c)
    return h, c


def lstm_cell(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    step: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the next (h, c), each [B, H], from x [B, I], h and c [B, H] and torch.nn.LSTMCell's weights and biases.

    step: the equations of another cell, as in `kernels.cell_equations`.
    """
    compute: Callable[..., tuple[Tensor, Tensor]] = lstm_step if step is None else step
    return compute(*pre_activations(x, h, w_ih, w_hh, b_ih, b_hh), c)


def lstm_cell_backward(
    grads: tuple[Tensor, Tensor],
    x: Tensor,
    h_prev: Tensor,
    c_prev: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of one timestep, from dh and dc [B, H], those of its h and c.

    Returns dx [B, I], dh_prev [B, H], dc_prev [B, H], dW_ih [4H, I], dW_hh [4H, H] and db [4H] (of either bias).
    """
    dh, dc = grads
    i, f, g, o = gate_activations(*pre_activations(x, h_prev, w_ih, w_hh, b_ih, b_hh))
    tanh_c = torch.tanh(f * c_prev + i * g)
    do = dh * tanh_c
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    di = dc * g
    df = dc * c_prev
    dg = dc * i
    dz = torch.cat((di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)), dim=1)
    return dz @ w_ih, dz @ w_hh, dc * f, dz.t() @ x, dz.t() @ h_prev, dz.sum(0)


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Sequence[Any]],
    segments: Segments = _NO_SEGMENTS,
    *,
    step: Callable[..., tuple[Tensor, Tensor]] | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one layer over a sequence step by step, in as many directions as there are weights.

    Args:
        x: [T, B, I]; h0, c0: [D, B, H].
        weights: for each of the D directions w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H] or None; with a projection of h to
            size R also w_hr [R, H], and then w_hh is [4H, R] and h0 and y have R in place of H.
        segments: a segment of batch row b starts at t where resets[t, b]. The result equals that of the segments run one by
            one, each from zeros, or from reset_h[t, d, b], reset_c[t, d, b] of the step at which its direction enters it. Past
            the lengths of the batch rows outputs and cell states are 0.
        step: of another cell, as in `lstm_cell`. masks: [n, T, B, D * H], its random masks; None for their expectations.

    Returns:
        y [T, B, D * H], h_n and c_n [D, B, H] (of each batch row's last step), c of every step [T, B, D * H].
    """
    T, B = x.shape[:2]
    resets, reset_h, reset_c, lengths = segments
    outputs, cells, last = [], [], []
    for d, direction in enumerate(weights):
        h, c = h0[d], c0[d]
        drawn = None if masks is None else masks.chunk(len(weights), -1)[d]
        w_hr = direction[4] if len(direction) == 5 else None
        ys: list[Tensor] = [h] * T
        cs: list[Tensor] = [c] * T
        for t in range(T) if d == 0 else reversed(range(T)):
            active = None if lengths is None else (t < lengths)[:, None]
            h_prev, c_prev = h, c
            if resets is not None and t + d < T:
                # resets mark the forward start of a segment. The one that direction d enters at t is marked at t + d.
                flags = resets[t + d] if lengths is None else resets[t + d] & (t + d < lengths)
                h_prev = torch.where(flags[:, None], 0.0 if reset_h is None else reset_h[t, d], h_prev)
                c_prev = torch.where(flags[:, None], 0.0 if reset_c is None else reset_c[t, d], c_prev)
            x_t = x[t]
            if active is not None:  # values past the end of a batch row, perhaps NaN, must reach no product
                x_t, h_prev = (torch.where(active, s, 0.0) for s in (x_t, h_prev))
                c_prev = torch.where(active, c_prev, 0.5)  # not 0, because a cell may divide by its state
            of_t = step if step is None or drawn is None else functools.partial(step, masks=drawn[:, t])
            compute: Any = functools.partial(lstm_cell, step=of_t)
            h_t, c_t = compute(x_t, h_prev, c_prev, *direction[:4])
            if w_hr is not None:
                h_t = h_t @ w_hr.t()
            if active is None:
                h, c = ys[t], cs[t] = h_t, c_t
            else:
                h, c = torch.where(active, h_t, h), torch.where(active, c_t, c)
                ys[t], cs[t] = torch.where(active, h_t, 0.0), torch.where(active, c_t, 0.0)
        outputs.append(torch.stack(ys))
        cells.append(torch.stack(cs))
        last.append((h, c))
    h_n, c_n = (torch.stack(states) for states in zip(*last))
    return torch.cat(outputs, dim=2), h_n, c_n, torch.cat(cells, dim=2)


def softmax_readout(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return Y = softmax(h W^T + b) along V, [..., V], from h [..., H], weight [V, H] and bias [V] or None."""
    logits = h @ weight.t()
    if bias is not None:
        logits = logits + bias
    return torch.softmax(logits, -1)


def softmax_readout_backward(
    dy: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the readout of h [B, H], from dy [B, V], that of its result.

    Returns dh [B, H], dW [V, H] and db [V].
    """
    y = softmax_readout(h, weight, bias)
    dlogits = y * (dy - (dy * y).sum(-1, keepdim=True))
    return dlogits @ weight, dlogits.t() @ h, dlogits.sum(0)


def back_through(
    function: Callable[..., Sequence[Any]], grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of a function that consists of differentiable operations.

    Args:
        function: takes `inputs`, which may be None or hold integers, and returns a sequence of tensors.
        grads: the gradients of its results, or None for zero.
        inputs: its arguments.

    Returns:
        The gradients of the arguments, or None for zero. They are differentiable if grad mode is on.
    """
    given = [k for k, t in enumerate(inputs) if t is not None and t.is_floating_point()]
    asked = [k for k, g in enumerate(grads) if g is not None]
    if not asked:
        return [None] * len(inputs)

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for k, t in zip(given, tensors):
            arguments[k] = t
        found = function(*arguments)
        return tuple(found[k] for k in asked)

    # torch.func, so that this also works inside its transforms.
    _, back, *_ = torch.func.vjp(results, *(inputs[k] for k in given))
    gradients = dict(zip(given, back(tuple(grads[k] for k in asked))))
    return [gradients.get(k) for k in range(len(inputs))]
