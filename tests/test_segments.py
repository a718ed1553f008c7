"""Rows that start, stop and restart inside a sequence: `resets`, `reset_state` and `lengths`, in both directions.

The truth of `support.layers` runs every segment of every row by itself.
"""

from dataclasses import replace

import pytest
import torch
from support import layers
from support.aot import KINDS

from lstm_triton.kernels import layer_backward
from lstm_triton.kernels.inputs import LayerInputs, LayerOptions, Segments, split_weights

SEGMENTS = {
    "resets": dict(resets=True),
    "resets to a stored state": dict(resets=True, reset_state="stored"),
    "resets to one state": dict(resets=True, reset_state="shared"),
    "lengths": dict(lengths=True),
    "resets and lengths": dict(resets=True, lengths=True),
    "everything": dict(resets=True, reset_state="stored", lengths=True, cells=True),
}
SOME_KINDS = ("fp32", "tf32", "bf16", "fp64")
segments = pytest.mark.parametrize("segments", SEGMENTS)
directions = pytest.mark.parametrize("D", [1, 2])


def _check(problem, **options):
    layers.assert_as_accurate_as_torch(layers.by_kernels(problem, **options), problem)


@pytest.mark.parametrize(
    "segments, kind, D",
    [
        *(("everything", kind, 2) for kind in SOME_KINDS),
        *((name, kind, 1) for name, kind in zip(SEGMENTS, [*SOME_KINDS, "fp32"]) if name != "everything"),
    ],
)
def test_against_every_segment_by_itself(segments, kind, D, device):
    """Compiled code has every pair of these features with every other, in test_lstm_segments and test_compiled_waiting."""
    dtype, precision = KINDS[kind]
    _check(layers.draw(6, 5, 3, 7, D, dtype, precision=precision, device=device, **SEGMENTS[segments]))


@pytest.mark.slow
@segments
@directions
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"backend": "triton-stepwise"}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_full_product(seed, options, D, segments, device):
    problem = layers.draw(
        9, 18, 3, 33, D, torch.bfloat16, seed=seed, device=device, batch_major=seed % 2 == 1, **SEGMENTS[segments]
    )
    _check(problem, **options)


@pytest.mark.parametrize("T", [1, 3, 7])
def test_gates_rebuilt_for_the_backward(T, device, monkeypatch):
    """7 steps are rebuilt in two pieces."""
    monkeypatch.setattr(layer_backward, "recomputed_ranges", lambda T: [(0, T)] if T < 4 else [(0, 4), (4, T)])
    _check(layers.draw(T, 4, 3, 5, 2, device=device, **SEGMENTS["everything"]), recompute=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_lengths_of_any_integer_type(dtype, device):
    problem = layers.draw(4, 3, 3, 5, 2, device=device, lengths=True)
    other = replace(problem, lengths=problem.lengths.to(dtype))
    assert all(map(torch.equal, layers.by_kernels(other), layers.by_kernels(problem)))


@pytest.mark.long
@pytest.mark.parametrize(
    "value, batch_major, recompute",
    [(torch.nan, False, False), (torch.nan, True, True), (torch.inf, False, True), (torch.inf, True, False)],
)
def test_nothing_past_the_end_of_a_row_matters(value, batch_major, recompute, device):
    """Neither input, nor reset state, nor gradient of an output; nor, to a product, the state of a row without steps."""
    problem = layers.draw(6, 4, 3, 5, 2, device=device, batch_major=batch_major, **SEGMENTS["everything"])
    problem = replace(problem, reset_state=tuple(s.expand(6, 2, 4, 5).contiguous() for s in problem.reset_state))
    past = (torch.arange(6, device=device)[:, None] >= problem.lengths)[..., None]
    empty = (problem.lengths == 0)[:, None]
    spoilt = [problem.x.clone().masked_fill_(past, value), *(torch.where(empty, value, s) for s in problem.hx)]
    spoilt += [*problem.weights, *(torch.where(past[:, None], value, s) for s in problem.reset_state)]
    spoilt += [torch.where(past, value, g) if g.shape[0] == 6 else g for g in problem.cotangents]
    spoilt = problem.with_tensors(spoilt)
    expected = layers.by_kernels(problem, recompute=recompute)
    found = layers.by_kernels(spoilt, recompute=recompute)
    for name, result, wanted in zip(problem.names, found, expected, strict=True):
        if name in ("h_n", "c_n"):  # a row without steps ends where it begins
            result, wanted = (torch.where(empty, 0, t) for t in (result, wanted))
        assert torch.equal(result, wanted), name
    assert not torch.where(past, found[problem.names.index("dx")], 0).any()
    for name, result, wanted in zip(problem.names, layers.by_torch(spoilt), layers.by_torch(problem)):  # the reference
        assert name in ("h_n", "c_n") or torch.equal(result, wanted), name


@pytest.mark.parametrize("given", ["h", "c"])
def test_a_reset_state_not_given_is_zero(given, device):
    """The operator takes either without the other."""
    problem = layers.draw(5, 3, 3, 5, 2, device=device, **SEGMENTS["resets to a stored state"])
    h, c = (s.expand(5, 2, 3, 5) for s in problem.reset_state)
    h, c = (h, None) if given == "h" else (None, c)
    (directions,) = split_weights(problem.weights, 1, 2)

    def run(h, c):
        inputs = LayerInputs.of(problem.x, problem.hx, directions, Segments(problem.resets, h, c))
        found = torch.ops.lstm_triton.lstm_layer(*inputs, *LayerOptions("ieee"), True)
        assert len(found) == 6
        return found

    zeros = torch.zeros(5, 2, 3, 5, device=device)
    found, expected = run(h, c), run(zeros if h is None else h, zeros if c is None else c)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], run(None, None)[0])


def test_no_resets_is_no_reset_argument(device):
    problem = layers.draw(5, 3, 3, 5, 2, torch.float64, device=device, cells=True)
    never = replace(problem, resets=torch.zeros(5, 3, dtype=torch.bool, device=device))
    full = replace(problem, lengths=torch.full((3,), 5, device=device))
    expected = layers.by_kernels(problem)
    for other in (never, full):
        layers.assert_close(layers.by_kernels(other), expected, problem, ulps=32)


def test_resets_at_every_step_forget_the_state(device):
    """Each step then is a cell of its own, from zeros."""
    problem = layers.draw(5, 3, 3, 5, 2, torch.float64, device=device)
    problem = replace(problem, resets=torch.ones(5, 3, dtype=torch.bool, device=device))
    found = dict(zip(problem.names, layers.by_kernels(problem)))
    assert not found["dw_hh"].any() and not found["dh0"][0].any() and not found["dc0"][0].any()
    # Backwards, the last segment starts from hx.
    last = problem.cotangents[0].clone()
    last[:-1] = 0
    others = problem.with_tensors([*problem.inputs, last, *(torch.zeros_like(g) for g in problem.cotangents[1:])])
    only_last = dict(zip(problem.names, layers.by_kernels(others)))
    for name in ("dw_hh_reverse", "dh0", "dc0"):
        torch.testing.assert_close(found[name], only_last[name])
        assert found[name].any(), name
