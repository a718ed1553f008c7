"""Dropout between the layers of LSTM; and what else runs modules with random masks, whose equations test_cell_catalogue has."""

import math
from functools import partial

import pytest
import torch
from support import philox
from support.lstms import backends, flat, pair, trained
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from lstm_triton import LSTM, Recurrent, operators
from lstm_triton.cells import catalogue
from lstm_triton.kernels.dropout import kept


@backends
def test_dropout_follows_the_seed_and_is_only_in_training(backend, device):
    theirs, lstm = pair(3, 4, 2, dropout=0.5, bidirectional=True, backend=backend, device=device)
    x = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 4]), enforce_sorted=False)
    for given in (x, packed):
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(flat(lstm(given)))
        assert all(map(torch.equal, runs[0], runs[1]))
        assert not torch.equal(runs[0][0], runs[2][0])
        assert torch.equal(runs[0][1][:2], runs[2][1][:2]), "the first layer's state is not dropped"
    with torch.backends.cudnn.flags(enabled=False):  # which has no backward in evaluation mode
        expected = trained(theirs.eval(), x)
    torch.testing.assert_close(trained(lstm.eval(), x), expected, rtol=0, atol=1e-12)


def test_dropout_is_that_of_philox(device):
    """`dropped` is what test_lstm_segments holds the kernels to; at p = 1, test_lstm holds them to torch's."""
    authors = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    assert philox.philox(0, 0, 0, 0, 0) == authors, "the authors' own test vector"
    seed, p, shape = 0x123456789ABCDEF0, 0.3, (5, 6, 8)
    given = torch.tensor([seed], device=device)
    for number in range(4):
        uniform = philox.uniform(seed, shape, number)
        assert (abs(uniform - p) > 1e-6).all()
        found = kept(given, p, shape, number)
        assert (found.cpu().numpy() == (uniform >= p)).all()
        assert abs(found.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / found.numel())
        for dim in range(3):  # not the same for all steps, rows or units
            assert (found != found.select(dim, 0).unsqueeze(dim)).any()
    y = torch.randn(shape, dtype=torch.float64, device=device)
    torch.testing.assert_close(operators.dropped(y, p, given), y / (1 - p) * kept(given, p, shape, 0))


def test_a_nan_is_not_dropped_and_a_probability_set_later_is_checked(device):
    """A NaN would show that something is wrong, as in torch."""
    lstm = LSTM(2, 3, 2, dropout=0.9, backend="triton", device=device)
    assert lstm(torch.full((3, 2, 2), math.nan, device=device))[0].isnan().all()
    lstm.dropout = 1.5
    with pytest.raises(RuntimeError, match="dropout probability has to be between 0 and 1"):
        lstm(torch.zeros(3, 2, 2, device=device))


# ---- what else runs modules with random masks ----------------------------------------------------------------------


def _drawing(masks: str, device, backend: str = "triton") -> LSTM | Recurrent:
    options = dict(dtype=torch.float64, device=device, backend=backend, precision="ieee")
    if masks == "dropout":
        return LSTM(2, 3, 2, dropout=0.4, **options)
    return Recurrent(catalogue.zoneout(0.3, 0.6), 2, 3, **options)


@pytest.mark.parametrize("masks", ["dropout", "zoneout"])
def test_no_mask_is_held(masks, device, monkeypatch):
    """Between forward and backward there is a seed; of dropout also the h that the next layer does not get."""
    monkeypatch.setattr(torch.nn.functional, "dropout", None)  # nor does dropout take a pass of its own
    module, saved = _drawing(masks, device), []
    for training in (True, False):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, h=held: h.setdefault(t.data_ptr(), t), lambda t: t):
            module.train(training)(torch.randn(5, 2, 2, dtype=torch.float64, device=device))
        saved.append(sum(t.nbytes for t in held.values()))
    h, seed = 5 * 2 * 3 * 8 * (masks == "dropout"), 8
    assert saved[0] == saved[1] + h + seed


def _gradient(f, x, _):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def _second(f, x, v):
    """The product of v and the second derivative."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient, x, v)[0]


def _difference(f, x, v, step=1e-5):
    gradients = []
    for sign in (1, -1):
        torch.manual_seed(7)
        gradients.append(_gradient(f, x + sign * step * v, v))
    return (gradients[0] - gradients[1]) / (2 * step)


# A function and its derivatives by a transform: f, x, v -> what is called once the seed is set.
TRANSFORMS = {
    "checkpoint": (lambda f, x, v: lambda: _gradient(partial(checkpoint, f, use_reentrant=False), x, v), _gradient),
    "vmap": (
        lambda f, x, v: lambda: torch.func.vmap(f, randomness="same")(torch.stack((x, v))),
        lambda f, x, v: torch.stack([torch.manual_seed(7) and f(t) for t in (x, v)]),
    ),
    "jacrev": (lambda f, x, v: lambda: torch.func.jacrev(f)(x), _gradient),
    "jacfwd": (lambda f, x, v: lambda: torch.func.jacfwd(f, randomness="same")(x), _gradient),
    "grad of grad": (
        lambda f, x, v: lambda: torch.func.grad(lambda t: (torch.func.grad(f)(t) * v).sum())(x),
        _second,
    ),
    "traced": (lambda f, x, v: partial(make_fx(lambda x, v: _second(f, x, v))(x, v), x, v), _second),
    "differences": (lambda f, x, v: lambda: _difference(f, x, v), _second),
}
CASES = [("dropout", "triton", name) for name in TRANSFORMS]
CASES += [("zoneout", backend, name) for backend in ("triton", "reference") for name in ("checkpoint", "vmap")]


@pytest.mark.long
@pytest.mark.parametrize("masks, backend, transform", CASES)
def test_derivatives_are_those_of_one_mask(transform, masks, backend, device):
    """It is the same under every transform, and no part of the derivative; a trace draws its own in each call."""
    module = _drawing(masks, device, backend).requires_grad_(False)
    x, v = torch.randn(2, 2, 2, 2, dtype=torch.float64, device=device)
    transformed, eager = TRANSFORMS[transform]

    def f(x):  # of the weights as well
        weights = {"weight_hh_l0": module.weight_hh_l0 * (1 + x.sum())}
        return (torch.func.functional_call(module, weights, (x,))[0] ** 3).sum()

    results = []
    for call in (transformed(f, x, v), partial(eager, f, x, v)):
        torch.manual_seed(7)
        results.append(call())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("masks, backend", [("dropout", "triton"), ("zoneout", "triton"), ("zoneout", "reference")])
def test_masks_that_differ_under_vmap(masks, backend, device):
    module = _drawing(masks, device, backend)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device).expand(2, 3, 2, 2)
    found = torch.func.vmap(lambda x: module(x)[0], randomness="different")(x)
    assert (found[0] - found[1]).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: module(x)[0])(x)
