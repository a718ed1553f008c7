"""What torch.nn.LSTM cannot do: resets, lengths, cell states, recomputation, alone and together, forward and backward."""

import pytest
import torch
from support import segmented
from support.lstms import assert_close, flat, gradients, pair, states, trained
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lstm_triton import LSTM

every = pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
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
SIZES = {"T": (1, 6), "B": (1, 4), "I": (1, 3)}


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


@pytest.mark.slow
def test_features_together(device):
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")
    sizes = {name: st.integers(*bounds) for name, bounds in SIZES.items()}
    features = {name: st.sampled_from(values) for name, values in FEATURES.items()}
    cases = st.builds(segmented.Case, seed=st.integers(0, 1000), H=st.sampled_from([1, 3, 16, 17]), **sizes, **features)
    everything = list(hypothesis.HealthCheck)

    @hypothesis.settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=everything)
    @hypothesis.given(cases)
    def check(case):
        segmented.judge(case, device)

    check()


# ---- what resets and lengths mean ----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("reset_state", [False, True], ids=["to zero", "to a state"])
def test_segments_run_separately(reset_state, backend, device):
    """One call with resets equals torch's own LSTM run on every segment of every row, in both directions."""
    T, B, L = 5, 3, 2
    theirs, ours = pair(I, H, L, bidirectional=True, backend=backend, device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    hx = states(ours, B, requires_grad=True)
    resets = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool, device=device)
    stored = [torch.randn(T, 2 * L, B, H, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    leaves = [x, *hx, *(stored if reset_state else [])]
    found = trained(ours, x, hx, leaves, resets=resets, reset_state=tuple(stored) if reset_state else None)

    outputs, last = [], []
    for b in range(B):
        starts = [t for t in range(T) if resets[t, b]]
        cuts = sorted({0, T, *starts})
        of_row, forwards, backwards = [], None, None
        for start, stop in zip(cuts, cuts[1:]):
            begin = []
            for initial, reset in zip(hx, stored):
                reset = reset if reset_state else torch.zeros_like(reset)
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


@every
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_lengths_are_torchs_packed_run(batch_first, backend, device):
    T, lengths = 5, torch.tensor([2, 5, 1])
    theirs, ours = pair(I, H, 2, bidirectional=True, batch_first=batch_first, backend=backend, device=device)
    x = torch.randn((3, T, I) if batch_first else (T, 3, I), dtype=torch.float64, device=device, requires_grad=True)
    hx = states(ours, 3, requires_grad=True)
    found = trained(ours, x, hx, (x, *hx), lengths=lengths.to(device))
    packed, last = theirs(pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False), hx)
    expected = [pad_packed_sequence(packed, batch_first)[0], *last]
    assert_close(found, [*(t.detach() for t in expected), *gradients(expected, [x, *hx, *theirs.parameters()])])


@every
@pytest.mark.parametrize(
    "batch_first, proj_size", [(False, 2), (True, 0)], ids=["time first, projection", "batch first"]
)
def test_padding_that_is_not_finite_changes_no_gradient(proj_size, batch_first, backend, device):
    """As in torch's packed run, which has no padding: also where a gradient of the padding's outputs is not finite."""
    options = dict(bidirectional=True, batch_first=batch_first, proj_size=proj_size, device=device)
    _, lstm = pair(I, H, 2, backend=backend, **options)
    lengths = torch.tensor([2, 5, 1], device=device)
    past = (torch.arange(5, device=device) >= lengths[:, None])[..., None]
    past = past if batch_first else past.transpose(0, 1)
    clean = torch.randn((3, 5, I) if batch_first else (5, 3, I), dtype=torch.float64, device=device)
    found = {}
    for value in (0.0, torch.nan, torch.inf):
        x = torch.where(past, value, clean).requires_grad_()
        y, (h, c) = lstm(x, lengths=lengths)
        cotangents = [torch.where(past, value, torch.cos(y.detach())), torch.cos(h.detach()), torch.cos(c.detach())]
        found[value] = torch.autograd.grad([y, h, c], [x, *lstm.parameters()], cotangents)
        assert torch.equal(found[value][0].masked_fill(~past, 0), torch.zeros_like(x))
        assert_close(found[value], found[0.0])


@every
def test_packed_segments_are_those_of_the_padded_call(backend, device):
    """Resets, reset states and hx of a PackedSequence are in the caller's order of rows."""
    T, lengths = 4, torch.tensor([2, 4, 1, 3])
    _, lstm = pair(I, H, bidirectional=True, backend=backend, device=device)
    x = torch.randn(T, 4, I, dtype=torch.float64, device=device)
    options = {
        "resets": torch.rand(T, 4, device=device) < 0.5,
        "reset_state": tuple(torch.randn(2, 2, 4, H, dtype=torch.float64, device=device)),
        "return_cell_states": True,
    }
    hx = states(lstm, 4)
    y, last, cells = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), hx, **options)
    assert_close(
        [pad_packed_sequence(y)[0], *last, pad_packed_sequence(cells)[0]],
        flat(lstm(x, hx, lengths=lengths.to(device), **options)),
    )


@every
def test_unbatched_segments_are_those_of_a_batch_of_one(backend, device):
    _, lstm = pair(I, H, bidirectional=True, batch_first=True, backend=backend, device=device)
    x = torch.randn(4, I, dtype=torch.float64, device=device)
    resets, length = torch.tensor([False, True, True, False], device=device), torch.tensor(3, device=device)
    y, (h, c), cells = lstm(x, resets=resets, lengths=length, return_cell_states=True)
    batch = lstm(x[None], resets=resets[None], lengths=length[None], return_cell_states=True)
    assert_close([y[None], h[:, None], c[:, None], cells[None]], flat(batch))


@every
def test_rows_without_steps_keep_their_state(backend, device):
    _, lstm = pair(I, H, bidirectional=True, backend=backend, device=device)
    x, hx = torch.randn(3, 2, I, dtype=torch.float64, device=device), states(lstm, 2, requires_grad=True)
    y, last = lstm(x, hx, lengths=torch.tensor([0, 2], device=device))
    assert not y[:, 0].any() and y[:2, 1].all() and not y[2, 1].any()
    for initial, final in zip(hx, last):
        assert torch.equal(final[:, 0], initial[:, 0])
        passed = torch.randn_like(final[:, 0])
        (gradient,) = torch.autograd.grad(final[:, 0], initial, passed, retain_graph=True)
        assert torch.equal(gradient[:, 0], passed) and not gradient[:, 1].any()


@every
def test_cell_states_are_those_of_the_last_layer(backend, device):
    _, lstm = pair(I, H, 2, backend=backend, device=device)
    x = torch.randn(3, 2, I, dtype=torch.float64, device=device)
    y, (h, c), cells = lstm(x, return_cell_states=True)
    assert_close([cells[-1], y[-1]], [c[-1], h[-1]])
    for t in range(3):
        assert_close(cells[t], lstm(x[: t + 1])[1][1][-1])


# ---- states carried, learned, cut ----------------------------------------------------------------------------------


@every
def test_chunks_with_carried_state_are_the_whole(backend, device):
    _, lstm = pair(I, H, 2, backend=backend, device=device)
    x = torch.randn(7, 2, I, dtype=torch.float64, device=device, requires_grad=True)
    resets = torch.rand(7, 2, device=device) < 0.3
    hx = states(lstm, 2, requires_grad=True)
    whole = trained(lstm, x, hx, (x, *hx), resets=resets)
    carried, outputs = hx, []
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        y, carried = lstm(x[start:stop], carried, resets=resets[start:stop])
        outputs.append(y)
    chunks = [torch.cat(outputs), *carried]
    assert_close([*(t.detach() for t in chunks), *gradients(chunks, [x, *hx, *lstm.parameters()])], whole)


@every
def test_no_gradient_passes_a_reset(backend, device):
    _, lstm = pair(I, H, bidirectional=True, backend=backend, device=device)
    x = torch.randn(5, 1, I, dtype=torch.float64, device=device, requires_grad=True)
    resets = torch.tensor([[0], [0], [1], [0], [0]], dtype=torch.bool, device=device)
    y, _ = lstm(x, resets=resets)
    (gradient,) = torch.autograd.grad(y[:2].sum(), x, retain_graph=True)
    assert gradient[:2].all() and not gradient[2:].any()
    (gradient,) = torch.autograd.grad(y[2:].sum(), x)
    assert gradient[2:].all() and not gradient[:2].any()


@every
def test_initial_and_reset_states_can_be_learned(backend, device):
    """One vector each, expanded to the batch: the gradient is that of all the places where they are used."""
    _, lstm = pair(I, H, backend=backend, device=device)
    x = torch.randn(4, 3, I, dtype=torch.float64, device=device)
    learned = [torch.randn(H, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    resets = torch.zeros(4, 3, dtype=torch.bool, device=device)
    hx = tuple(s.expand(1, 3, H) for s in learned)
    once = gradients(flat(lstm(x, hx)), learned)
    resets[0] = True  # the reset state in place of the initial one
    assert_close(gradients(flat(lstm(x, resets=resets, reset_state=tuple(learned))), learned), once)
    resets[2] = True
    both_halves = lstm(x, resets=resets, reset_state=tuple(learned))[0]
    halves = [lstm(half, hx)[0] for half in (x[:2], x[2:])]
    assert_close(gradients([both_halves], learned), gradients([torch.cat(halves)], learned))


# ---- errors ---------------------------------------------------------------------------------------------------------


def _of(x, **changes):
    T, B = x.shape[:2]
    options = {"resets": torch.zeros(T, B, dtype=torch.bool), "lengths": torch.ones(B, dtype=torch.int64)}
    return {k: v.to(x.device) if isinstance(v, torch.Tensor) else v for k, v in {**options, **changes}.items()}


MISTAKES = {
    "resets dtype": ({"resets": torch.zeros(4, 3)}, TypeError, "resets must be bool"),
    "resets size": ({"resets": torch.zeros(3, 4, dtype=torch.bool)}, RuntimeError, r"Expected resets size \(4, 3\)"),
    "resets rank": ({"resets": torch.zeros(4, dtype=torch.bool)}, RuntimeError, r"Expected resets size \(4, 3\)"),
    "lengths dtype": ({"lengths": torch.ones(3)}, TypeError, "lengths must be integers"),
    "lengths size": ({"lengths": torch.ones(4, dtype=torch.int64)}, RuntimeError, r"Expected lengths size \(3,\)"),
    "reset state alone": ({"resets": None, "reset_state": (torch.zeros(3),) * 2}, ValueError, "without resets"),
    "reset state size": ({"reset_state": (torch.zeros(4),) * 2}, RuntimeError, "cannot be broadcast"),
    "reset state dtype": ({"reset_state": (torch.zeros(3, dtype=torch.int64),) * 2}, RuntimeError, "same dtype"),
}


@every
@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(mistake, backend, device):
    changes, kind, text = MISTAKES[mistake]
    lstm = LSTM(I, H, device=device, backend=backend)
    x = torch.zeros(4, 3, I, device=device)
    lstm(x, **_of(x))
    with pytest.raises(kind, match=text):
        lstm(x, **_of(x, **changes))


@every
def test_errors_of_values_and_of_packed_lengths(backend, device):
    lstm = LSTM(I, H, device=device, backend=backend)
    x = torch.zeros(4, 3, I, device=device)
    for lengths in ([1, 5, 2], [-1, 2, 2]):
        with pytest.raises(ValueError, match=r"lengths must lie in 0 \.\.\. 4"):
            lstm(x, lengths=torch.tensor(lengths))
    packed = pack_padded_sequence(x, torch.tensor([4, 3, 2]))
    with pytest.raises(ValueError, match="a PackedSequence has lengths of its own"):
        lstm(packed, lengths=torch.tensor([4, 3, 2]))


def test_pairs_are_covered():
    rows = segmented.pairwise({"a": [0, 1], "b": [0, 1, 2], "c": "xy"})
    for a, b in (("a", "b"), ("b", "c"), ("a", "c")):
        assert len({(row[a], row[b]) for row in rows}) == len({row[a] for row in rows}) * len({row[b] for row in rows})
