"""The concurrent interpreter lets a correct barrier pass and catches the faulty ones."""

import inspect

import pytest
import torch
import triton
import triton.language as tl
from support.concurrent import GridDeadlock, concurrent_grid
from triton.runtime.errors import InterpreterError

from lstm_triton.kernels import interpreter

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1"),
]


@triton.jit
def _barrier(counter_ptr, target, ARRIVE: tl.constexpr, POLL: tl.constexpr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem=ARRIVE, scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem=POLL, scope="gpu") < target:
        pass


@triton.jit
def _recurrence_kernel(
    h_ptr,  # [2, N]
    y_ptr,  # [T, N]
    counter_ptr,
    T,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BARRIER: tl.constexpr,
    ARRIVE: tl.constexpr,
    POLL: tl.constexpr,
    CACHE: tl.constexpr,
):
    """h_t = h_{t-1} / 2 + mean(h_{t-1}) + 1, a program for each BLOCK of h: every step needs all of the step before."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for t in range(T):
        h_prev_ptr = h_ptr + (t % 2) * N
        mean = tl.sum(tl.load(h_prev_ptr + tl.arange(0, N), cache_modifier=CACHE), 0) / N
        h = 0.5 * tl.load(h_prev_ptr + offs, cache_modifier=CACHE) + mean + 1
        tl.store(h_ptr + (1 - t % 2) * N + offs, h)
        tl.store(y_ptr + t * N + offs, h)
        if BARRIER:
            _barrier(counter_ptr, (t + 1) * tl.num_programs(0), ARRIVE, POLL)


def _is_right(programs=4, steps=12, barrier=True, arrive="release", poll="acquire", cache="", **mode) -> bool:
    block = 8
    size = programs * block
    h = torch.zeros(2, size)
    h[0] = torch.randn(size, generator=torch.Generator().manual_seed(0))
    expected, state = [], h[0].double()
    for _ in range(steps):
        state = 0.5 * state + state.mean() + 1
        expected.append(state)
    y = torch.zeros(steps, size)
    counter = torch.zeros(1, dtype=torch.int32)
    with concurrent_grid(**mode):
        _recurrence_kernel[(programs,)](h, y, counter, steps, size, block, barrier, arrive, poll, cache)
    assert counter.item() == (steps * programs if barrier else 0)
    return torch.allclose(y.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [{}, {"jitter": 2e-3}, {"weak": True}, {"weak": True, "jitter": 1e-3, "seed": 1}])
def test_the_right_barrier_passes(mode):
    assert _is_right(**mode)


def test_acquire_release_everywhere_passes():
    assert _is_right(arrive="acq_rel", poll="acq_rel", weak=True)


def test_more_programs_than_cores():
    assert _is_right(programs=16, steps=4, weak=True)


def test_no_barrier_is_caught():
    assert not _is_right(barrier=False, weak=True)
    assert not _is_right(barrier=False, jitter=2e-3)


def test_relaxed_arrive_is_caught_in_weak_mode_only():
    assert not _is_right(arrive="relaxed", weak=True)
    assert _is_right(arrive="relaxed")  # by the strength of the CPU's own memory


def test_relaxed_poll_is_caught_in_weak_mode():
    assert not _is_right(poll="relaxed", weak=True)


def test_loads_past_l1_need_no_acquire():
    assert _is_right(poll="relaxed", cache=".cg", weak=True)


@triton.jit
def _own_accesses_kernel(x_ptr, y_ptr, counter_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.load(x_ptr + i)
    tl.store(x_ptr + i, i + 1)
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i), mask=i > 0)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < SIZE - 1, other=-1))
    tl.store(y_ptr + SIZE + i, tl.load(x_ptr + i, volatile=True))
    tl.store(counter_ptr, 5)
    tl.atomic_add(counter_ptr, 10, sem="relaxed")
    tl.store(counter_ptr + 1, tl.load(counter_ptr))
    tl.store(counter_ptr + 2, tl.atomic_cas(counter_ptr, 15, 16, sem="relaxed"))
    tl.store(counter_ptr + 3, tl.load(counter_ptr))


@pytest.mark.parametrize("seed", range(5))
def test_a_program_sees_its_own_accesses_in_order(seed):
    x, y, counter = (torch.zeros(size, dtype=torch.int32) for size in (4, 8, 4))
    with concurrent_grid(weak=True, seed=seed):
        _own_accesses_kernel[(1,)](x, y, counter, 4)
    assert x.tolist() == [1, 4, 6, 8]
    assert y.tolist() == [1, 4, 6, -1, 1, 4, 6, 8]
    assert counter.tolist() == [16, 15, 15, 16]


@triton.jit
def _wait_forever(counter_ptr):
    while tl.atomic_add(counter_ptr, 0) < 100:
        pass


@triton.jit
def _deadlock_kernel(counter_ptr):
    tl.atomic_add(counter_ptr, 1)
    if tl.program_id(0) != 2:
        _wait_forever(counter_ptr)


def test_deadlock_names_the_stuck_line():
    with pytest.raises(GridDeadlock) as error, concurrent_grid(timeout=2):
        _deadlock_kernel[(4,)](torch.zeros(1, dtype=torch.int32))
    lines, start = inspect.getsourcelines(_wait_forever.fn)
    spin = next(start + i for i, line in enumerate(lines) if "while" in line)
    report = str(error.value)
    assert "3 of 4 programs did not end" in report and "(2, 0, 0)" not in report
    for program in ("(0, 0, 0)", "(1, 0, 0)", "(3, 0, 0)"):
        stuck = next(line for line in report.splitlines() if program in line)
        assert f"{__file__}:{spin} in _wait_forever" in stuck or f"{__file__}:{spin + 1} in _wait_forever" in stuck
        assert "called at" in stuck and "in _deadlock_kernel: `_wait_forever(counter_ptr)`" in stuck


@triton.jit
def _failing_kernel(x_ptr, counter_ptr):
    if tl.program_id(0) == 1:
        tl.load(x_ptr + 1000)
    _wait_forever(counter_ptr)


def test_an_error_in_one_program_stops_the_others():
    interpreter.install(check_bounds=True)
    counter = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) raised OutOfBounds: load"), concurrent_grid():
        _failing_kernel[(3,)](torch.zeros(8), counter)


@triton.jit
def _count_kernel(x_ptr, y_ptr, counter_ptr, SCALE: tl.constexpr):
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    tl.atomic_add(counter_ptr, 1)
    value = tl.load(x_ptr + program).to(tl.float32) * SCALE
    tl.store(y_ptr + program, value)


def test_grids_keywords_views_and_bfloat16():
    storage = torch.arange(12).bfloat16()
    counter = torch.zeros(1, dtype=torch.int32)
    with concurrent_grid():
        _count_kernel[lambda meta: (meta["SCALE"], 3)](storage[:6], counter_ptr=counter, y_ptr=storage[6:], SCALE=2)
    assert storage.tolist() == [0, 1, 2, 3, 4, 5, 0, 2, 4, 6, 8, 10]
    assert counter.item() == 6


def test_max_programs():
    with pytest.raises(InterpreterError, match="max_programs=4"), concurrent_grid(max_programs=4):
        _count_kernel[(5,)](torch.zeros(5), torch.zeros(5), torch.zeros(1, dtype=torch.int32), 1)


def test_only_cooperative_launches_run_at_the_same_time():
    with pytest.raises(GridDeadlock), concurrent_grid(timeout=0.5, only_cooperative=True):
        counter = torch.full((1,), 100, dtype=torch.int32)
        _deadlock_kernel[(2,)](counter)  # nobody waits, and the programs run here
        assert counter.item() == 102
        _deadlock_kernel[(2,)](torch.zeros(1, dtype=torch.int32), launch_cooperative_grid=True)


def test_the_stock_executor_comes_back():
    from triton.runtime import interpreter as stock

    before = stock.GridExecutor
    assert not interpreter.programs_can_wait()
    with pytest.raises(ZeroDivisionError), concurrent_grid():
        assert stock.GridExecutor is not before and interpreter.programs_can_wait()
        raise ZeroDivisionError
    assert stock.GridExecutor is before and not interpreter.programs_can_wait()
