"""The kernels compiled for the generations of GPUs that the suite has not, and executed: accurate, and nothing is reported.

Of their synchronisation, a sample of `make mutants` is taken out, and missed. Problems are those of tests/mutants.py where they
serve, so that their kernels are compiled once.
"""

import contextlib

import mutants
import pytest
import torch
from support import executor, layers
from support.problems import cells, readouts

from lstm_triton.kernels import interpreter

BF16, TF32, FP64 = {"dtype": torch.bfloat16}, {"dtype": torch.float32, "precision": "tf32"}, {"dtype": torch.float64}
FP32, TF32X3 = ({"dtype": torch.float32, "precision": precision} for precision in ("ieee", "tf32x3"))
TARGETS = ("sm_80", "sm_100", "sm_120")
EVERY = {"resets": True, "reset_state": "stored", "lengths": True, "cells": True}

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.long,
    pytest.mark.skipif(executor.why_not() is not None, reason=str(executor.why_not())),
    pytest.mark.skipif(interpreter.is_interpreting(), reason="a process with TRITON_INTERPRET=1 compiles no kernels"),
]


def _kernels(device):
    return {launch.kernel for launch in device.executed}


def _recurrences(device):
    return [launch for launch in device.executed if "sequence" in launch.kernel]


@pytest.mark.parametrize(
    "target, shape, options",
    [
        *((target, (17, 150, 136), BF16) for target in TARGETS),
        *((target, (40, 48, 64), TF32) for target in ("sm_80", "sm_100")),  # products on sm_120 are those of sm_80
        ("sm_80", (3, 7, 19), FP64),
    ],
)
def test_cells(target, shape, options):
    problem = cells.draw(*shape, **options)
    with executor.executing(target) as device:
        results = cells.by_kernels(problem)
    assert _kernels(device) == {"_lstm_cell_forward_kernel", "_lstm_cell_backward_kernel"}
    cells.assert_as_accurate_as_torch(results, problem)


@pytest.mark.parametrize("target", TARGETS)
def test_readouts(target):
    problem = readouts.draw(17, 150, 300, **BF16)
    with executor.executing(target) as device:
        results = readouts.by_kernels(problem)
    assert len(_kernels(device)) == 5
    readouts.assert_as_accurate_as_torch(results, problem)


@pytest.mark.parametrize(
    "target, shape, options, tiles",
    [
        *((target, (3, 3, 5, 70, 2), {**TF32, **EVERY}, layers.products_of_warpgroups) for target in TARGETS),
        *((target, (3, 18, 5, 136), BF16, layers.products_of_warpgroups) for target in ("sm_80", "sm_100")),
        ("sm_80", (3, 3, 5, 24, 2), {**FP32, **EVERY}, contextlib.nullcontext),  # two chunks backward
        ("sm_100", (3, 3, 5, 12, 2), FP32, contextlib.nullcontext),  # sm_120 gets the same code
        ("sm_80", (3, 3, 5, 80), TF32X3, contextlib.nullcontext),
    ],
)
def test_layers_whose_programs_wait_for_each_other(target, shape, options, tiles):
    problem = layers.draw(*shape, **options)
    with executor.executing(target, seed=2) as device, tiles():
        results = layers.by_kernels(problem, "triton-persistent")
    forward, backward = _recurrences(device)
    assert min(forward.grid[0], backward.grid[0]) >= 3
    layers.assert_as_accurate_as_torch(results, problem)


def test_a_launch_for_each_step():
    problem = layers.draw(3, 3, 5, 19, **TF32, **EVERY)
    with executor.executing("sm_100") as device:
        results = layers.by_kernels(problem, "triton-stepwise")
    assert len(_recurrences(device)) == 6
    layers.assert_as_accurate_as_torch(results, problem)


def test_the_order_of_turns_follows_from_the_seed():
    problem = layers.draw(3, 18, 5, 136, **BF16)  # of tests/mutants.py
    counts = []
    for seed in (1, 1, 2):
        with executor.executing("sm_90", seed=seed) as device, layers.products_of_warpgroups():
            layers.by_kernels(problem, "triton-persistent")
        counts.append([launch.steps for launch in device.executed])
    assert counts[0] == counts[1] != counts[2]


@pytest.mark.parametrize("target", mutants.TARGETS)
def test_missing_synchronisation_is_noticed(target):
    outcomes = mutants.survey([target], mutants.is_in_sample)
    assert outcomes["barrier", "noticed"] >= 5 and outcomes["release", "noticed"] and outcomes["acquire", "noticed"]
    assert not [kind for kind, outcome in outcomes if outcome == "not noticed"]
