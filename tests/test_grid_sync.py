"""The barrier between programs: the real sequence kernels with each program a process of its own, and mutants of it."""

import functools
import inspect
import math

import pytest
import torch
import triton
import triton.language as tl
from support import layers
from support.concurrent import GridDeadlock, concurrent_grid
from triton.runtime.errors import InterpreterError

from lstm_triton import functional
from lstm_triton.kernels import (
    grid_sync,
    interpreter,
    layer,
    layer_backward,
    search,
    sequence,
    sequence_backward,
)
from lstm_triton.kernels.grid_sync import COUNTER_STRIDE
from lstm_triton.kernels.inputs import Direction, LayerInputs, LayerOptions, Segments
from lstm_triton.kernels.sequence_config import Problem, SequenceConfig

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1"),
]


@pytest.fixture(autouse=True)
def few_units_per_program(monkeypatch):
    """Small layers are shared by several programs, as large ones are: 8 units each."""
    monkeypatch.setattr(search, "_TILES", [(16, 8, 8)])
    monkeypatch.setattr(search, "_chosen", {})


@pytest.fixture
def barrier(monkeypatch):
    """barrier(arrive=..., wait=...): the kernels use these from here on."""

    def replace(**functions):
        for name, function in functions.items():
            for module in (sequence, sequence_backward):
                monkeypatch.setattr(module, name, function)

    return replace


FP16 = {"dtype": torch.float16}
BF16 = {"dtype": torch.bfloat16}
TF32 = {"dtype": torch.float32, "precision": "tf32"}
SEGMENTS = {"resets": True, "reset_state": "stored", "lengths": True, "cells": True}
# H units are ceil(H / 8) programs, B rows ceil(B / 16) groups in each direction.
PROBLEMS = {
    "P2": dict(T=5, B=3, I=4, H=16, **TF32),
    "P4-G2": dict(T=4, B=17, I=3, H=30, **FP16),
    "P3-D2-segments": dict(T=5, B=4, I=3, H=19, D=2, **SEGMENTS, **FP16),
    "P8": dict(T=3, B=2, I=4, H=64, **FP16),
    "P2-G2-D2": dict(T=3, B=18, I=3, H=9, D=2, **TF32),
    "P3-bf16": dict(T=5, B=3, I=4, H=24, **BF16),
}


def _concurrently(problem, recompute=False, **mode):
    with concurrent_grid(only_cooperative=True, **mode):
        return layers.by_kernels(problem, backend="triton-persistent", recompute=recompute)


@pytest.mark.parametrize("name", PROBLEMS)
def test_waiting_programs_compute_what_the_reference_does(name, count_launches):
    problem = layers.draw(**PROBLEMS[name])
    results = _concurrently(problem, weak=True, jitter=1e-4, seed=1)
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1, "_lstm_sequence_backward_kernel": 1}
    layers.assert_as_accurate_as_torch(results, problem)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", PROBLEMS)
def test_waiting_programs_with_many_seeds(name, seed):
    problem = layers.draw(**PROBLEMS[name], seed=seed)
    layers.assert_as_accurate_as_torch(_concurrently(problem, weak=True, jitter=1e-3, seed=seed), problem)


@pytest.mark.parametrize("forward, backward", [(3, 1), (5, 2)])
def test_the_state_is_loaded_in_rounds(forward, backward, monkeypatch):
    """As for long rows: several chunks at once, several times, the last time fewer."""

    def choose(problem, *_):
        split_k, in_flight = (1, forward) if problem.way == "forward" else (8, backward)
        return SequenceConfig(8, 1, 16, 8, split_k, 16, in_flight, programs=9, groups=1, persistent=True)

    monkeypatch.setattr(search, "choose", choose)
    problem = layers.draw(T=3, B=3, I=3, H=72, **FP16)
    layers.assert_as_accurate_as_torch(_concurrently(problem, weak=True), problem)


def test_one_launch_equals_one_launch_per_step_bit_for_bit():
    problem = layers.draw(T=6, B=4, I=3, H=19, D=2, **SEGMENTS, **FP16)
    for name, one, many in zip(problem.names, _concurrently(problem, weak=True), layers.by_kernels(problem)):
        assert torch.equal(one, many), name


def test_recomputed_gates_are_several_launches(count_launches):
    """Each range of steps is a launch of its own, which waits for nothing before it."""
    problem = layers.draw(T=34, B=2, I=3, H=9, **TF32)
    results = _concurrently(problem, recompute=True, weak=True)
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1, "_lstm_sequence_backward_kernel": 2}
    layers.assert_as_accurate_as_torch(results, problem)


def test_recomputed_gates_of_segments(monkeypatch):
    monkeypatch.setattr(layer_backward, "_recomputed_ranges", lambda T: [(0, 3), (3, 6), (6, 7)])
    problem = layers.draw(T=7, B=3, I=3, H=9, D=2, **SEGMENTS, **TF32)
    layers.assert_as_accurate_as_torch(_concurrently(problem, recompute=True, weak=True), problem)


def test_inference_equals_training(count_launches):
    """Without gradients the gates are not stored, and programs go on to their next step sooner."""
    problem = layers.draw(T=5, B=17, I=4, H=24, D=2, **BF16)
    with torch.no_grad(), concurrent_grid(only_cooperative=True, weak=True, jitter=1e-4):
        y, (h_n, c_n) = functional.lstm(problem.x, problem.hx, problem.weights, backend="triton-persistent")
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1}
    for name, found, right in zip(problem.names, (y, h_n, c_n), _concurrently(problem)):
        assert torch.equal(found, right), name


# ---- mutants ---------------------------------------------------------------------------------------------------------


@triton.jit
def _no_arrive(counter_ptr):
    pass


@triton.jit
def _relaxed_arrive(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def _all_but_one_arrive(counter_ptr):
    tl.debug_barrier()
    if tl.program_id(0) != 1:
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _no_wait(counter_ptr, target, stall_ptr):
    pass


@triton.jit
def _relaxed_wait(counter_ptr, target, stall_ptr):
    while tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _wait_for_one_less(counter_ptr, target, stall_ptr):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target - 1:
        pass
    tl.debug_barrier()


@triton.jit
def _wait_for_one_more(counter_ptr, target, stall_ptr):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target + 1:
        pass
    tl.debug_barrier()


MUTANTS = {
    "no barrier": dict(arrive=_no_arrive, wait=_no_wait),
    "no wait": dict(wait=_no_wait),
    "relaxed arrive": dict(arrive=_relaxed_arrive),
    "relaxed wait": dict(wait=_relaxed_wait),
    "wait for one arrival less": dict(wait=_wait_for_one_less),
}


@functools.cache
def _problem_and_results():
    """What mutants get wrong, and right results: not step by step, since CPUs round products of other sizes in other ways."""
    torch.manual_seed(0)
    problem = layers.draw(T=4, B=3, I=4, H=32, **TF32)
    return problem, _concurrently(problem)


def _results_that_go_wrong(problem, right, name):
    """The names of results that differ, in the first of some runs in which `name` does: a race may be won by chance."""
    wrong = set()
    for seed in range(8):
        found = _concurrently(problem, weak=True, jitter=1e-3, seed=seed)
        wrong = {n for n, f, r in zip(problem.names, found, right) if not torch.equal(f, r)}
        if name in wrong:
            break
    return wrong


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_faulty_barrier_is_caught(way, mutant, barrier):
    problem, right = _problem_and_results()
    broken = sequence if way == "forward" else sequence_backward
    sound = {name: getattr(broken, name) for name in ("arrive", "wait")}
    barrier(**MUTANTS[mutant])
    other = sequence_backward if way == "forward" else sequence
    with pytest.MonkeyPatch.context() as patch:
        for name, function in sound.items():
            patch.setattr(other, name, function)
        wrong = _results_that_go_wrong(problem, right, "dx" if way == "backward" else "y")
    assert "dx" in wrong and ("y" in wrong) == (way == "forward")


@pytest.mark.parametrize(
    "mutant", [dict(arrive=_all_but_one_arrive), dict(wait=_wait_for_one_more)], ids=["missing", "one too many"]
)
def test_a_wait_without_end_is_reported_with_its_line(mutant, barrier):
    barrier(**mutant)
    problem = layers.draw(T=3, B=2, I=3, H=24, **TF32)
    with pytest.raises(GridDeadlock, match="3 of 3 programs did not end") as error:
        _concurrently(problem, timeout=3)
    wait = mutant.get("wait", grid_sync.wait)
    lines, start = inspect.getsourcelines(wait.fn)
    report = str(error.value)
    for program in range(3):
        stuck = next(line for line in report.splitlines() if f"program ({program}, 0, 0)" in line)
        number = int(stuck.split(f"{inspect.getsourcefile(wait.fn)}:")[1].split()[0])
        assert start <= number < start + len(lines), stuck
        assert "in _lstm_sequence_forward_kernel: `wait(" in stuck


def test_a_wait_without_end_traps_on_a_gpu(monkeypatch):
    """In the kernels' own wait the polls are counted, and the last one allowed stores the word of `stall.word`, then traps."""
    monkeypatch.setattr(grid_sync, "_MAX_POLLS", tl.constexpr(20))
    monkeypatch.setattr(sequence, "arrive", _no_arrive)
    problem = layers.draw(T=3, B=2, I=3, H=16, **TF32)
    with pytest.raises(InterpreterError, match="'st.volatile.u32' has no function in INLINE_ASM"):
        _concurrently(problem, timeout=20)


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


def test_every_launch_has_zeroed_counters_of_its_own(monkeypatch):
    launcher = _LaunchesRecorded()
    monkeypatch.setattr(layer, "_forward", launcher)
    monkeypatch.setattr(interpreter, "programs_are_concurrent", True)
    x, (h0, c0), weights = torch.randn(3, 33, 4), (torch.zeros(2, 33, 24),) * 2, torch.randn(96, 4)
    direction = Direction(weights, torch.randn(96, 24))
    inputs = LayerInputs.of(x, (h0, c0), [direction, direction], Segments())
    for _ in range(2):
        layer.lstm_layer_forward(inputs, LayerOptions(precision="tf32"))
    groups = 2 * 3  # directions, and blocks of 16 rows
    assert len(launcher.counters) == 2 and COUNTER_STRIDE.value * torch.int32.itemsize >= 128
    for programs, counters in launcher.counters:
        assert programs == 3 * groups and counters.numel() == groups * COUNTER_STRIDE.value


def test_counters_that_are_not_reset_are_caught(monkeypatch):
    """What a launch leaves in its counters lets nobody wait in the next."""
    problem, right = _problem_and_results()

    class Torch:
        """torch, except that counters are not zero."""

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def zeros(*size, **options):
            return torch.full(size, 4 * 4, **options)

    monkeypatch.setattr(layer, "torch", Torch())
    assert "y" in _results_that_go_wrong(problem, right, "y")


def test_more_arrivals_than_a_counter_holds_run_step_by_step(monkeypatch):
    monkeypatch.setattr(interpreter, "programs_are_concurrent", True)
    steps, cpu = (2**31 - 1) // 3, torch.device("cpu")
    problem = Problem("forward", 1, 24, 1, torch.float32, "tf32")
    assert layer.plan(problem, steps, cpu).persistent
    assert not layer.plan(problem, steps + 1, cpu).persistent
