"""Layers whose programs wait for each other, as compiled code: accurate with every pair of features, and no race."""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from support import executor, layers, segmented
from support.aot_sequence import DEVICES
from support.waiting import (
    BACKWARD,
    BARRIER,
    BF16,
    EXCHANGE,
    FORWARD,
    FP16,
    FP32,
    SEGMENTS,
    TF32,
    TF32X3,
    marks,
    searching,
)

from lstm_triton import functional
from lstm_triton.kernels import device as device_module
from lstm_triton.kernels import layer_backward, search, sequence_cost
from lstm_triton.kernels.config import MAX_REGISTERS, cdiv
from lstm_triton.kernels.sequence_config import Problem, SequenceConfig
from lstm_triton.kernels.sequence_cost import tensor_memory

pytestmark = marks

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
    """A layer: what is drawn and whether it recomputes, from which tiles the search chooses, and what it has to choose."""

    options: dict[str, Any]
    within: Callable[[], contextlib.AbstractContextManager] = searching
    in_band: set[bool] | None = None  # of both ways, where that is to be shown
    launches: tuple[int, int] = (1, 1)  # forward and backward
    sms: int | None = None  # that it may use


def _with_features(kind, shape, resets, warpgroups, **options):
    drawn = dict(zip("TBIH", shape)) | (BF16 if kind == "bf16" else TF32)
    drawn |= {"resets": resets is not None, "reset_state": resets if resets in ("stored", "shared") else None}
    return Layer(drawn | options, layers.products_of_warpgroups if warpgroups else searching)


def _exchanging(*tile, **options):
    """Without a barrier, in tiles of this size."""
    tiles = {"_TILES": [tile]} if tile else {}
    return Layer(dict(I=3) | options, partial(searching, **EXCHANGE | tiles), {True})


SEVERAL_RANGES = dict(T=5, B=3, I=3, D=2, recompute=True, **SEGMENTS, **TF32)
LAYERS = {
    **{" ".join(map(str, row.values())): _with_features(**row) for row in segmented.pairwise(FEATURES)},
    # A last chunk that is cut off, a last program of four units.
    "exchange, tf32": _exchanging(T=3, B=10, H=36, **TF32),
    "exchange, fp16, two steps": _exchanging(T=2, B=9, H=24, D=2, **FP16),
    "exchange, 16 rows, 8 warps": _exchanging(16, 16, 8, T=3, B=18, H=48, **BF16),
    "exchange, 32 rows, two chunks": _exchanging(32, 16, 4, T=3, B=18, H=136, **BF16),
    "exchange forward, eight units are too few backward": Layer(
        dict(T=3, B=18, I=3, H=48, **BF16), partial(searching, _TILES=[(16, 8, 4)]), {True, False}
    ),
    "as searched, fp32": Layer(dict(T=3, B=10, I=3, H=36, D=2, **SEGMENTS, **FP32), searching, {True}),
    "as searched, tf32x3": Layer(dict(T=3, B=10, I=3, H=36, **SEGMENTS, **TF32X3), searching, {True}),
    # Ten groups of two programs each, four of them at once.
    "exchange, groups that do not fit at once": _exchanging(T=3, B=34, H=32, D=2, **SEGMENTS, **BF16)._replace(
        launches=(3, 3), sms=8
    ),
    "a single step waits for nothing": _exchanging(T=1, B=3, H=32, D=2, **SEGMENTS, **BF16)._replace(in_band={False}),
    # Each range of steps is a launch of its own, which waits for nothing before it.
    "exchange, recomputed": _exchanging(H=32, **SEVERAL_RANGES)._replace(launches=(1, 3)),
    "barrier, recomputed": Layer(dict(H=9, **SEVERAL_RANGES), partial(searching, **BARRIER), {False}, (1, 3)),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers(layer, monkeypatch, device, count_launches):
    if layer.sms:
        free = device_module.multiprocessor_count(device) - layer.sms
        monkeypatch.setattr(device_module, "FREE_MULTIPROCESSORS", free)
    if layer.launches[1] > layer.launches[0]:
        monkeypatch.setattr(layer_backward, "recomputed_ranges", lambda T: [(0, 2), (2, 4), (4, 5)])
    recompute = layer.options.get("recompute", False)
    problem = layers.draw(**{k: v for k, v in layer.options.items() if k != "recompute"}, device=device)
    with layer.within():
        results = layers.by_kernels(problem, "triton-persistent", recompute=recompute)
        assert count_launches() == {FORWARD: layer.launches[0], BACKWARD: layer.launches[1]}
        chosen = search.remembered.values()
        assert all(config.waits for config in chosen) == (len(problem.x) > 1)
        assert layer.in_band in (None, {config.in_band for config in chosen})
        if device.type == "cuda":  # the executor's programs would take the same turns again
            again = layers.by_kernels(problem, "triton-persistent", recompute=recompute)
            assert all(map(torch.equal, results, again))
    layers.assert_as_accurate_as_torch(results, problem)


def test_inference_training_and_a_launch_per_step_agree_bit_for_bit(device, count_launches):
    """Without gradients the gates are not stored, and programs go on to their next step sooner."""
    problem = layers.draw(T=3, B=2, I=4, H=64, **BF16, device=device)
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


@pytest.mark.parametrize("way", SUMMED_ALIKE)
def test_of_a_configuration_only_the_order_of_sums_changes_bits(way, executed, monkeypatch, device):
    """As docs/design.md says. Of TF32, whose sums in float32 show every other order."""
    problem, choose = layers.draw(3, 3, 4, 72, **TF32, device=device), search.choose
    found = []
    for row in SUMMED_ALIKE[way]:
        for tile in row:
            in_band, block_b, block_h, num_warps, *chunks = tile
            config = SequenceConfig(
                *(num_warps, 1, block_b, block_h, *chunks, cdiv(72, block_h), 1, True, in_band),
                max_registers=MAX_REGISTERS,
            )
            monkeypatch.setattr(search, "choose", lambda p, *rest, c=config: c if p.way == way else choose(p, *rest))
            results = layers.by_kernels(problem, "triton-persistent")
            if executed is None or tile is row[0]:
                layers.assert_as_accurate_as_torch(results, problem)
            found.append((row, torch.cat([t.flatten() for t in results])))
    if executed is not None:  # hardware may round the sums of different instructions differently
        for row, bits in found:
            assert all(torch.equal(bits, others) == (other is row) for other, others in found), row


@pytest.mark.parametrize("kind, H", [(BF16, 32), (TF32, 36), (FP32, 16)], ids=["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("infinite", [False, True], ids=["NaN", "infinite"])
def test_whatever_states_and_inputs_hold_nobody_waits_for_ever(kind, H, infinite, device):
    """Bits all set are those of what is not there yet. They are NaN, and what follows from them is, in the same places."""
    T, B, dtype = 4, 9, kind["dtype"]
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
            options = dict(backend=backend, precision=kind.get("precision"))
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
    problem, layer = Problem("forward", B, H, 1, torch.bfloat16, "ieee"), layers.draw(2, B, 3, H, **BF16)
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
