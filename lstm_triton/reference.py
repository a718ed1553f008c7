"""The LSTM in plain PyTorch: the specification that the kernels are tested against, forward and hand-written backward.

Clear rather than fast. Everything is made of differentiable torch operations, on any device, in the dtype of its arguments
(the tests use float64), so the hand-written backward can itself be differentiated: double backward rests on it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gate_activations(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """i, f, g, o, each [B, H], from x [B, I], h [B, H], w_ih [4H, I], w_hh [4H, H] and biases [4H] or None."""
    z = x @ w_ih.t() + h @ w_hh.t()
    for b in (b_ih, b_hh):
        if b is not None:
            z = z + b
    z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
    return torch.sigmoid(z_i), torch.sigmoid(z_f), torch.tanh(z_g), torch.sigmoid(z_o)


def lstm_cell(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One timestep: the next (h, c), each [B, H], from x [B, I], h and c [B, H], torch.nn.LSTMCell's weights and biases."""
    i, f, g, o = gate_activations(x, h, w_ih, w_hh, b_ih, b_hh)
    c = f * c + i * g
    h = o * torch.tanh(c)
    return h, c


def lstm_cell_backward(
    dh: Tensor,
    dc: Tensor,
    x: Tensor,
    h_prev: Tensor,
    c_prev: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of one timestep, from those of its h and c, each [B, H].

    Returns dx [B, I], dh_prev [B, H], dc_prev [B, H], dW_ih [4H, I], dW_hh [4H, H] and db [4H] (of either bias).
    """
    i, f, g, o = gate_activations(x, h_prev, w_ih, w_hh, b_ih, b_hh)
    tanh_c = torch.tanh(f * c_prev + i * g)
    do = dh * tanh_c
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    di = dc * g
    df = dc * c_prev
    dg = dc * i
    dz = torch.cat((di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)), dim=1)
    return dz @ w_ih, dz @ w_hh, dc * f, dz.t() @ x, dz.t() @ h_prev, dz.sum(0)


def lstm_cell_double_backward(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Back through `lstm_cell_backward`: `back_through` with its six results and nine arguments."""
    return back_through(lstm_cell_backward, grads, inputs)


def softmax_readout(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = softmax(h W^T + b) along V, [..., V], from h [..., H], weight [V, H] and bias [V] or None."""
    logits = h @ weight.t()
    if bias is not None:
        logits = logits + bias
    return torch.softmax(logits, -1)


def softmax_readout_backward(
    dy: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the readout of h [B, H], from that of its result, [B, V].

    Returns dh [B, H], dW [V, H] and db [V].
    """
    y = softmax_readout(h, weight, bias)
    dlogits = y * (dy - (dy * y).sum(-1, keepdim=True))
    return dlogits @ weight, dlogits.t() @ h, dlogits.sum(0)


def back_through(
    function: Callable[..., Sequence[Tensor]], grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Back through a function made of differentiable operations.

    Args:
        function: of `inputs`, which may be None, returning a sequence of tensors.
        grads: the gradients of its results, None where there is none.
        inputs: its arguments.

    Returns:
        The gradients of the arguments, None where there is none. Differentiable again when grad mode is on.
    """
    with torch.enable_grad():
        # Aliases, so that each gradient is the partial one even where one input was computed from another.
        aliases = [None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        results = function(*aliases)
        pairs = [(r, g) for r, g in zip(results, grads) if g is not None]
        wanted = [a for a in aliases if a is not None]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs], create_graph=torch.is_grad_enabled(), allow_unused=True
            )
            if pairs
            else [None] * len(wanted)
        )
    return [None if a is None else next(found) for a in aliases]
