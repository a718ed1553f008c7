"""Layers whose programs wait for each other, as compiled code: accurate with every pair of features, and no race."""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from support import executor, layers, segmented
from support.aot import KINDS
from support.aot_sequence import DEVICES
from support.waiting import BACKWARD, BARRIER, EXCHANGE, FORWARD, SEGMENTS, draw, marks, searching

from lstm_triton import functional
from lstm_triton.kernels import device as device_module
from lstm_triton.kernels import layer_backward, search, sequence_cost
from lstm_triton.kernels.config import MAX_REGISTERS, cdiv
from lstm_triton.kernels.sequence_config import Problem, SequenceConfig
from lstm_triton.kernels.sequence_cost import tensor_memory

pytestmark = [pytest.mark.compiled, *marks]

FEATURES = {
    "resets": [None, "zero", "stored", "shared"],
    "kind": ["bf16", "tf32"],
    # T, B, I, H: rows of h that begin at 16 bytes and rows that do not, two blocks of rows and one.
    "shape": [(3, 18, 16, 80), (3, 3, 5, 81)],
    "D": [1, 2],
    "lengths": [False, True],
    "cells": [False, True],
    "recompute": [False, True],
    "batch_major": [False, True],
    "bias": [True, False],
    "warpgroups": [True, False],
}


class Layer(NamedTuple):
    """A layer, from which tiles the search chooses, and what it has to choose."""

    kind: str
    shape: tuple[int, ...]  # T, B, I, H and, where they are two, directions
    options: dict[str, Any]
    within: Callable[[], contextlib.AbstractContextManager]
    in_band: set[bool] | None = None  # of both ways, where that is to be shown
    launches: tuple[int, int] = (1, 1)  # forward and backward
    sms: int | None = None  # that it may use


def _with_features(kind, shape, D, resets, warpgroups, **options):
    options |= {"resets": resets is not None, "reset_state": resets if resets in ("stored", "shared") else None}
    return Layer(kind, (*shape, D), options, layers.products_of_warpgroups if warpgroups else searching)


def _exchanging(kind, shape, options=None, tile=(8, 16, 4), **others):
    within = partial(searching, **EXCHANGE | {"_TILES": [tile]})
    return Layer(kind, shape, options or {}, within, **{"in_band": {True}} | others)


EVERY_RECOMPUTED = dict(recompute=True, **SEGMENTS)
LAYERS = {
    **{" ".join(map(str, row.values())): _with_features(**row) for row in segmented.pairwise(FEATURES)},
    "a last chunk that is cut off, a last program of four units": _exchanging("tf32", (3, 10, 3, 36)),
    "two steps": _exchanging("fp16", (2, 9, 3, 24, 2)),
    "16 rows, 8 warps": _exchanging("bf16", (3, 18, 3, 48), tile=(16, 16, 8)),
    "32 rows, two chunks": _exchanging("bf16", (3, 18, 3, 136), tile=(32, 16, 4)),
    "eight units, too few for the exchange backward": Layer(
        "bf16", (3, 18, 3, 48), {}, partial(searching, _TILES=[(16, 8, 4)]), {True, False}
    ),
    "fp32": Layer("fp32", (3, 10, 3, 36, 2), SEGMENTS, searching, {True}),
    "tf32x3": Layer("tf32x3", (3, 10, 3, 36), SEGMENTS, searching, {True}),
    "ten groups of two programs, four at once": _exchanging(
        "bf16", (3, 34, 3, 32, 2), SEGMENTS, launches=(3, 3), sms=8
    ),
    "a single step, that waits for nothing": _exchanging("bf16", (1, 3, 3, 32, 2), SEGMENTS, in_band={False}),
    # Each range of steps is a launch of its own, which waits for nothing before it.
    "ranges": _exchanging("tf32", (5, 3, 3, 32, 2), EVERY_RECOMPUTED, launches=(1, 3)),
    "ranges at the barrier": Layer(
        "tf32", (5, 3, 3, 9, 2), EVERY_RECOMPUTED, partial(searching, **BARRIER), {False}, launches=(1, 3)
    ),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers(layer, monkeypatch, device, count_launches):
    if layer.sms:
        free = device_module.multiprocessor_count(device) - layer.sms
        monkeypatch.setattr(device_module, "FREE_MULTIPROCESSORS", free)
    if layer.launches == (1, 3):
        monkeypatch.setattr(layer_backward, "recomputed_ranges", lambda T: [(0, 2), (2, 4), (4, 5)])
    options = dict(layer.options)
    run = partial(layers.by_kernels, backend="triton-persistent", recompute=options.pop("recompute", False))
    problem = draw(layer.kind, *layer.shape, **options, device=device)
    with layer.within():
        results = run(problem)
        assert count_launches() == {FORWARD: layer.launches[0], BACKWARD: layer.launches[1]}
        chosen = search.remembered.values()
        assert all(config.waits for config in chosen) == (len(problem.x) > 1)
        assert layer.in_band in (None, {config.in_band for config in chosen})
        if device.type == "cuda":  # the executor's programs would take the same turns again
            assert all(map(torch.equal, results, run(problem)))
    layers.assert_as_accurate_as_torch(results, problem)


def test_inference_training_and_a_launch_per_step_agree_bit_for_bit(device, count_launches):
    """Without gradients the gates are not stored, and programs go on to their next step sooner."""
    problem = draw("bf16", 3, 2, 4, 64, device=device)
    with searching(**BARRIER):
        training = layers.by_kernels(problem, "triton-persistent")
        count_launches()
        with torch.no_grad():
            y, states = functional.lstm(problem.x, problem.hx, problem.weights, backend="triton-persistent")
        assert count_launches() == {FORWARD: 1}
    for name, found, right in zip(problem.names, (y, *states), training):
        assert torch.equal(found, right), name
    for name, one, many in zip(problem.names, training, layers.by_kernels(problem, "triton-stepwise")):
        assert torch.equal(one, many), name


# in_band, block_b, block_h, num_warps, split_k, block_k, in_flight: in_flight chunks of split_k x block_k are loaded at once,
# and then others, in the last round fewer. Each row of tiles sums in one order.
SUMMED_ALIKE = {
    "forward": [
        [(False, 16, 64, 8, 1, 16, 5), (False, 16, 16, 4, 1, 64, 2), (False, 16, 8, 8, 1, 16, 3)],
        [(True, 16, 8, 4, 4, 16, 2), (True, 8, 16, 4, 4, 16, 1)],
    ],
    "backward": [
        [(False, 16, 64, 4, 4, 16, 5), (False, 16, 8, 4, 4, 16, 2)],
        [(False, 16, 64, 4, 4, 32, 3)],
        [(True, 8, 16, 4, 4, 16, 5), (True, 8, 16, 4, 4, 16, 2)],
    ],
}


def _config(in_band, block_b, block_h, num_warps, *chunks):
    """For 72 units."""
    tile = block_b, block_h, *chunks, cdiv(72, block_h)
    return SequenceConfig(num_warps, 1, *tile, groups=1, persistent=True, in_band=in_band, max_registers=MAX_REGISTERS)


@pytest.mark.parametrize("way", SUMMED_ALIKE)
def test_of_a_configuration_only_the_order_of_sums_changes_bits(way, executed, monkeypatch, device):
    """As docs/design.md says. Of TF32, whose sums in float32 show every other order."""
    problem, found = draw("tf32", 3, 3, 4, 72, device=device), []
    tiles = {other: rows[0][0] for other, rows in SUMMED_ALIKE.items()}
    monkeypatch.setattr(search, "choose", lambda problem, *_: _config(*tiles[problem.way]))
    for row in SUMMED_ALIKE[way]:
        for tile in row:
            tiles[way] = tile
            results = layers.by_kernels(problem, "triton-persistent")
            if executed is None or tile is row[0]:
                layers.assert_as_accurate_as_torch(results, problem)
            found.append((row, torch.cat([t.flatten() for t in results])))
    if executed is not None:  # hardware may round the sums of different instructions differently
        for row, bits in found:
            assert all(torch.equal(bits, others) == (other is row) for other, others in found), row


@pytest.mark.parametrize("kind, H", [("bf16", 32), ("tf32", 36), ("fp32", 16)])
@pytest.mark.parametrize("infinite", [False, True], ids=["NaN", "infinite"])
def test_whatever_states_and_inputs_hold_nobody_waits_for_ever(kind, H, infinite, device):
    """Bits all set are those of what is not there yet. They are NaN, and what follows from them is, in the same places."""
    T, B, (dtype, precision) = 4, 9, KINDS[kind]
    x, h0, c0 = torch.randn(T, B, 3), torch.rand(1, B, H), torch.rand(1, B, H)
    weights = [torch.randn(4 * H, n).to(dtype) / math.sqrt(H) for n in (3, H)]
    x, h0, c0 = x.to(dtype), h0.to(dtype), c0.to(dtype)
    for row in (1, 8):
        h0[0, row, 5] = x[2, row - 1, 1] = -math.inf if infinite else math.nan
    if not infinite:
        h0.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 1, 2:9] = -1
    found = []
    with searching(**EXCHANGE):
        for backend, wide in (("triton-persistent", dtype), ("reference", torch.float64)):
            tensors = [t.to(device, wide).requires_grad_() for t in (x, h0, c0, *weights)]
            options = dict(backend=backend, precision=precision)
            y, states = functional.lstm(tensors[0], tuple(tensors[1:3]), tensors[3:], **options)
            gradients = torch.autograd.grad((y, *states), tensors, [torch.ones_like(t) for t in (y, *states)])
            found.append([t.detach().double() for t in (y, *states, *gradients)])
        assert all(config.in_band for config in search.remembered.values())
    for ours, expected in zip(*found):
        assert torch.equal(ours.isnan(), expected.isnan())
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.02, equal_nan=True)
    assert found[0][0][:, 2:7].isfinite().all() and found[0][0].isnan().any() == (not infinite)


def test_programs_that_share_an_sm_share_its_tensor_memory(monkeypatch, executed):
    """On sm_100 a program gets its columns for as long as it runs. If two on one SM need more than there are, the second never
    starts, and the first waits for it for ever: such tiles were chosen once, and are refused now."""
    if executed is None:
        pytest.skip("the executor places programs on SMs")
    B, H, tile = 32, 136, (32, 32, 1, 16, 9)
    problem, layer = Problem("forward", B, H, 1, torch.bfloat16, "ieee"), draw("bf16", 2, B, 3, H)
    refused = SequenceConfig(8, 1, *tile, programs=5, groups=1, persistent=True, max_registers=MAX_REGISTERS)

    def run(programs_per_sm):
        with torch.no_grad(), executor.executing("sm_100", programs_per_sm=programs_per_sm):
            functional.lstm(layer.x, layer.hx, layer.weights, backend="triton-persistent")
            return list(search.remembered.values())

    with layers.products_of_warpgroups():
        (chosen,) = run(2)
    assert chosen.waits and tensor_memory(problem, chosen, DEVICES[100]) > 0
    assert refused not in search.candidates(problem, DEVICES[100])
    monkeypatch.setattr(sequence_cost, "has_columns", lambda *_: True)
    assert refused in search.candidates(problem, DEVICES[100]) and tensor_memory(problem, refused, DEVICES[100]) == 512
    monkeypatch.setattr(search, "choose", lambda *_: refused)
    run(1)
    with pytest.raises(executor.KernelFault, match="tcgen05.alloc|waits"):
        run(2)
