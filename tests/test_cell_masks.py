"""Random masks of cells. test_cell_catalogue has zoneout beside the paper's equations, test_lstm_dropout what runs modules."""

import copy
import math
import pickle

import pytest
import torch
from support import segmented

from lstm_triton import Cell, Recurrent, cell
from lstm_triton.cells import catalogue

T, B, I, H = 5, 3, 4, 6
P_H, P_C = 0.3, 0.6
zoneout = catalogue.zoneout(P_H, P_C)


def _layer(device, backend: str, cell: Cell = zoneout, **options) -> Recurrent:
    return Recurrent(cell, I, H, dtype=torch.float64, device=device, backend=backend, precision="ieee", **options)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_zoneout_of_no_unit_is_the_lstm_and_of_all_keeps_the_state(backend, device):
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    hx = tuple(torch.randn(2, 1, B, H, dtype=torch.float64, device=device))
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


@pytest.mark.parametrize("backend", ["triton", "reference"])  # test_cell_catalogue has those of single steps
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


# ---- what else runs modules ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_compiled_and_traced(device):
    """They draw anew in each call."""
    layer, x = _layer(device, "triton"), torch.randn(T, B, I, dtype=torch.float64, device=device)
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


# ---- the kernels, by the tolerance rule and on compiled code ---------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_accurate_as_torch(dtype, device):
    """Several programs that wait for each other."""
    options = dict(resets="zero", rows="lengths", cell=zoneout, dtype=dtype)
    H = 12 if dtype == torch.float32 else 40
    segmented.judge(segmented.Case(T=4, B=3, I=5, H=H, **options), device)


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
