"""Random masks of cells, and zoneout: beside loops written from the paper's equations, in float64 with all gradients."""

import copy
import math
import pickle

import pytest
import torch
from support import philox, recurrents

from lstm_triton import Cell, Recurrent, RecurrentCell, cell
from lstm_triton.cells import CellError, catalogue

T, B, I, H = 5, 3, 4, 6
P_H, P_C = 0.3, 0.6
BACKENDS = pytest.mark.parametrize("backend", ["triton", "triton-stepwise", "reference"])
zoneout = catalogue.zoneout(P_H, P_C)


def _layer(device, backend: str, cell: Cell = zoneout, **options) -> Recurrent:
    return Recurrent(cell, I, H, dtype=torch.float64, device=device, backend=backend, precision="ieee", **options)


def _normal(device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


def _krueger(x, h, c, W, R, b, d_h, d_c):
    """Krueger et al. 2017, equations of section 3.3: d_h and d_c are the masks of what stays; gates in the order i, f, g, o."""
    i, f, g, o = (x @ W.T + h @ R.T + b).split(H, dim=-1)
    i, f, o = (1 / (1 + torch.exp(-z)) for z in (i, f, o))
    new = f * c + i * torch.tanh(g)
    return d_h * h + (1 - d_h) * (o * torch.tanh(new)), d_c * c + (1 - d_c) * new


def _loop(layer: Recurrent, x, hx, masks, starts, lengths):
    """Row by row and step by step; masks [2, T, B, D * H], or the two probabilities. Returns y, h_n, c_n."""
    outputs, last = [], []
    for d, suffix in enumerate(("_l0", "_l0_reverse")[: 2 if layer.bidirectional else 1]):
        W, R, b_ih, b_hh = (getattr(layer, p + suffix) for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        for b in range(B):
            (h, c), ys = (s[d, b] for s in hx), {}
            for t in range(lengths[b]) if d == 0 else reversed(range(lengths[b])):
                if t + d < lengths[b] and starts[t + d, b]:
                    h, c = torch.zeros_like(h), torch.zeros_like(c)
                drawn = masks if isinstance(masks, tuple) else masks[:, t, b, d * H : (d + 1) * H]
                h, c = _krueger(x[t, b], h, c, W, R, b_ih + b_hh, *drawn)
                ys[t] = h
            outputs.append(torch.stack([ys.get(t, torch.zeros_like(h)) for t in range(T)]))
            last.append((h, c))
    y = torch.stack(outputs, 1).view(T, -1, B, H).transpose(1, 2).flatten(2)
    return y, *(torch.stack(states).view(-1, B, H) for states in zip(*last))


@BACKENDS
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", ["training", "evaluation", "resets and lengths"])
def test_zoneout_is_that_of_the_paper(case, recompute, backend, device):
    segmented = case == "resets and lengths"
    layer = _layer(device, backend, bidirectional=segmented, recompute=recompute).train(case != "evaluation")
    D = 2 if segmented else 1
    x, hx = _normal(device, T, B, I), (_normal(device, D, B, H), _normal(device, D, B, H))
    starts, lengths, options = torch.zeros(T, B, dtype=torch.bool), [T] * B, {}
    if segmented:
        starts[2, 0] = starts[4, 0] = starts[1, 1] = True
        lengths = [T, 3, 0]
        options = dict(resets=starts.to(device), lengths=torch.tensor(lengths, device=device))
    with philox.seeded(11):
        y, states = layer(x, hx, **options)
    masks = philox.masks(11, (P_H, P_C), (T, B, D * H), torch.float64).to(device) if layer.training else (P_H, P_C)
    results, expected = (y, *states), _loop(layer, x, hx, masks, starts, lengths)
    leaves, cotangents = [x, *hx, *layer.parameters()], [torch.randn_like(t) for t in results]
    gradients = [torch.autograd.grad(of, leaves, cotangents) for of in (results, expected)]
    torch.testing.assert_close([*results, *gradients[0]], [*expected, *gradients[1]], rtol=0, atol=1e-12)


@BACKENDS
def test_zoneout_of_no_unit_is_the_lstm_and_of_all_keeps_the_state(backend, device):
    x, hx = _normal(device, T, B, I), (_normal(device, 1, B, H), _normal(device, 1, B, H))
    lstm = torch.nn.LSTM(I, H, dtype=torch.float64, device=device)
    for p_h, p_c in ((0.0, 0.0), (1.0, 1.0)):
        layer = _layer(device, backend, catalogue.zoneout(p_h, p_c))
        layer.load_state_dict(lstm.state_dict())
        y, (h, c) = layer(x, hx)
        expected, states = lstm(x, hx) if p_h == 0 else (hx[0].expand(T, B, H), hx)
        torch.testing.assert_close((y, h, c), (expected, *states), rtol=0, atol=1e-12)


# ---- the random numbers ----------------------------------------------------------------------------------------------


@cell(gates="a", masks={"u": 0.2, "v": 0.5, "w": 0.5})
def shows(z, s, m):
    """The masks as digits of h."""
    return 0 * z.a + m.u + 10 * m.v + 100 * m.w, {}


@BACKENDS
def test_masks_differ_everywhere_and_follow_the_seed(backend, device):
    layer = _layer(device, backend, shows, bidirectional=True)
    x = torch.randn(10, 8, I, dtype=torch.float64, device=device)
    torch.manual_seed(3)
    y, other = layer(x)[0], layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(y, layer(x)[0]) and not torch.equal(y, other)
    for n, p in enumerate((0.2, 0.5, 0.5)):
        mask = y.div(10**n).floor() % 10
        assert abs(mask.mean().item() - p) < 5 * math.sqrt(p * (1 - p) / mask.numel())
        for dim in range(3):
            assert (mask != mask.select(dim, 0).unsqueeze(dim)).any(), "not the same for all steps, rows or units"
        assert (mask[..., :H] != mask[..., H:]).any(), "nor for both directions"
    v, w = y.div(10).floor() % 10, y.div(100).floor()
    assert (v != w).any()
    expected = 0.2 + 5.0 + 50.0
    torch.testing.assert_close(layer.eval()(x)[0], torch.full_like(y, expected), rtol=0, atol=1e-12)


@BACKENDS
def test_one_step_draws_as_a_layer_does(backend, device):
    layer = _layer(device, backend)
    step = RecurrentCell(
        zoneout,
        I,
        H,
        dtype=torch.float64,
        device=device,
        backend=backend.removesuffix("-stepwise"),
        precision="ieee",
    )
    step.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x, hx = _normal(device, 1, B, I), (_normal(device, 1, B, H), _normal(device, 1, B, H))
    for training in (True, False):
        layer.train(training), step.train(training)
        with philox.seeded(5):
            states = layer(x, hx)[1]
        with philox.seeded(5):
            found = step(x[0], tuple(s[0] for s in hx))
        torch.testing.assert_close(found, tuple(s[0] for s in states), rtol=0, atol=1e-12)
        of_layer, of_step = (
            torch.autograd.grad(sum(t.square().sum() for t in of), [x, *hx, *m.parameters()])
            for of, m in ((states, layer), (found, step))
        )
        torch.testing.assert_close(of_step, of_layer, rtol=0, atol=1e-12)
    assert not torch.equal(step.train()(x[0])[0], step(x[0])[0])
    one = step(x[0, 0])
    assert one[0].shape == (H,)


# ---- what else runs modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_under_vmap(backend, device):
    layer = _layer(device, backend)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device).expand(2, T, B, I)

    def y(x):
        return layer(x)[0]

    same, other = (torch.func.vmap(y, randomness=kind)(x) for kind in ("same", "different"))
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-12)
    assert (other[0] - other[1]).abs().max() > 0.01
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(y)(x)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_and_checkpoint(backend, device):
    layer = Recurrent(zoneout, I, H, device=device, backend=backend)
    x = torch.randn(T, B, I, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16), philox.seeded(3):
        y, (h, c) = layer(x)
    assert {t.dtype for t in (y, h, c)} == {torch.bfloat16}
    with philox.seeded(3):
        torch.testing.assert_close(y.float(), layer(x)[0], rtol=0, atol=0.02)
    torch.manual_seed(1)
    y = layer(x)[0]
    torch.manual_seed(1)
    again = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    gradients = [torch.autograd.grad(of.square().sum(), [x, *layer.parameters()]) for of in (y, again)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiled_and_traced(backend, device):
    """They draw anew in each call."""
    layer, x = _layer(device, backend), torch.randn(T, B, I, dtype=torch.float64, device=device)
    exported = torch.export.export(layer, (x,)).module()
    for of in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.jit.trace(layer, x, check_trace=False),
        exported,
    ):
        first, second = of(x)[0], of(x)[0]
        assert first.shape == (T, B, H) and not torch.equal(first, second)
    layer.eval()
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x)[0], layer(x)[0], rtol=0, atol=1e-12)


def test_copied_and_pickled(device):
    layer = _layer(device, "reference").eval()
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    assert copy.deepcopy(layer).cell is zoneout
    assert repr(layer) == "Recurrent(zoneout_lstm(h=0.3, c=0.6), 4, 6, precision='ieee', backend='reference')"
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.cell.key == zoneout.key and again.cell.masks == {"h": P_H, "c": P_C}
        torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)
    assert catalogue.zoneout(0.1).key != catalogue.zoneout(0.2).key


def test_no_mask_is_held(device):
    """Between forward and backward there is a seed, no more."""
    held = []
    for module in (_layer(device, "triton"), _layer(device, "triton").eval()):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.setdefault(t.data_ptr(), t), lambda t: t):
            module(torch.randn(T, B, I, dtype=torch.float64, device=device))
        held.append(sum(t.nbytes for t in kept.values()))
    assert held[0] == held[1] + 8


REFUSED = {
    "four": (dict.fromkeys("uvwx", 0.5), lambda z, s, m: (z.a * m.u * m.v * m.w * m.x, {}), "at most 3 masks"),
    "a probability": ({"u": 1.5}, lambda z, s, m: (z.a * m.u, {}), "probabilities between 0 and 1"),
    "no probabilities": ("u", lambda z, s, m: (z.a * m.u, {}), "names with probabilities"),
    "not used": ({"u": 0.5}, lambda z, s, m: (z.a, {}), "the mask 'u' is not used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    masks, function, message = REFUSED[case]
    with pytest.raises(CellError, match=message):
        Cell(function, "a", masks=masks)


# ---- the kernels, by the tolerance rule and on compiled code ---------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_accurate_as_torch(dtype, device):
    """Several programs that wait for each other."""
    options = dict(resets=True, lengths=True, precision="ieee", device=device)
    problem = recurrents.draw(zoneout, 4, 3, 5, 150, dtype, **options)
    recurrents.assert_as_accurate_as_torch(problem.run("triton"), problem)


def test_a_division_by_a_mask_leaves_no_nan(device):
    """Where it was 0, past the ends of rows: no gradient comes back from there."""

    @cell(gates="a", masks={"u": 0.5})
    def divides(z, s, m):
        return torch.where(m.u > 0, torch.tanh(z.a) / m.u, 0 * z.a), {}

    problem = recurrents.draw(divides, 4, 3, 5, 7, torch.float64, lengths=True, device=device)
    problem.run("triton")
    assert "tl.where" in divides.triton_source().partition("def backward")[2]
