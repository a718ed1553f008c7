"""Resets and lengths on a CPU: torch's own kernels with filler steps, as accurate as the reference."""

import pytest
import torch
from support import segmented
from support.lstms import assert_close, flat, gradients, pair, states
from torch.func import functional_call

from lstm_triton import LSTM, reference

FEATURES = {
    "resets": ["zero", None],
    "rows": ["lengths", "full"],
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "bidirectional": [False, True],
    "num_layers": [1, 2],
    "dropout": [0.0, 0.5],
    "batch_first": [False, True],
    "bias": [True, False],
    "projection": [False, True],
    "cells": [False, True],
}
ROWS = [row for row in segmented.pairwise(FEATURES) if row["resets"] or row["cells"] or row["rows"] == "lengths"]


@pytest.fixture
def no_reference(monkeypatch):
    """Nothing may be left to the reference."""

    def refuse(*args, **kwargs):
        raise AssertionError("the reference was called")

    def allow():
        monkeypatch.undo()

    monkeypatch.setattr(reference, "lstm_layer", refuse)
    return allow


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(map(str, row.values())))
def test_accuracy(row):
    segmented.judge(segmented.Case(T=7, B=4, I=3, H=5, **row), torch.device("cpu"), "auto")


@pytest.mark.parametrize(
    "features",
    [{"resets"}, {"lengths"}, {"resets", "lengths"}, {"return_cell_states"}, {"resets", "return_cell_states"}],
    ids=sorted,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_kernels_serve(features, dtype, no_reference):
    """Also where rows have no steps, where every step is a reset, and where no row has any step."""
    ours, plain = LSTM(3, 5, bidirectional=True, dtype=dtype), LSTM(3, 5, bidirectional=True, dtype=dtype)
    plain.backend = "reference"
    plain.load_state_dict(ours.state_dict())
    x, hx = torch.randn(4, 3, 3, dtype=dtype), states(ours, 3)
    hx = tuple(s.to(dtype) for s in hx)
    arguments = {"resets": torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1]], dtype=torch.bool)}
    arguments["lengths"] = torch.tensor([4, 0, 2])
    arguments["return_cell_states"] = True
    arguments = {name: arguments[name] for name in sorted(features)}
    calls = [arguments]
    if "lengths" in features:
        calls += [arguments | {"lengths": torch.tensor(lengths)} for lengths in ([0, 0, 0], [4, 4, 4])]
    if "resets" in features:  # at one step alone, and at none
        one = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
        calls += [arguments | {"resets": one}, arguments | {"resets": torch.zeros_like(one)}]
    found = [flat(ours(x, hx, **call)) for call in calls]
    no_reference()
    for results, call in zip(found, calls):
        expected = flat(plain(x, hx, **call))
        for result, wanted in zip(results, expected):
            torch.testing.assert_close(result, wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["x", "h0", "c0"])
@pytest.mark.parametrize("starts", [[2], [2, 4]])
def test_what_is_not_finite_stays_in_its_segment(starts, place, value):
    theirs, ours = pair(3, 5, backend="auto", device="cpu")
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    tensors = {"x": x, **dict(zip(("h0", "c0"), states(ours, 2)))}
    spoilt = {name: t.clone() for name, t in tensors.items()}
    spoilt[place].select(-2, 0)[0] = value  # of row 0 the first step, or the state before it
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[starts, 0] = True
    clean, found = (flat(ours(t["x"], (t["h0"], t["c0"]), resets=resets)) for t in (tensors, spoilt))
    assert_close([found[0][2:], found[0][:, 1], found[1][:, :], found[2]], [clean[0][2:], clean[0][:, 1], *clean[1:]])
    expected, _ = theirs(spoilt["x"][:2], (spoilt["h0"], spoilt["c0"]))
    torch.testing.assert_close(found[0][:2], expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_derivatives(dtype, no_reference):
    """torch's kernels have them on a CPU, and so have segments."""
    case = segmented.Case(T=4, B=3, num_layers=2, bidirectional=True, rows="lengths", resets="zero", dtype=dtype)
    drawn = []
    for backend in ("auto", "reference"):
        data = segmented.draw(case, torch.device("cpu"))
        inputs = [t.requires_grad_() for t in data.inputs]
        module = case.module(backend)
        module.precision = None
        names = [name for name, _ in module.named_parameters()]
        options = {"resets": data.resets, "lengths": data.lengths}
        call = (inputs[0], tuple(inputs[1:3]))
        outputs = flat(functional_call(module, dict(zip(names, inputs[3:])), call, options))
        first = torch.autograd.grad([t.pow(2).sum() for t in outputs], inputs, create_graph=True)
        drawn.append([*first, *gradients([sum(g.pow(2).sum() for g in first)], inputs)])
        no_reference()
    for found, expected in zip(*drawn, strict=True):
        atol = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
