"""Ready-made cells that torch does not have, beside loops written from the papers' equations, in float64 with all gradients;
several states in a module's arguments; and random masks (test_lstm_dropout has what else runs modules with masks)."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from support import philox, segmented
from torch import Tensor

from lstm_triton import Recurrent, RecurrentCell, cell
from lstm_triton.cells import catalogue

T, B, I, H = 5, 3, 4, 6
BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])
ZONEOUT = catalogue.zoneout(0.3, 0.6)


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def cifg(x, h, states, W, R, biases, _):
    """Greff et al. 2017, section III: the LSTM with i = 1 - f; gates in the order f, z, o."""
    (c,) = states
    f, z, o = (x @ W.T + h @ R.T + sum(biases)).split(H, dim=1)
    c = torch.tanh(z) * (1 - _sigmoid(f)) + c * _sigmoid(f)
    return torch.tanh(c) * _sigmoid(o), c


def minimal_gated_unit(x, h, _, W, R, biases, __):
    """Zhou et al. 2016, table 1, but for the place of f: h U + b times f, as in torch's GRU; gates in the order f, n."""
    (f_x, n_x), (f_h, n_h) = ((t @ m.T + b).split(H, dim=1) for t, m, b in ((x, W, biases[0]), (h, R, biases[1])))
    f = _sigmoid(f_x + f_h)
    return ((1 - f) * h + f * torch.tanh(n_x + f * n_h),)


def peephole_lstm(x, h, states, W, R, biases, peepholes):
    """Greff et al. 2017, section II.B, with block input z; gates in the order i, f, z, o."""
    (c,), (p_i, p_f, p_o) = states, peepholes
    i, f, z, o = (x @ W.T + h @ R.T + sum(biases)).split(H, dim=1)
    i, f = _sigmoid(i + p_i * c), _sigmoid(f + p_f * c)
    c = torch.tanh(z) * i + c * f
    return torch.tanh(c) * _sigmoid(o + p_o * c), c


def slstm(x, h, states, W, R, biases, _):
    """Beck et al. 2024, equations 8 to 17, f a sigmoid, without the stabilizer: in float64 the exponentials stay in range.

    The third state of ours only scales the other two: c and n here are c exp(m) and n exp(m) there.
    """
    c, n, m = states
    i, f, z, o = (x @ W.T + h @ R.T + sum(biases)).split(H, dim=1)
    c = _sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
    n = _sigmoid(f) * n + torch.exp(i)
    return _sigmoid(o) * c / n, c, n, m


def zoneout_lstm(x, h, states, W, R, biases, _, d_h, d_c):
    """Krueger et al. 2017, section 3.3: d_h and d_c are the masks of what stays; gates in the order i, f, g, o."""
    (c,) = states
    i, f, g, o = (x @ W.T + h @ R.T + sum(biases)).split(H, dim=1)
    new = _sigmoid(f) * c + _sigmoid(i) * torch.tanh(g)
    return d_h * h + (1 - d_h) * (_sigmoid(o) * torch.tanh(new)), d_c * c + (1 - d_c) * new


EQUATIONS = {of.__name__: of for of in (cifg, minimal_gated_unit, peephole_lstm, slstm, zoneout_lstm)}


def _layer(of, device, backend: str, **options) -> Recurrent:
    return Recurrent(of, I, H, dtype=torch.float64, device=device, backend=backend, precision="ieee", **options)


def _problem(name: str, device, backend: str, **options):
    module = _layer(ZONEOUT if name == "zoneout_lstm" else getattr(catalogue, name), device, backend, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype))
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    rows = 2 if module.bidirectional else 1
    hx = [torch.randn(rows, B, H, dtype=torch.float64, device=device) for _ in range(1 + len(module.cell.states))]
    if name == "slstm":
        hx[2], hx[3] = hx[2].exp(), torch.zeros_like(hx[3])  # a positive normalizer of the scale exp(0)
    return module, x, tuple(t.requires_grad_() for t in hx)


def _loop(module, x: Tensor, hx, inside: Tensor, starts: Tensor, masks: Tensor):
    """y and every direction's last states, step by step. [T, B]: steps inside their rows, and those that start from zeros;
    masks [n, T, B, D * H], or n probabilities."""
    outputs, last = [], []
    for d, suffix in enumerate(("_l0", "_l0_reverse")[: 2 if module.bidirectional else 1]):
        W, R, b_ih, b_hh = (getattr(module, p + suffix) for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        own = [getattr(module, f"weight_{p}{suffix}") for p in module.cell.parameters]
        states, y = [s[d] for s in hx], [x] * T
        for t in range(T) if d == 0 else reversed(range(T)):
            if t + d < T:  # backwards, a segment is entered where the next one starts
                fresh = (starts & inside)[t + d, :, None]
                states = [torch.where(fresh, 0.0, s) for s in states]
            drawn = masks if masks.dim() == 1 else masks[:, t, :, d * H : (d + 1) * H]
            new = EQUATIONS[module.cell.name](x[t], states[0], states[1:], W, R, (b_ih, b_hh), own, *drawn)
            states = [torch.where(inside[t, :, None], after, s) for after, s in zip(new, states)]
            y[t] = torch.where(inside[t, :, None], new[0], 0.0)
        outputs.append(torch.stack(y))
        last.append(states)
    return torch.cat(outputs, dim=2), *(torch.stack(states) for states in zip(*last))


@pytest.mark.parametrize("backend", ["triton", "triton-stepwise", "reference"])
@pytest.mark.parametrize(
    "name, case", [*itertools.product(EQUATIONS, ["plain", "resets and lengths"]), ("zoneout_lstm", "evaluation")]
)
def test_papers_equations(name, case, backend, device):
    """With resets and lengths also where the backward rebuilds the gates."""
    with_segments = case == "resets and lengths"
    module, x, hx = _problem(name, device, backend, bidirectional=with_segments, recompute=with_segments)
    module.train(case != "evaluation")
    starts, lengths, options = torch.zeros(T, B, dtype=torch.bool), torch.tensor([T, T, T]), {}
    if with_segments:
        starts[2, 0] = starts[4, 0] = starts[1, 1] = starts[3, 1] = True  # the last one is past the end of its row
        lengths = torch.tensor([T, 3, 0])
        options = dict(resets=starts.to(device), lengths=lengths.to(device))
    with philox.seeded(11):
        y, last = module(x, hx if module.cell.states else hx[0], **options)
    last = last if module.cell.states else (last,)
    masks = torch.tensor(list(module.cell.masks.values()), dtype=torch.float64)
    if len(masks) and module.training:
        masks = philox.masks(11, masks.tolist(), (T, B, y.shape[2]), torch.float64)
    n = 1 if name == "slstm" else len(last)  # its other states are scaled
    inside = torch.arange(T)[:, None] < lengths
    expected = _loop(module, x, hx, *(t.to(device) for t in (inside, starts, masks)))[: 1 + n]
    found = y, *last[:n]
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
    """And a reset state that broadcasts: to learned numbers of each unit, one for each state."""
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
    start = torch.randn(H, device=device, dtype=torch.float64), *torch.tensor([0.3, 1.0, 0.0], device=device).double()
    y = module(x, hx, resets=(torch.arange(T, device=device) == 2).expand(B, T), reset_state=start)[0]
    again = tuple(s.expand(1, B, H).contiguous() for s in start)
    torch.testing.assert_close(y[:, 2:], module(x[:, 2:], again)[0], rtol=0, atol=1e-12)


def test_errors_of_states(device):
    module, x, hx = _problem("slstm", device, "reference")
    for kind, message, given in (
        (TypeError, r"slstm has states c, n, m: hx must be a tuple of four Tensors \(h, c, n, m\)", hx[:2]),
        (RuntimeError, "the states c and m must have the same size", (*hx[:3], hx[3][..., 1:])),
        (RuntimeError, "c and n must have the same dtype", (*hx[:2], hx[2].float(), hx[3])),
        (RuntimeError, r"Expected hidden\[1\] size", (hx[0], *(s[:, 1:] for s in hx[1:]))),
    ):
        with pytest.raises(kind, match=message):
            module(x, given)
    cell = RecurrentCell(module.cell, I, H, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="hidden1|cx"):
        cell(x[0], (hx[0][0], *(s[0, :, 1:] for s in hx[1:])))
    peephole, x, hx = _problem("peephole_lstm", device, "reference")
    assert [n for n, _ in peephole.named_parameters()][4:] == ["weight_pi_l0", "weight_pf_l0", "weight_po_l0"]
    peephole.weight_pi_l0 = torch.nn.Parameter(torch.zeros(H, device=device))
    with pytest.raises(RuntimeError, match="dtype"):
        peephole(x, hx)


# ---- random masks ----------------------------------------------------------------------------------------------------


@BOTH
def test_zoneout_of_no_unit_is_the_lstm_and_of_all_keeps_the_state(backend, device):
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    hx = tuple(torch.randn(2, 1, B, H, dtype=torch.float64, device=device))
    lstm = torch.nn.LSTM(I, H, dtype=torch.float64, device=device)
    for p in (0.0, 1.0):
        layer = _layer(catalogue.zoneout(p, p), device, backend)
        layer.load_state_dict(lstm.state_dict())
        expected = lstm(x, hx) if p == 0 else (hx[0].expand(T, B, H), hx)
        torch.testing.assert_close(layer(x, hx), expected, rtol=0, atol=1e-12)


@cell(gates="a", masks={"u": 0.2, "v": 0.5, "w": 0.5})
def shows(z, s, m):
    """The masks as digits of h."""
    return 0 * z.a + m.u + 10 * m.v + 100 * m.w, {}


@BOTH
def test_masks_differ_everywhere_and_follow_the_seed(backend, device):
    layer = _layer(shows, device, backend, bidirectional=True)
    x = torch.randn(6, 8, I, dtype=torch.float64, device=device)
    torch.manual_seed(3)
    y, other = layer(x)[0], layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(y, layer(x)[0]) and not torch.equal(y, other)
    masks = [y.div(10**n).floor() % 10 for n in range(3)]
    for mask, p in zip(masks, (0.2, 0.5, 0.5)):
        assert abs(mask.mean().item() - p) < 5 * math.sqrt(p * (1 - p) / mask.numel())
        for dim in range(3):
            assert (mask != mask.select(dim, 0).unsqueeze(dim)).any(), "not the same for all steps, rows or units"
        assert (mask[..., :H] != mask[..., H:]).any(), "nor for both directions"
    assert (masks[1] != masks[2]).any()
    torch.testing.assert_close(layer.eval()(x)[0], torch.full_like(y, 0.2 + 5.0 + 50.0), rtol=0, atol=1e-12)


@pytest.mark.long
def test_compiled_and_traced(device):
    """They draw anew in each call."""
    layer, x = _layer(ZONEOUT, device, "triton"), torch.randn(2, 2, I, dtype=torch.float64, device=device)
    for of in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.jit.trace(layer, x, check_trace=False),
        torch.export.export(layer, (x,)).module(),
    ):
        assert not torch.equal(of(x)[0], of(x)[0])
    layer.eval()
    torch.testing.assert_close(torch.jit.trace(layer, x)(x)[0], layer(x)[0], rtol=0, atol=1e-12)


def test_copied_and_pickled(device):
    layer = _layer(ZONEOUT, device, "reference").eval()
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    assert copy.deepcopy(layer).cell is ZONEOUT
    assert repr(layer) == "Recurrent(zoneout_lstm(h=0.3, c=0.6), 4, 6, precision='ieee', backend='reference')"
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.cell.key == ZONEOUT.key and again.cell.masks == {"h": 0.3, "c": 0.6}
        torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)
    assert catalogue.zoneout(0.1).key != catalogue.zoneout(0.2).key


@pytest.mark.compiled
@pytest.mark.parametrize("dtype, H", [(torch.float32, 12), (torch.bfloat16, 40)], ids=str)
def test_masks_of_programs_that_wait_for_each_other(dtype, H, device):
    case = segmented.Case(T=4, B=3, I=5, H=H, resets="zero", rows="lengths", cell=ZONEOUT, dtype=dtype)
    segmented.judge(case, device)


def test_a_division_by_a_mask_leaves_no_nan_past_the_ends_of_rows(device):
    """Where it is 0: no gradient comes back from there."""

    @cell(gates="a", masks={"u": 0.5})
    def divides(z, s, m):
        return torch.where(m.u > 0, torch.tanh(z.a) / m.u, 0 * z.a), {}

    case = segmented.Case(T=4, B=3, I=5, H=7, rows="lengths", cell=divides)
    drawn = segmented.draw(case, device)
    found, expected = (segmented.results(case, drawn, backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, expected, equal_nan=True)  # inside rows there are some
    for row, length in enumerate(drawn.lengths):
        assert not found[2][length:, row].any()
    assert "tl.where" in divides.triton_source().partition("def backward")[2]
