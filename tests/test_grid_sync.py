"""The barrier between programs: sequence kernels as compiled code, and mutants of their barrier, which the executor reports."""

import re

import pytest
import torch
from support import executor, layers, waiting
from support.waiting import BACKWARD, BF16, FORWARD, FP16, SEGMENTS, TF32

from lstm_triton import functional
from lstm_triton.kernels import grid_sync, layer, layer_backward, search, stall
from lstm_triton.kernels.grid_sync import COUNTER_STRIDE
from lstm_triton.kernels.sequence_config import Problem, SequenceConfig

pytestmark = [pytest.mark.compiled, *waiting.marks]


@pytest.fixture(autouse=True)
def few_units_per_program(monkeypatch):
    """Small layers are shared by several programs, as large ones are: 8 units each, and 16 rows a group."""
    monkeypatch.setattr(search, "_TILES", [(16, 8, 8)])
    monkeypatch.setattr(search, "_IN_BAND", (False,))
    monkeypatch.setattr(search, "remembered", {})


def _in_one_launch(problem, recompute=False):
    return layers.by_kernels(problem, "triton-persistent", recompute=recompute)


# The kernels of the two are compiled once, whatever is asked of them.
TWO_PROGRAMS, EIGHT_PROGRAMS = dict(T=3, B=18, I=3, H=9, D=2, **TF32), dict(T=3, B=2, I=4, H=64, **BF16)


def test_the_state_is_loaded_in_rounds(monkeypatch, device):
    """As for long rows: several chunks at once, several times, the last time fewer."""

    def choose(problem, *_):
        split_k, in_flight = (1, 3) if problem.way == "forward" else (8, 2)
        return SequenceConfig(8, 1, 16, 8, split_k, 16, in_flight, programs=9, groups=1, persistent=True)

    monkeypatch.setattr(search, "choose", choose)
    problem = layers.draw(T=3, B=3, I=3, H=72, **FP16, device=device)
    layers.assert_as_accurate_as_torch(_in_one_launch(problem), problem)


def test_one_launch_equals_one_launch_per_step_bit_for_bit(device):
    problem = layers.draw(**EIGHT_PROGRAMS, device=device)
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
    problem = layers.draw(**EIGHT_PROGRAMS, device=device)
    with torch.no_grad():
        y, (h_n, c_n) = functional.lstm(problem.x, problem.hx, problem.weights, backend="triton-persistent")
    assert count_launches() == {FORWARD: 1}
    for name, found, right in zip(problem.names, (y, h_n, c_n), _in_one_launch(problem)):
        assert torch.equal(found, right), name


# ---- mutants ---------------------------------------------------------------------------------------------------------

ARRIVAL = r"@first red\.release\.gpu\.global\.inc\.u32 [^;]*;"
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
    # Programs of short steps run nearly level: in few of them nobody is late.
    problem = layers.draw(**EIGHT_PROGRAMS | dict(T=12, B=3))

    def run(kernel, changes):
        waiting.change(executed, kernel, changes)
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
        assert str(error).startswith(f"lstm_triton: {FORWARD} timed out, waiting for")
        assert _kinds(error.__cause__) == {"trap"}
        assert all("grid_sync.py" in report.statement.source for report in error.__cause__.reports)
    finally:
        stall.word(FORWARD, False).zero_()


# ---- counters --------------------------------------------------------------------------------------------------------


def test_launches_of_a_stream_share_counters_that_each_leaves_at_zero(device, monkeypatch, count_launches):
    """Of one group, of several, of other steps: the same memory, larger where it has to be. Each equals the reference."""
    seen, counters = [], grid_sync.counters

    def zeros(groups, on):
        found = counters(groups, on)
        assert not found.any() and found.numel() >= groups * COUNTER_STRIDE.value
        seen.append(found)
        return found

    monkeypatch.setattr(grid_sync, "counters", zeros)
    for options in (TWO_PROGRAMS, TWO_PROGRAMS, EIGHT_PROGRAMS | dict(T=2)):
        problem = layers.draw(**options, device=device)
        layers.assert_as_accurate_as_torch(_in_one_launch(problem), problem)
        assert count_launches() == {FORWARD: 1, BACKWARD: 1}
    assert len(seen) == 6 and not any(c.any() for c in seen), "forward and backward of each"
    assert len({c.data_ptr() for c in seen}) == 1 and COUNTER_STRIDE.value * torch.int32.itemsize >= 128
    small = grid_sync.counters(1, device)
    assert grid_sync.counters(small.numel(), device).numel() > small.numel(), "and grow"


def test_what_a_failed_launch_leaves_in_its_counters_is_not_used_again(error_of):
    assert _kinds(error_of(BACKWARD, RACES["no wait"])) and not grid_sync._counters


def test_counters_that_are_not_zero_are_a_race(monkeypatch, error_of):
    """What a launch leaves in its counters would let others not wait in the next."""
    monkeypatch.setattr(grid_sync, "counters", lambda groups, on: torch.ones(groups * COUNTER_STRIDE.value).int())
    assert "race in global memory" in _kinds(error_of(FORWARD, []))


def test_only_the_last_arrival_sets_its_counter_to_zero(executed):
    if executed is None:
        pytest.skip("changes what the executor runs")
    arrival = ARRIVAL.replace("[^;]*;", r"([^,]*), [^;]*;")
    executed.change = lambda name, ptx: re.sub(arrival, r"@first red.release.gpu.global.inc.u32 \1, 9999;", ptx)
    with torch.no_grad():
        problem = layers.draw(**EIGHT_PROGRAMS)
        functional.lstm(problem.x, problem.hx, problem.weights, backend="triton-persistent")
    assert sorted(torch.cat(list(grid_sync._counters.values())).unique().tolist()) == [0, 3 * 8]
    grid_sync.forget_counters()


@pytest.mark.parametrize("capturing, current", [(False, 0), (True, 0), (False, 1)])
def test_streams_and_graphs_have_counters_of_their_own(monkeypatch, capturing, current):
    """A graph may be replayed in any stream; of another device nobody says whether it captures."""
    zeros, stream = torch.zeros, [7]
    monkeypatch.setattr(grid_sync, "_counters", {})
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream[0], raising=False)
    on = torch.device("cuda:0")
    first, again = grid_sync.counters(2, on), grid_sync.counters(2, on)
    stream[0] = 8
    other = grid_sync.counters(2, on)
    shared = not capturing and current == 0
    assert (first is again) == shared and other is not first
    assert len(grid_sync._counters) == 2 * shared


def test_more_arrivals_than_a_counter_holds_run_step_by_step(device):
    steps = (2**31 - 1) // 8
    problem = Problem("forward", 1, 64, 1, torch.bfloat16, "ieee")
    assert layer.plan(problem, steps, device).persistent
    assert not layer.plan(problem, steps + 1, device).persistent
