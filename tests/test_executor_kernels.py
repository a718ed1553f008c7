"""This package's kernels, compiled for each generation of GPUs and executed: accurate, and nothing is reported.

In a process without the interpreter for each architecture: this file is also the script that it runs.
"""

import contextlib
import dataclasses
import sys

import pytest
import torch
from support import cells, executor, layers, readouts
from support.process import run_checks, run_without_interpreter

BF16, TF32 = {"dtype": torch.bfloat16}, {"dtype": torch.float32, "precision": "tf32"}
EVERY = {"resets": True, "reset_state": "stored", "lengths": True, "cells": True}


@pytest.mark.long
@pytest.mark.skipif(executor.why_not() is not None, reason=str(executor.why_not()))
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_kernels(target):
    assert "checks passed" in run_without_interpreter(__file__, target, timeout=1200)


def check_cells():
    for shape, options in (((17, 33, 20), BF16), ((40, 48, 64), TF32), ((3, 7, 19), {"dtype": torch.float64})):
        problem = cells.draw(*shape, **options)
        with executor.executing(TARGET) as device:
            results = cells.by_kernels(problem)
        assert [launch.kernel for launch in device.executed] == [
            "_lstm_cell_forward_kernel",
            "_lstm_cell_backward_kernel",
        ]
        cells.assert_as_accurate_as_torch(results, problem)


def check_readouts():
    for shape, options in (((5, 19, 37), BF16), ((3, 20, 1500), TF32)):
        problem = readouts.draw(*shape, **options)
        with executor.executing(TARGET):
            results = readouts.by_kernels(problem)
        readouts.assert_as_accurate_as_torch(results, problem)


def check_layers_whose_programs_wait_for_each_other():
    for shape, options in (((3, 18, 5, 150, 1), BF16), ((3, 3, 5, 150, 2), {**BF16, **EVERY}), ((3, 3, 5, 150), TF32)):
        problem = layers.draw(*shape, **options)
        with executor.executing(TARGET, seed=2) as device:
            results = layers.by_kernels(problem, "triton-persistent")
        forward, backward = device.executed
        assert forward.grid[0] >= 5 and backward.grid[0] >= 5
        layers.assert_as_accurate_as_torch(results, problem)


def check_a_launch_for_each_step():
    problem = layers.draw(3, 3, 5, 19, 2, **BF16, **EVERY)
    with executor.executing(TARGET) as device:
        results = layers.by_kernels(problem, "triton-stepwise")
    assert len(device.executed) == 6
    layers.assert_as_accurate_as_torch(results, problem)


def check_a_relaxed_barrier_is_reported():
    problem = layers.draw(3, 3, 5, 150, **BF16)
    for order in ("release", "acquire"):
        with executor.executing(TARGET) as device:
            device.change = lambda kernel, ptx, order=order: ptx.replace(f".{order}.", ".relaxed.")
            with contextlib.suppress(executor.KernelFault):
                layers.by_kernels(problem, "triton-persistent")
        assert "race in global memory" in {report.kind for report in device.executed[0].reports}, order


def check_the_order_of_turns_follows_from_the_seed():
    problem = layers.draw(2, 3, 5, 150, **BF16)
    counts = []
    for seed in (1, 1, 2):
        with executor.executing(TARGET, seed=seed) as device:
            layers.by_kernels(problem, "triton-persistent")
        counts.append([dataclasses.replace(launch, reports=()).steps for launch in device.executed])
    assert counts[0] == counts[1] != counts[2]


if __name__ == "__main__":
    TARGET = sys.argv[1]
    torch.set_num_threads(1)
    run_checks(globals())
