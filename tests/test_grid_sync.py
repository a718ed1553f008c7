"""The barrier between programs: sequence kernels as compiled code, and mutants of their barrier, which the executor reports."""

import math
import re

import pytest
import torch
from support import executor, layers

from lstm_triton import functional
from lstm_triton.kernels import interpreter, layer, layer_backward, search, stall
from lstm_triton.kernels.grid_sync import COUNTER_STRIDE
from lstm_triton.kernels.inputs import Direction, LayerInputs, LayerOptions, Segments
from lstm_triton.kernels.sequence_config import Problem, SequenceConfig

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.long,
    pytest.mark.skipif(not interpreter.programs_can_wait(), reason="the interpreter runs one program after the other"),
]

FORWARD, BACKWARD = "_lstm_sequence_forward_kernel", "_lstm_sequence_backward_kernel"
FP16 = {"dtype": torch.float16}
BF16 = {"dtype": torch.bfloat16}
TF32 = {"dtype": torch.float32, "precision": "tf32"}
SEGMENTS = {"resets": True, "reset_state": "stored", "lengths": True, "cells": True}


@pytest.fixture(autouse=True)
def few_units_per_program(monkeypatch):
    """Small layers are shared by several programs, as large ones are: 8 units each, and 16 rows a group."""
    monkeypatch.setattr(search, "_TILES", [(16, 8, 8)])
    monkeypatch.setattr(search, "remembered", {})


def _in_one_launch(problem, recompute=False):
    return layers.by_kernels(problem, "triton-persistent", recompute=recompute)


@pytest.mark.parametrize(
    "options",
    [dict(T=3, B=18, I=3, H=9, D=2, **TF32), dict(T=3, B=2, I=4, H=64, **BF16)],
    ids=["2 programs, 4 groups", "8 programs"],
)
def test_waiting_programs_compute_what_the_reference_does(options, device, count_launches):
    problem = layers.draw(**options, device=device)
    results = _in_one_launch(problem)
    assert count_launches() == {FORWARD: 1, BACKWARD: 1}
    layers.assert_as_accurate_as_torch(results, problem)


def test_the_state_is_loaded_in_rounds(monkeypatch, device):
    """As for long rows: several chunks at once, several times, the last time fewer."""

    def choose(problem, *_):
        split_k, in_flight = (1, 3) if problem.way == "forward" else (8, 2)
        return SequenceConfig(8, 1, 16, 8, split_k, 16, in_flight, programs=9, groups=1, persistent=True)

    monkeypatch.setattr(search, "choose", choose)
    problem = layers.draw(T=3, B=3, I=3, H=72, **FP16, device=device)
    layers.assert_as_accurate_as_torch(_in_one_launch(problem), problem)


def test_one_launch_equals_one_launch_per_step_bit_for_bit(device):
    problem = layers.draw(T=6, B=4, I=3, H=19, D=2, **SEGMENTS, **FP16, device=device)
    for name, one, many in zip(problem.names, _in_one_launch(problem), layers.by_kernels(problem, "triton-stepwise")):
        assert torch.equal(one, many), name


def test_recomputed_gates_are_several_launches(monkeypatch, device, count_launches):
    """Each range of steps is a launch of its own, which waits for nothing before it."""
    monkeypatch.setattr(layer_backward, "recomputed_ranges", lambda T: [(0, 3), (3, 6), (6, 7)])
    problem = layers.draw(T=7, B=3, I=3, H=9, D=2, **SEGMENTS, **TF32, device=device)
    results = _in_one_launch(problem, recompute=True)
    assert count_launches() == {FORWARD: 1, BACKWARD: 3}
    layers.assert_as_accurate_as_torch(results, problem)


def test_inference_equals_training(device, count_launches):
    """Without gradients the gates are not stored, and programs go on to their next step sooner."""
    problem = layers.draw(T=5, B=17, I=4, H=24, D=2, **BF16, device=device)
    with torch.no_grad():
        y, (h_n, c_n) = functional.lstm(problem.x, problem.hx, problem.weights, backend="triton-persistent")
    assert count_launches() == {FORWARD: 1}
    for name, found, right in zip(problem.names, (y, h_n, c_n), _in_one_launch(problem)):
        assert torch.equal(found, right), name


# ---- mutants ---------------------------------------------------------------------------------------------------------

ARRIVAL = r"@first red\.release\.gpu\.global\.add\.u32 [^;]*;"
POLL = r"(?P<poll>@%\w+ ld\.global\.gpu\.acquire\.b32 (?P<count>%\w+), [^;]*;)"
SOME_PROGRAMS = r".reg .b32 program; mov.u32 program, %ctaid.x; @first setp.ne.u32 first, program, 1; \g<0>"
# What is replaced in the PTX of a kernel, and by what.
NO_ARRIVAL = (ARRIVAL, "")
NO_WAIT = (POLL, r"\g<poll> mov.b32 \g<count>, 2147483647;")
RACES = {
    "no barrier": [NO_ARRIVAL, NO_WAIT],
    "no wait": [NO_WAIT],
    "relaxed arrival": [(r"\.release\b", ".relaxed")],
    "relaxed wait": [(r"\.acquire\b", ".relaxed")],
    "wait for one arrival less": [(POLL, r"\g<poll> add.s32 \g<count>, \g<count>, 1;")],
    "threads not gathered before the arrival": [(r"bar\.sync\s+0;(?=(?:(?!bar\.sync)[\s\S])*@first red)", "")],
}
WAITS_WITHOUT_END = {
    "no arrival": [NO_ARRIVAL],
    "one program does not arrive": [(ARRIVAL, SOME_PROGRAMS)],
    "wait for one arrival more": [(POLL, r"\g<poll> add.s32 \g<count>, \g<count>, -1;")],
}


@pytest.fixture
def error_of(executed):
    """error_of(kernel, changes): the error of a layer, one of whose kernels is so changed."""
    if executed is None:
        pytest.skip("the executor reports them; a GPU would wait, or compute anything")
    problem = layers.draw(T=4, B=3, I=4, H=32, **TF32)

    def run(kernel, changes):
        def change(name, ptx):
            for pattern, replacement in changes if name == kernel else ():
                ptx, found = re.subn(pattern, replacement, ptx)
                assert found, pattern
            return ptx

        executed.change = change
        with pytest.raises(RuntimeError) as error:
            _in_one_launch(problem)
        assert executed.executed[-1].kernel == kernel
        return error.value

    return run


def _kinds(error):
    assert isinstance(error, executor.KernelFault)
    return {report.kind for report in error.reports}


@pytest.mark.parametrize("mutant", RACES)
@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
def test_a_faulty_barrier_is_a_race(kernel, mutant, error_of):
    assert "race in global memory" in _kinds(error_of(kernel, RACES[mutant]))


@pytest.mark.parametrize("mutant", WAITS_WITHOUT_END)
def test_a_wait_without_end_is_reported_with_its_line(mutant, error_of):
    error = error_of(FORWARD, WAITS_WITHOUT_END[mutant])
    assert _kinds(error) == {"deadlock"}
    assert all("grid_sync.py" in report.statement.source for report in error.reports)


def test_a_wait_without_end_traps_on_a_gpu(error_of):
    """The polls are counted, and the last one allowed stores the word that names the kernel, then traps."""
    try:
        error = error_of(FORWARD, [NO_ARRIVAL, (r"\b16777215\b", "19")])
        assert str(error).startswith(f"lstm_triton: {FORWARD} timed out at the grid barrier")
        assert _kinds(error.__cause__) == {"trap"}
        assert all("grid_sync.py" in report.statement.source for report in error.__cause__.reports)
    finally:
        stall.word(FORWARD, False).zero_()


# ---- counters --------------------------------------------------------------------------------------------------------


class _LaunchesRecorded:
    """Stands for a launcher: counts the launch's arrivals at once, and keeps its counters, as if it were still running."""

    kernel = layer._forward.kernel

    def __init__(self):
        self.counters = []

    def __call__(self, grid, config, arguments, *, launch_cooperative_grid):
        assert launch_cooperative_grid is True
        counters = arguments["counters_ptr"]
        assert counters.dtype == torch.int32 and not counters.any(), "counters that are not zero"
        assert all(counters.data_ptr() != others.data_ptr() for _, others in self.counters), "those of a running launch"
        self.counters.append((math.prod(grid), counters.fill_(9)))


def test_every_launch_has_zeroed_counters_of_its_own(monkeypatch, device):
    launcher = _LaunchesRecorded()
    monkeypatch.setattr(layer, "_forward", launcher)
    x, weights = torch.randn(3, 33, 4, device=device), torch.randn(96, 4, device=device)
    h0, c0 = torch.zeros(2, 2, 33, 24, device=device)
    direction = Direction(weights, torch.randn(96, 24, device=device))
    inputs = LayerInputs.of(x, (h0, c0), [direction, direction], Segments())
    for _ in range(2):
        layer.lstm_layer_forward(inputs, LayerOptions(precision="tf32"))
    groups = 2 * 3  # directions, and blocks of 16 rows
    assert len(launcher.counters) == 2 and COUNTER_STRIDE.value * torch.int32.itemsize >= 128
    for programs, counters in launcher.counters:
        assert programs == 3 * groups and counters.numel() == groups * COUNTER_STRIDE.value


def test_counters_that_are_not_reset_are_a_race(monkeypatch, error_of):
    """What a launch leaves in its counters lets nobody wait in the next."""

    class Torch:
        """torch, except that counters are not zero."""

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def zeros(*size, **options):
            return torch.full(size, 4 * 4, **options)

    monkeypatch.setattr(layer, "torch", Torch())
    assert "race in global memory" in _kinds(error_of(FORWARD, []))


def test_more_arrivals_than_a_counter_holds_run_step_by_step(device):
    steps = (2**31 - 1) // 3
    problem = Problem("forward", 1, 24, 1, torch.float32, "tf32")
    assert layer.plan(problem, steps, device).persistent
    assert not layer.plan(problem, steps + 1, device).persistent
