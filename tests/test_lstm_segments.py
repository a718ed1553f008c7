"""What torch.nn.LSTM cannot do: resets, lengths, cell states, recomputation, alone and together, forward and backward.

Every pair of features is judged beside the reference, here and in test_filler_steps; what they mean is shown for the reference.
"""

import pytest
import torch
from support import segmented
from support.lstms import assert_close, backends, flat, gradients, pair, states, trained
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lstm_triton import LSTM

I, H = 2, 3

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


@pytest.mark.compiled
@pytest.mark.long
@pytest.mark.parametrize(
    "row",
    [
        *segmented.pairwise(FEATURES),
        dict(T=1, B=1, I=1, H=1, rows="lengths", resets="stored", bidirectional=True, cells=True),
        dict(T=34, B=2, H=1, resets="zero", bidirectional=True, recompute=True),
    ],
    ids=lambda row: " ".join(map(str, row.values())),
)
def test_every_pair_of_features(row, device):
    segmented.judge(segmented.Case(**row), device)


def test_pairs_are_covered():
    rows = segmented.pairwise({"a": [0, 1], "b": [0, 1, 2], "c": "xy"})
    for a, b in (("a", "b"), ("b", "c"), ("a", "c")):
        assert len({(row[a], row[b]) for row in rows}) == len({row[a] for row in rows}) * len({row[b] for row in rows})


# ---- what resets and lengths mean ----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["zero", "stored", "one"])
def test_segments_run_separately(to, device):
    """One call with resets equals torch's own LSTM run on every segment of every row, in both directions."""
    T, B, L = 5, 3, 2
    theirs, ours = pair(I, H, L, bidirectional=True, backend="reference", device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    hx = states(ours, B, requires_grad=True)
    resets = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool, device=device)
    shape = (H,) if to == "one" else (T, 2 * L, B, H)
    given = [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=to != "zero") for _ in range(2)]
    leaves = [x, *hx, *(given if to != "zero" else [])]
    found = trained(ours, x, hx, leaves, resets=resets, reset_state=tuple(given) if to != "zero" else None)

    stored = [(s if to != "zero" else torch.zeros_like(s)).expand(T, 2 * L, B, H) for s in given]
    outputs, last = [], []
    for b in range(B):
        starts = [t for t in range(T) if resets[t, b]]
        cuts = sorted({0, T, *starts})
        of_row, forwards, backwards = [], None, None
        for start, stop in zip(cuts, cuts[1:]):
            begin = []
            for initial, reset in zip(hx, stored):
                rows = initial[:, b].clone()
                if start in starts:
                    rows[0::2] = reset[start, 0::2, b]
                if stop < T:
                    rows[1::2] = reset[stop - 1, 1::2, b]
                begin.append(rows)
            y, end = theirs(x[start:stop, b], tuple(begin))
            of_row.append(y)
            forwards = end  # of the last segment
            backwards = end if backwards is None else backwards  # of the first
        outputs.append(torch.cat(of_row))
        parity = torch.arange(2 * L, device=device)[:, None] % 2
        last.append([torch.where(parity == 0, f, r) for f, r in zip(forwards, backwards)])
    expected = [torch.stack(outputs, 1), *(torch.stack(t, 1) for t in zip(*last))]
    assert_close(found, [*(t.detach() for t in expected), *gradients(expected, [*leaves, *theirs.parameters()])])


def test_lengths_are_torchs_packed_run(device):
    T, lengths = 5, torch.tensor([2, 5, 1])
    theirs, ours = pair(I, H, 2, bidirectional=True, backend="reference", device=device)
    x = torch.randn(T, 3, I, dtype=torch.float64, device=device, requires_grad=True)
    hx = states(ours, 3, requires_grad=True)
    found = trained(ours, x, hx, (x, *hx), lengths=lengths.to(device))
    packed, last = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    expected = [pad_packed_sequence(packed)[0], *last]
    assert_close(found, [*(t.detach() for t in expected), *gradients(expected, [x, *hx, *theirs.parameters()])])


@backends
def test_padding_that_is_not_finite_changes_no_gradient(backend, device):
    """As in torch's packed run, which has no padding: also where a gradient of the padding's outputs is not finite."""
    _, lstm = pair(I, H, 2, bidirectional=True, proj_size=2, backend=backend, device=device)
    lengths = torch.tensor([2, 5, 1], device=device)
    past = (torch.arange(5, device=device)[:, None] >= lengths)[..., None]
    clean = torch.randn(5, 3, I, dtype=torch.float64, device=device)
    found = {}
    for value in (0.0, torch.nan, torch.inf):
        x = torch.where(past, value, clean).requires_grad_()
        y, (h, c) = lstm(x, lengths=lengths)
        cotangents = [torch.where(past, value, torch.cos(y.detach())), torch.cos(h.detach()), torch.cos(c.detach())]
        found[value] = torch.autograd.grad([y, h, c], [x, *lstm.parameters()], cotangents)
        assert torch.equal(found[value][0].masked_fill(~past, 0), torch.zeros_like(x))
        assert_close(found[value], found[0.0])


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


@backends
def test_chunks_with_carried_state_are_the_whole(backend, device):
    """And cell states are those of the last layer, of which the last is in c_n."""
    _, lstm = pair(I, H, 2, backend=backend, device=device)
    x = torch.randn(7, 2, I, dtype=torch.float64, device=device, requires_grad=True)
    resets = torch.rand(7, 2, device=device) < 0.3
    hx = states(lstm, 2, requires_grad=True)
    whole = trained(lstm, x, hx, (x, *hx), resets=resets, return_cell_states=True)
    carried, outputs, cells = hx, [], []
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        y, carried, c = lstm(x[start:stop], carried, resets=resets[start:stop], return_cell_states=True)
        assert_close([y[-1], c[-1]], [s[-1] for s in carried])
        outputs.append(y), cells.append(c)
    chunks = [torch.cat(outputs), *carried, torch.cat(cells)]
    assert_close([*(t.detach() for t in chunks), *gradients(chunks, [x, *hx, *lstm.parameters()])], whole)


# ---- errors ---------------------------------------------------------------------------------------------------------

NEVER = torch.zeros(4, 3, dtype=torch.bool)
OUTSIDE = r"lengths must lie in 0 \.\.\. 4"
MISTAKES = {
    "resets dtype": ({"resets": torch.zeros(4, 3)}, TypeError, "resets must be bool"),
    "resets size": ({"resets": NEVER.t()}, RuntimeError, r"Expected resets size \(4, 3\)"),
    "resets rank": ({"resets": NEVER[:, 0]}, RuntimeError, r"Expected resets size \(4, 3\)"),
    "lengths dtype": ({"lengths": torch.ones(3)}, TypeError, "lengths must be integers"),
    "lengths size": ({"lengths": NEVER[:, 0].long()}, RuntimeError, r"Expected lengths size \(3,\)"),
    "lengths above T": ({"lengths": torch.tensor([1, 5, 2])}, ValueError, OUTSIDE),
    "lengths below 0": ({"lengths": torch.tensor([-1, 2, 2])}, ValueError, OUTSIDE),
    "reset state alone": ({"reset_state": (torch.zeros(3),) * 2}, ValueError, "without resets"),
    "reset state size": ({"resets": NEVER, "reset_state": (torch.zeros(4),) * 2}, RuntimeError, "cannot be broadcast"),
    "reset state dtype": ({"resets": NEVER, "reset_state": (torch.zeros(3).long(),) * 2}, RuntimeError, "same dtype"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(mistake):
    options, kind, text = MISTAKES[mistake]
    with pytest.raises(kind, match=text):
        LSTM(I, H, backend="reference")(torch.zeros(4, 3, I), **options)


def test_errors_of_packed_lengths():
    packed = pack_padded_sequence(torch.zeros(4, 3, I), torch.tensor([4, 3, 2]))
    with pytest.raises(ValueError, match="a PackedSequence has lengths of its own"):
        LSTM(I, H)(packed, lengths=torch.tensor([4, 3, 2]))
