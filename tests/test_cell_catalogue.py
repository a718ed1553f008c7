"""Ready-made cells that torch does not have, beside loops written from the papers' equations, in float64 with all gradients."""

import itertools

import pytest
import torch
from support import philox
from torch import Tensor

from lstm_triton import Recurrent, RecurrentCell
from lstm_triton.cells import catalogue

T, B, I, H = 5, 3, 4, 6
BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def cifg(x, h, states, W, R, biases, _):
    """Greff et al. 2017, section III: the LSTM with i = 1 - f; gates in the order f, z, o."""
    (c,) = states
    f, z, o = (x @ W.T + h @ R.T + sum(biases)).split(H, dim=1)
    c = torch.tanh(z) * (1 - _sigmoid(f)) + c * _sigmoid(f)
    return torch.tanh(c) * _sigmoid(o), [c]


def minimal_gated_unit(x, h, _, W, R, biases, __):
    """Zhou et al. 2016, table 1, but for the place of f: h U + b times f, as in torch's GRU; gates in the order f, n."""
    (f_x, n_x), (f_h, n_h) = ((t @ m.T + b).split(H, dim=1) for t, m, b in ((x, W, biases[0]), (h, R, biases[1])))
    f = _sigmoid(f_x + f_h)
    return (1 - f) * h + f * torch.tanh(n_x + f * n_h), []


def peephole_lstm(x, h, states, W, R, biases, peepholes):
    """Greff et al. 2017, section II.B, with block input z; gates in the order i, f, z, o."""
    (c,), (p_i, p_f, p_o) = states, peepholes
    i, f, z, o = (x @ W.T + h @ R.T + sum(biases)).split(H, dim=1)
    i, f = _sigmoid(i + p_i * c), _sigmoid(f + p_f * c)
    c = torch.tanh(z) * i + c * f
    return torch.tanh(c) * _sigmoid(o + p_o * c), [c]


def slstm(x, h, states, W, R, biases, _):
    """Beck et al. 2024, equations 8 to 17, f a sigmoid, without the stabilizer: in float64 the exponentials stay in range.

    The third state of ours only scales the other two: c and n here are c exp(m) and n exp(m) there.
    """
    c, n, m = states
    i, f, z, o = (x @ W.T + h @ R.T + sum(biases)).split(H, dim=1)
    c = _sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
    n = _sigmoid(f) * n + torch.exp(i)
    return _sigmoid(o) * c / n, [c, n, m]


def zoneout_lstm(x, h, states, W, R, biases, _, d_h, d_c):
    """Krueger et al. 2017, section 3.3: d_h and d_c are the masks of what stays; gates in the order i, f, g, o."""
    (c,) = states
    i, f, g, o = (x @ W.T + h @ R.T + sum(biases)).split(H, dim=1)
    new = _sigmoid(f) * c + _sigmoid(i) * torch.tanh(g)
    return d_h * h + (1 - d_h) * (_sigmoid(o) * torch.tanh(new)), [d_c * c + (1 - d_c) * new]


EQUATIONS = {of.__name__: of for of in (cifg, minimal_gated_unit, peephole_lstm, slstm, zoneout_lstm)}
P_H, P_C = 0.3, 0.6
zoneout = catalogue.zoneout(P_H, P_C)


def _problem(name: str, device, backend: str, **options):
    cell = zoneout if name == "zoneout_lstm" else getattr(catalogue, name)
    module = Recurrent(cell, I, H, dtype=torch.float64, device=device, backend=backend, precision="ieee", **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype))
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    rows = 2 if module.bidirectional else 1
    hx = [torch.randn(rows, B, H, dtype=torch.float64, device=device) for _ in range(1 + len(cell.states))]
    if name == "slstm":
        hx[2], hx[3] = hx[2].exp(), torch.zeros_like(hx[3])  # a positive normalizer of the scale exp(0)
    return module, x, tuple(t.requires_grad_() for t in hx)


def _loop(name: str, module, x: Tensor, hx, lengths, starts: Tensor, masks):
    """y and every direction's last states, row by row and step by step. starts [T, B]: where the state is zero before the step;
    masks [n, T, B, D * H], or n probabilities."""
    outputs, last = [], []
    for d, suffix in enumerate(("_l0", "_l0_reverse")[: 2 if module.bidirectional else 1]):
        W, R, b_ih, b_hh = (getattr(module, p + suffix) for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        own = [getattr(module, f"weight_{p}{suffix}") for p in module.cell.parameters]
        rows = []
        for b in range(B):
            h, states, ys = hx[0][d, b : b + 1], [s[d, b : b + 1] for s in hx[1:]], {}
            for t in range(lengths[b]) if d == 0 else reversed(range(lengths[b])):
                if t + d < lengths[b] and starts[t + d, b]:
                    h, states = torch.zeros_like(h), [torch.zeros_like(s) for s in states]
                drawn = masks if isinstance(masks, tuple) else masks[:, t, b, d * H : (d + 1) * H]
                h, states = EQUATIONS[name](x[t, b : b + 1], h, states, W, R, (b_ih, b_hh), own, *drawn)
                ys[t] = h
            rows.append(torch.cat([ys.get(t, torch.zeros_like(h)) for t in range(T)]))
            last.append((h, *states))
        outputs.append(torch.stack(rows, dim=1))
    return torch.cat(outputs, dim=2), *(torch.cat(states).view(-1, B, H) for states in zip(*last))


@pytest.mark.parametrize("backend", ["triton", "triton-stepwise", "reference"])
@pytest.mark.parametrize(
    "name, case", [*itertools.product(EQUATIONS, ["plain", "resets and lengths"]), ("zoneout_lstm", "evaluation")]
)
def test_papers_equations(name, case, backend, device):
    """With resets and lengths also where the backward rebuilds the gates."""
    segmented = case == "resets and lengths"
    module, x, hx = _problem(name, device, backend, bidirectional=segmented, recompute=segmented)
    module.train(case != "evaluation")
    starts, lengths, options = torch.zeros(T, B, dtype=torch.bool), [T] * B, {}
    if segmented:
        starts[2, 0] = starts[4, 0] = starts[1, 1] = True
        lengths = [T, 3, 0]
        options = dict(resets=starts.to(device), lengths=torch.tensor(lengths, device=device))
    with philox.seeded(11):
        y, last = module(x, hx if module.cell.states else hx[0], **options)
    last = last if module.cell.states else (last,)
    masks = tuple(module.cell.masks.values())
    if masks and module.training:
        masks = philox.masks(11, masks, (T, B, y.shape[2]), torch.float64).to(device)
    n = 1 if name == "slstm" else len(last)  # its other states are scaled
    found, expected = (y, *last[:n]), _loop(name, module, x, hx, lengths, starts, masks)[: 1 + n]
    leaves = [x, *hx[:3], *module.parameters()]  # without m, which is not among the equations
    cotangents = [torch.randn_like(t) for t in found]
    gradients = [torch.autograd.grad(of, leaves, cotangents) for of in (found, expected)]
    within = dict(rtol=0, atol=1e-12) if name == "zoneout_lstm" else dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close([*found, *gradients[0]], [*expected, *gradients[1]], **within)


@BOTH
@pytest.mark.parametrize("name, bias", [("peephole_lstm", True), ("slstm", False), ("zoneout_lstm", True)])
def test_one_step_is_that_of_the_layer(name, bias, backend, device):
    """With the same masks, where there are any."""
    module, x, hx = _problem(name, device, backend, bias=bias)
    cell = RecurrentCell(module.cell, I, H, bias, device, torch.float64, backend=backend, precision="ieee")
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in module.state_dict().items()})
    for training in (True, False):
        results = []
        for m, given, states in (module, x[:1], hx), (cell, x[0], tuple(s[0] for s in hx)):
            m.train(training)
            with philox.seeded(5):
                found = m(given, states)
            found = [s[0] for s in found[1]] if m is module else list(found)
            total = sum(t.square().sum() for t in found)
            results.append([*found, *torch.autograd.grad(total, [x, *hx, *m.parameters()])])
        torch.testing.assert_close(*results, rtol=0, atol=1e-11)
    assert torch.equal(cell.train()(x[0])[0], cell(x[0])[0]) == (not cell.cell.masks)
    assert cell(x[0, 0])[0].shape == (H,)


# ---- several states in a module's arguments and results --------------------------------------------------------------


@BOTH
def test_every_state_of_every_step(backend, device):
    module, x, hx = _problem("slstm", device, backend, batch_first=True)
    x = x.transpose(0, 1)
    y, last, states = module(x, hx, return_states=True)
    assert len(states) == 3 and all(s.shape == y.shape for s in states)
    stopped = module(x[:, :3], hx)[1]
    torch.testing.assert_close([s[:, 2] for s in (y, *states)], [s[0] for s in stopped], rtol=0, atol=1e-12)
    torch.testing.assert_close([s[:, -1] for s in (y, *states)], [s[0] for s in last], rtol=0, atol=0)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [T, 3, 2], batch_first=True)
    *_, of_packed = module(packed, hx, return_states=True)
    torch.testing.assert_close(of_packed[1].data[0], states[1][0, 0], rtol=0, atol=1e-12)
    alone, of_alone, one = module(x[0], tuple(s[:, 0] for s in hx), return_states=True)
    torch.testing.assert_close([alone, *one], [s[0] for s in (y, *states)], rtol=0, atol=1e-12)
    assert [s.shape for s in of_alone] == [(1, H)] * 4


@BOTH
def test_a_reset_state_broadcasts(backend, device):
    """To learned numbers of each unit, one for each state."""
    module, x, hx = _problem("slstm", device, backend)
    start = torch.randn(H, device=device, dtype=torch.float64), *torch.tensor([0.3, 1.0, 0.0], device=device).double()
    resets = torch.zeros(T, B, dtype=torch.bool, device=device)
    resets[2] = True
    y = module(x, hx, resets=resets, reset_state=start)[0]
    again = tuple(s.expand(1, B, H).contiguous() for s in start)
    torch.testing.assert_close(y[2:], module(x[2:], again)[0], rtol=0, atol=1e-12)


def test_errors_of_states(device):
    module, x, hx = _problem("slstm", device, "reference")
    with pytest.raises(TypeError, match=r"slstm has states c, n, m: hx must be a tuple of four Tensors \(h, c, n, m\)"):
        module(x, hx[:2])
    with pytest.raises(RuntimeError, match="the states c and m must have the same size"):
        module(x, (*hx[:3], hx[3][..., 1:]))
    with pytest.raises(RuntimeError, match="c and n must have the same dtype"):
        module(x, (*hx[:2], hx[2].float(), hx[3]))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
        module(x, (hx[0], *(s[:, 1:] for s in hx[1:])))
    cell = RecurrentCell(module.cell, I, H, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="hidden1|cx"):
        cell(x[0], (hx[0][0], *(s[0, :, 1:] for s in hx[1:])))
    peephole, x, hx = _problem("peephole_lstm", device, "reference")
    assert [n for n, _ in peephole.named_parameters()][4:] == ["weight_pi_l0", "weight_pf_l0", "weight_po_l0"]
    peephole.weight_pi_l0 = torch.nn.Parameter(torch.zeros(H, device=device))
    with pytest.raises(RuntimeError, match="dtype"):
        peephole(x, hx)
