"""What torch.nn.LSTM cannot do: resets, lengths, cell states, recomputation, alone and together, forward and backward.

Every pair of features is judged beside the reference, for the kernels and for torch's kernels with filler steps, which "auto"
takes on a CPU; what the features mean is shown for the reference.
"""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from support import segmented
from support.lstms import assert_close, flat, gradients, pair, states, trained, twice_differentiated
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lstm_triton import LSTM, reference

I, H = 2, 3
CPU = torch.device("cpu")


def without_the_reference():
    return mock.patch.object(reference, "lstm_layer", None)


# ---- every feature with every other --------------------------------------------------------------------------------

FEATURES = {
    "resets": [None, "zero", "stored", "shared"],
    "dtype": [torch.float64, torch.float32, torch.bfloat16],
    "rows": ["full", "lengths", "packed"],
    "bidirectional": [False, True],
    "num_layers": [1, 2],
    "dropout": [0.0, 0.5],
    "batch_first": [False, True],
    "bias": [True, False],
    "projection": [False, True],
    "cells": [False, True],
    "recompute": [False, True],
}
OF_FILLER_STEPS = {"resets": ["zero", None], "dtype": [*FEATURES["dtype"], torch.float16], "recompute": [False]}
OF_KERNELS = [
    *segmented.pairwise(FEATURES),
    dict(T=1, B=1, I=1, H=1, rows="lengths", resets="stored", bidirectional=True, cells=True),
    dict(T=34, B=2, H=1, resets="zero", bidirectional=True, recompute=True),
]
WHAT_THE_CELL_HAS_NOT = [dict(rows="lengths"), dict(resets="zero"), dict(num_layers=2, dropout=0.5)]
SINGLE_STEPS = [dict(T=1, B=6) | row for row in WHAT_THE_CELL_HAS_NOT]  # its kernels take no such step
ON_A_CPU = [dict(T=7, B=4, I=3, H=5) | row for row in segmented.pairwise(FEATURES | OF_FILLER_STEPS)]


def _rows(backend, rows, *marks):
    return [pytest.param(backend, row, marks=marks, id=" ".join([backend, *map(str, row.values())])) for row in rows]


@pytest.mark.parametrize(
    "backend, row",
    _rows("triton", OF_KERNELS, pytest.mark.compiled, pytest.mark.long)
    + _rows("triton", SINGLE_STEPS)
    + _rows("auto", ON_A_CPU),
)
def test_every_pair_of_features(backend, row, device):
    where = (device, backend) if backend == "triton" else (CPU, backend, without_the_reference())
    segmented.judge(segmented.Case(**row), *where)


def test_pairs_are_covered():
    rows = segmented.pairwise(FEATURES)
    assert len(rows) < 25 and all(list(row) == list(FEATURES) for row in rows)
    for a, b in itertools.combinations(FEATURES, 2):
        assert {(row[a], row[b]) for row in rows} == {*itertools.product(FEATURES[a], FEATURES[b])}


# ---- what resets and lengths mean ----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["zero", "stored", "one"])
def test_segments_run_separately(to, device):
    """One call with resets and lengths equals torch's own LSTM run on every segment of every row, in both directions."""
    T, B, L, lengths = 5, 3, 2, [5, 3, 4]
    theirs, ours = pair(I, H, L, bidirectional=True, backend="reference", device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    hx = states(ours, B, requires_grad=True)
    resets = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)
    shape = (H,) if to == "one" else (T, 2 * L, B, H)
    given = [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=to != "zero") for _ in range(2)]
    leaves, reset_state = [x, *hx, *(given if to != "zero" else [])], tuple(given) if to != "zero" else None
    segments = dict(resets=resets, reset_state=reset_state, lengths=torch.tensor(lengths, device=device))
    found = trained(ours, x, hx, leaves, **segments)

    stored = [(s if to != "zero" else torch.zeros_like(s)).expand(T, 2 * L, B, H) for s in given]
    outputs, last = [], []
    for b, length in enumerate(lengths):
        starts = [t for t in range(length) if resets[t, b]]
        cuts = sorted({0, length, *starts})
        of_row, ends = [], []
        for start, stop in zip(cuts, cuts[1:]):
            begin = []
            for initial, reset in zip(hx, stored):
                rows = initial[:, b].clone()
                if start in starts:
                    rows[0::2] = reset[start, 0::2, b]
                if stop < length:
                    rows[1::2] = reset[stop - 1, 1::2, b]
                begin.append(rows)
            y, end = theirs(x[start:stop, b], tuple(begin))
            of_row.append(y), ends.append(end)
        outputs.append(torch.cat([*of_row, y.new_zeros(T - length, 2 * H)]))
        # Forwards a row ends in its last segment, backwards in its first.
        last.append([torch.stack((f[0::2], r[1::2]), 1).flatten(0, 1) for f, r in zip(ends[-1], ends[0])])
    expected = [torch.stack(outputs, 1), *(torch.stack(t, 1) for t in zip(*last))]
    assert_close(found, [*(t.detach() for t in expected), *gradients(expected, [*leaves, *theirs.parameters()])])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_packed_and_unbatched_segments_are_those_of_the_padded_call(backend, device):
    """Resets, reset states and hx of a PackedSequence are in the caller's order of rows."""
    T, lengths = 4, torch.tensor([2, 4, 1, 3])
    _, lstm = pair(I, H, bidirectional=True, backend=backend, device=device)
    x, hx = torch.randn(T, 4, I, dtype=torch.float64, device=device), states(lstm, 4)
    resets, given = torch.rand(T, 4, device=device) < 0.5, torch.randn(2, 2, 4, H, dtype=torch.float64, device=device)
    options = {"resets": resets, "reset_state": tuple(given), "return_cell_states": True}
    padded = y, (h, c), cells = lstm(x, hx, lengths=lengths.to(device), **options)
    found, last, found_cells = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), hx, **options)
    assert_close([pad_packed_sequence(found)[0], *last, pad_packed_sequence(found_cells)[0]], flat(padded))
    options |= {"resets": resets[:, 0], "reset_state": tuple(given[:, :, :1]), "lengths": lengths[0].to(device)}
    alone = lstm(x[:, 0], tuple(s[:, 0] for s in hx), **options)
    assert_close(flat(alone), [y[:, 0], h[:, 0], c[:, 0], cells[:, 0]])


# ---- what must not spread ------------------------------------------------------------------------------------------


DEEP = {"num_layers": 2, "projection": True, "batch_first": True, "recompute": True}


@pytest.mark.parametrize("value, options", [(torch.nan, {}), (torch.inf, DEEP)])
@pytest.mark.parametrize(
    "backend, resets", [("triton", "stored"), ("reference", "stored"), ("auto", "zero"), ("auto", None)]
)
def test_nothing_past_the_end_of_a_row_matters(backend, resets, value, options, device):
    """As in torch's packed run: neither input, nor reset state, nor gradient of an output, nor the state of an empty row."""
    case = segmented.Case(5, 4, I, 4, bidirectional=True, rows="lengths", resets=resets, cells=True, **options)
    drawn = replace(segmented.draw(case, device), lengths=torch.tensor([2, 5, 0, 1]))
    past = (torch.arange(5)[:, None] >= drawn.lengths).to(device)[..., None]
    of_steps, empty = past.transpose(0, 1) if case.batch_first else past, (drawn.lengths == 0).to(device)[:, None]
    x, h0, c0, *weights = drawn.inputs
    dy, dh, dc, dcells = drawn.cotangents
    weights, reset_state = (weights[:-2], weights[-2:]) if resets == "stored" else (weights, [])
    spoilt = [torch.where(of_steps, value, x), *(torch.where(empty, value, s) for s in (h0, c0)), *weights]
    spoilt += [torch.where(past[:, None], value, s) for s in reset_state]
    spoilt += [torch.where(of_steps, value, dy), dh, dc, torch.where(of_steps, value, dcells)]
    expected, found = (segmented.results(case, drawn, backend, tensors) for tensors in ((), spoilt))
    for results in (expected, found):
        results[1:3] = [torch.where(empty, 0, t) for t in results[1:3]]  # an empty row ends where it begins
        assert not torch.where(of_steps, results[4], 0).any()
    assert_close(found, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["x", "h0", "c0"])
@pytest.mark.parametrize("starts", [[2], [2, 4]])
def test_on_a_cpu_what_is_not_finite_stays_in_its_segment(starts, place, value):
    theirs, ours = pair(3, 5)
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


# ---- filler steps on a CPU -----------------------------------------------------------------------------------------


def test_special_segments_on_a_cpu():
    """Where no row, or each, has steps, and where restarts are at every step, at one step alone, or nowhere."""
    every, no = torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)
    one, common = (torch.arange(4)[:, None] == torch.tensor(rows) for rows in ([2, 2, 7], [2, 2, 2]))
    calls = itertools.product((None, every, one, common, no), ([0, 0, 0], [4, 4, 4], [4, 0, 2]))
    for (resets, lengths), dtype in zip(calls, itertools.cycle([torch.float32, torch.bfloat16])):
        case = segmented.Case(4, 3, I, 5, bidirectional=True, rows="lengths", resets="zero", cells=True, dtype=dtype)
        drawn = replace(segmented.draw(case, CPU), resets=resets, lengths=torch.tensor(lengths))
        with without_the_reference():
            found = segmented.results(case, drawn, "auto")
        segmented.assert_accurate(found, case, drawn)


def test_second_derivatives_on_a_cpu():
    """torch's kernels have them there, and so have segments."""
    options = dict(num_layers=2, bidirectional=True, dtype=torch.float64)
    ours, plain = LSTM(I, H, **options), LSTM(I, H, backend="reference", **options)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, I, dtype=torch.float64, requires_grad=True)
    segments = {"resets": torch.rand(4, 3) < 0.4, "lengths": torch.tensor([2, 4, 0])}
    hx = states(ours, 3, requires_grad=True)
    with without_the_reference():
        found = twice_differentiated(ours, x, hx, **segments)
    assert_close(found, twice_differentiated(plain, x, hx, **segments))


# ---- errors ---------------------------------------------------------------------------------------------------------

NEVER = torch.zeros(4, 3, dtype=torch.bool)
OUTSIDE = r"lengths must lie in 0 \.\.\. 4"
MISTAKES = {
    "resets dtype": ({"resets": torch.zeros(4, 3)}, TypeError, "resets must be bool"),
    "resets size": ({"resets": NEVER[:, :2]}, RuntimeError, r"Expected resets size \(4, 3\), got \[4, 2\]"),
    "resets rank": ({"resets": NEVER.flatten()}, RuntimeError, r"Expected resets size \(4, 3\), got \[12\]"),
    "resets a list": ({"resets": [[True]]}, TypeError, "resets must be a tensor, got list"),
    "lengths dtype": ({"lengths": torch.ones(3)}, TypeError, "lengths must be integers"),
    "lengths size": ({"lengths": NEVER[:, 0].long()}, RuntimeError, r"Expected lengths size \(3,\)"),
    "lengths above T": ({"lengths": torch.tensor([1, 5, 2])}, ValueError, OUTSIDE),
    "lengths below 0": ({"lengths": torch.tensor([-1, 2, 2])}, ValueError, OUTSIDE),
    "reset state alone": ({"reset_state": (torch.zeros(3),) * 2}, ValueError, "without resets"),
    "reset state a tensor": (
        {"resets": NEVER, "reset_state": torch.zeros(2, 3)},
        TypeError,
        "must be a pair of tensors",
    ),
    "reset state size": ({"resets": NEVER, "reset_state": (torch.zeros(4),) * 2}, RuntimeError, "cannot be broadcast"),
    "reset state dtype": ({"resets": NEVER, "reset_state": (torch.zeros(3).long(),) * 2}, RuntimeError, "same dtype"),
}
OF_PACKED = {name: mistake for name, mistake in MISTAKES.items() if name.startswith("resets")}
OF_PACKED["lengths"] = ({"lengths": torch.tensor([4, 3, 2])}, ValueError, "a PackedSequence has lengths of its own")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(mistake):
    options, kind, text = MISTAKES[mistake]
    with pytest.raises(kind, match=text):
        LSTM(I, H, backend="reference")(torch.zeros(4, 3, I), **options)


@pytest.mark.parametrize("lengths", [[4, 2, 3], [4, 3, 2]], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("mistake", OF_PACKED)
def test_errors_of_packed_calls(mistake, lengths):
    """Resets are checked before they are sorted."""
    options, kind, text = OF_PACKED[mistake]
    packed = pack_padded_sequence(torch.zeros(4, 3, I), lengths, enforce_sorted=False)
    with pytest.raises(kind, match=text):
        LSTM(I, H)(packed, **options)
