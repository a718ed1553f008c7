"""Programs of one launch that wait for each other, as compiled code: accurate with every pair of features, and no race."""

import contextlib
import math

import pytest
import torch
from support import executor, layers, segmented
from support.aot_sequence import DEVICES

from lstm_triton import functional
from lstm_triton.kernels import interpreter, search
from lstm_triton.kernels.sequence_config import Problem, SequenceConfig
from lstm_triton.kernels.sequence_cost import tensor_memory

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.long,
    pytest.mark.skipif(not interpreter.programs_can_wait(), reason="the interpreter runs one program after the other"),
]

FEATURES = {
    "resets": [None, "zero", "stored", "shared"],
    "kind": [(torch.bfloat16, "ieee"), (torch.float32, "tf32")],
    # T, B, I, H: rows of h that begin at 16 bytes and rows that do not, two blocks of rows and one.
    "shape": [(3, 18, 16, 144), (4, 3, 5, 145)],
    "D": [1, 2],
    "lengths": [False, True],
    "cells": [False, True],
    "recompute": [False, True],
    "batch_major": [False, True],
    "bias": [True, False],
    "warpgroups": [True, False],
}


@pytest.mark.parametrize("row", segmented.pairwise(FEATURES), ids=lambda row: " ".join(map(str, row.values())))
def test_every_pair_of_features(row, device, count_launches):
    dtype, precision = row.pop("kind")
    resets, recompute = row.pop("resets"), row.pop("recompute")
    tiles = layers.products_of_warpgroups() if row.pop("warpgroups") else contextlib.nullcontext()
    problem = layers.draw(
        *row.pop("shape"),
        row.pop("D"),
        dtype,
        precision=precision,
        device=device,
        resets=resets is not None,
        reset_state=resets if resets in ("stored", "shared") else None,
        **row,
    )
    with tiles:
        results = layers.by_kernels(problem, "triton-persistent", recompute=recompute)
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1, "_lstm_sequence_backward_kernel": 1}
    layers.assert_as_accurate_as_torch(results, problem)


# block_b, block_h, num_warps, split_k, block_k, in_flight
SUMMED_ALIKE = {
    "forward": [[(16, 64, 8, 1, 16, 3), (16, 16, 4, 1, 64, 1)], [(16, 8, 4, 4, 16, 1)]],
    "backward": [[(16, 64, 4, 4, 16, 3), (16, 8, 4, 4, 16, 3)], [(16, 64, 4, 4, 32, 2)]],
}


@pytest.mark.parametrize("way", SUMMED_ALIKE)
def test_of_a_configuration_only_the_order_of_sums_changes_bits(way, executed, monkeypatch):
    """As docs/design.md says. Of TF32, whose sums in float32 show every other order."""
    if executed is None:
        pytest.skip("hardware may round the sums of different instructions differently")
    torch.manual_seed(0)
    problem, choose = layers.draw(3, 3, 4, 40, 1, torch.float32, precision="tf32"), search.choose
    key = Problem(way, 3, 40, 1, torch.float32, "tf32")
    results = []
    for group in SUMMED_ALIKE[way]:
        for tile in group:
            (config,) = (
                c
                for c in search.candidates(key, executed.figures)
                if c.in_band == (way == "forward" and tile[3] > 1)
                and (c.block_b, c.block_h, c.num_warps, c.split_k, c.block_k, c.in_flight) == tile
            )
            monkeypatch.setattr(search, "remembered", {})
            monkeypatch.setattr(
                search, "choose", lambda p, *rest, config=config: config if p.way == way else choose(p, *rest)
            )
            results.append(torch.cat([t.detach().flatten() for t in layers.by_kernels(problem, "triton-persistent")]))
    alike, as_well, other = results
    assert torch.equal(alike, as_well) and not torch.equal(alike, other)


def test_programs_that_share_an_sm_share_its_tensor_memory(monkeypatch, executed):
    """On sm_100 a program gets its columns for as long as it runs. If two on one SM need more than there are, the second never
    starts, and the first waits for it for ever: such tiles were chosen once, and are refused now."""
    if executed is None:
        pytest.skip("the executor places programs on SMs")
    dtype, B, H, D = torch.bfloat16, 256, 136, 2
    x, states = torch.randn(2, B, 3).to(dtype), (torch.zeros(D, B, H, dtype=dtype),) * 2
    weights = [torch.randn(4 * H, n).to(dtype) / math.sqrt(H) for n in (3, H)] * D

    def run(programs_per_sm):
        with torch.no_grad(), executor.executing("sm_100", programs_per_sm=programs_per_sm) as device:
            functional.lstm(x, states, weights, backend="triton-persistent")
        return [launch for launch in device.executed if "sequence" in launch.kernel]

    (alone,), (beside,) = run(1), run(2)
    assert alone.grid == beside.grid and alone.grid[0] > 16

    refused = SequenceConfig(8, 1, 32, 32, 1, 16, 5, programs=5, groups=16, persistent=True)
    problem = Problem("forward", B, H, D, dtype, "ieee")
    assert tensor_memory(problem, refused, DEVICES[100]) == 512 and refused not in search.candidates(
        problem, DEVICES[100]
    )
    monkeypatch.setattr(search, "choose", lambda *_: refused)
    run(1)
    with pytest.raises(executor.KernelFault, match="tcgen05.alloc|waits"):
        run(2)
