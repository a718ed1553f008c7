"""Resets and lengths on a CPU: torch's own kernels with filler steps, as accurate as the reference."""

import contextlib
from unittest import mock

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


@contextlib.contextmanager
def without_the_reference():
    with mock.patch.object(reference, "lstm_layer", None):
        yield


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(map(str, row.values())))
def test_accuracy(row):
    segmented.judge(segmented.Case(T=7, B=4, I=3, H=5, **row), torch.device("cpu"), "auto", without_the_reference())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_segments(dtype):
    """Where no row, or each, has steps, and where restarts are at every step, at one step alone, or nowhere."""
    ours, plain = (LSTM(3, 5, bidirectional=True, dtype=dtype, backend=backend) for backend in ("auto", "reference"))
    plain.load_state_dict(ours.state_dict())
    x, hx = torch.randn(4, 3, 3, dtype=dtype), states(ours, 3)
    every, no = torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)
    one = torch.arange(4)[:, None] == torch.tensor([2, 2, 7])
    calls = [{"lengths": torch.tensor(lengths)} for lengths in ([0, 0, 0], [4, 4, 4], [4, 0, 2])]
    calls += [{"resets": resets} | more for resets in (every, one, no) for more in ({}, calls[-1])]
    for call in calls:
        call = call | {"return_cell_states": True}
        with without_the_reference():
            found = flat(ours(x, hx, **call))
        for result, expected in zip(found, flat(plain(x, hx, **call))):
            torch.testing.assert_close(result, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


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


def test_second_derivatives():
    """torch's kernels have them on a CPU, and so have segments."""
    case = segmented.Case(T=4, B=3, num_layers=2, bidirectional=True, rows="lengths", resets="zero")
    data, drawn = segmented.draw(case, torch.device("cpu")), []
    inputs = [t.requires_grad_() for t in data.inputs]
    for backend, context in (("auto", without_the_reference()), ("reference", contextlib.nullcontext())):
        module = case.module(backend)
        module.precision = None
        weights = {name: t for (name, _), t in zip(module.named_parameters(), inputs[3:])}
        options = {"resets": data.resets, "lengths": data.lengths}
        with context:
            outputs = flat(functional_call(module, weights, (inputs[0], tuple(inputs[1:3])), options))
            first = torch.autograd.grad([t.pow(2).sum() for t in outputs], inputs, create_graph=True)
            drawn.append([*first, *gradients([sum(g.pow(2).sum() for g in first)], inputs)])
    torch.testing.assert_close(*drawn, rtol=1e-12, atol=1e-12)
