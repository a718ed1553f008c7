"""Programs that wait for each other, with mistakes put into their compiled code, each of which is noticed; their counters; and
the same launch again."""

import re

import pytest
import torch
from support import executor, layers
from support.waiting import BACKWARD, BARRIER, EXCHANGE, FORWARD, draw, marks, searching

from lstm_triton import functional
from lstm_triton.kernels import grid_sync, layer, stall
from lstm_triton.kernels.grid_sync import COUNTER_STRIDE
from lstm_triton.kernels.sequence_config import Problem

pytestmark = [pytest.mark.compiled, *marks]

# A layer, what the search may choose for it, and where its programs wait. At the barrier programs of short steps run nearly
# level: in few steps nobody is late.
BY_BARRIER = ("bf16", 12, 3, 4, 64), BARRIER, "grid_sync.py"
BY_EXCHANGE = ("bf16", 4, 3, 4, 32), EXCHANGE, "splits.py"

ARRIVAL = r"@first red\.release\.gpu\.global\.inc\.u32 [^;]*;"
POLL = r"(?P<poll>@%\w+ ld\.global\.gpu\.acquire\.b32 (?P<count>%\w+), [^;]*;)"
STORE = r"@stores st\.relaxed\.gpu\.global(\S*)\.b32"
# What is replaced in the PTX of a kernel, and by what.
NO_ARRIVAL = (ARRIVAL, "")
NO_WAIT = (POLL, r"\g<poll> mov.b32 \g<count>, 2147483647;")
ONE_DOES_NOT_ARRIVE = (
    ARRIVAL,
    r".reg .b32 program; mov.u32 program, %ctaid.x; @first setp.ne.u32 first, program, 1; \g<0>",
)
ONE_DOES_NOT_STORE = (
    STORE,
    r".reg .b32 program; .reg .pred here; mov.u32 program, %ctaid.x; setp.ne.u32 here, program, 1;"
    r" and.pred stores, stores, here; \g<0>",
)
NO_GATHERING = (r"bar\.sync\s+0;(?=(?:(?!bar\.sync)[\s\S])*@first red)", "")
BOTH, ONE = (FORWARD, BACKWARD), (FORWARD,)
RACE, DEADLOCK, TRAP, WRONG = "race in global memory", "deadlock", "trap", "wrong results"
# By name: the changes, what is noticed, and in which kernels. Polls are counted, and after the last one allowed the kernel
# traps.
MUTANTS = {
    "no barrier": (BY_BARRIER, [NO_ARRIVAL, NO_WAIT], RACE, BOTH),
    "no wait": (BY_BARRIER, [NO_WAIT], RACE, BOTH),
    "relaxed arrival": (BY_BARRIER, [(r"\.release\b", ".relaxed")], RACE, BOTH),
    "relaxed wait": (BY_BARRIER, [(r"\.acquire\b", ".relaxed")], RACE, BOTH),
    "wait for one less": (BY_BARRIER, [(POLL, r"\g<poll> add.s32 \g<count>, \g<count>, 1;")], RACE, BOTH),
    "threads not gathered before the arrival": (BY_BARRIER, [NO_GATHERING], RACE, BOTH),
    "no arrival": (BY_BARRIER, [NO_ARRIVAL], DEADLOCK, ONE),
    "one program does not arrive": (BY_BARRIER, [ONE_DOES_NOT_ARRIVE], DEADLOCK, ONE),
    "wait for one more": (BY_BARRIER, [(POLL, r"\g<poll> add.s32 \g<count>, \g<count>, -1;")], DEADLOCK, ONE),
    "no arrival, few polls": (BY_BARRIER, [NO_ARRIVAL, (r"\b16777215\b", "19")], TRAP, ONE),
    "weak stores": (BY_EXCHANGE, [(STORE, r"@stores st.global\1.b32")], RACE, BOTH),
    "weak loads": (BY_EXCHANGE, [(r"ld\.relaxed\.gpu\.global\.v4", "ld.global.v4")], RACE, BOTH),
    "stores for the program alone": (BY_EXCHANGE, [(STORE, r"@stores st.relaxed.cta.global\1.b32")], RACE, BOTH),
    "no wait for words": (BY_EXCHANGE, [(r"@there bra done", "bra done")], WRONG, BOTH),
    "one program does not store": (BY_EXCHANGE, [ONE_DOES_NOT_STORE], DEADLOCK, BOTH),
    "no store, few polls": (BY_EXCHANGE, [ONE_DOES_NOT_STORE, (r"\b16777216\b", "19")], TRAP, ONE),
}


def _change(executed, kernel, changes):
    """From here on this kernel is executed with patterns in its PTX replaced, each of which must be there."""
    if executed is None:
        pytest.skip("the executor reports mutants; a GPU would wait, or compute anything")

    def changed(name, ptx):
        for pattern, replacement in changes if name == kernel else ():
            ptx, found = re.subn(pattern, replacement, ptx)
            assert found, pattern
        return ptx

    executed.change = changed


def _run(problem, limits):
    with searching(**limits):
        return layers.by_kernels(problem, "triton-persistent")


@pytest.mark.parametrize("name, kernel", [(name, kernel) for name in MUTANTS for kernel in MUTANTS[name][-1]])
def test_mutants_are_noticed(name, kernel, executed):
    (layer, limits, place), changes, notice, _ = MUTANTS[name]
    _change(executed, kernel, changes)
    problem = draw(*layer)
    if notice == WRONG:
        results = _run(problem, limits)
        with pytest.raises(AssertionError):
            layers.assert_as_accurate_as_torch(results, problem)
        return
    try:
        with pytest.raises(RuntimeError) as error:
            _run(problem, limits)
    finally:
        stall.word(kernel, False).zero_()
    assert not grid_sync._counters, "what a failed launch leaves in its counters is not used again"
    fault = error.value
    if notice == TRAP:
        assert str(fault).startswith(f"lstm_triton: {kernel} timed out, waiting for")
        fault = fault.__cause__
    assert isinstance(fault, executor.KernelFault) and executed.executed[-1].kernel == kernel
    assert {report.kind for report in fault.reports} - {"race in shared memory"} == {notice}
    if notice != RACE:  # without a barrier some threads wait for others of their program
        waits = [place in report.statement.source for report in fault.reports]
        assert any(waits) and (limits is EXCHANGE or all(waits))


# ---- counters of the barrier -----------------------------------------------------------------------------------------


def test_launches_of_a_stream_share_counters_that_each_leaves_at_zero(device, monkeypatch, count_launches):
    """Of one group, of several, of other steps: the same memory, larger where it has to be. Each equals the reference."""
    seen, counters = [], grid_sync.counters

    def zeros(groups, on):
        found = counters(groups, on)
        assert not found.any() and found.numel() >= groups * COUNTER_STRIDE.value
        seen.append(found)
        return found

    monkeypatch.setattr(grid_sync, "counters", zeros)
    two_programs, eight_programs = ("tf32", 3, 18, 3, 9, 2), ("bf16", 2, 2, 4, 64)
    for options in (two_programs, two_programs, eight_programs):
        problem = draw(*options, device=device)
        layers.assert_as_accurate_as_torch(_run(problem, BARRIER), problem)
        assert count_launches() == {FORWARD: 1, BACKWARD: 1}
    assert len(seen) == 6 and not any(c.any() for c in seen), "forward and backward of each"
    assert len({c.data_ptr() for c in seen}) == 1 and COUNTER_STRIDE.value * torch.int32.itemsize >= 128
    small = grid_sync.counters(1, device)
    assert grid_sync.counters(small.numel(), device).numel() > small.numel(), "and grow"


def test_counters_that_are_not_zero_are_a_race(monkeypatch, executed):
    """What a launch leaves in its counters would let others not wait in the next."""
    _change(executed, FORWARD, [])
    monkeypatch.setattr(grid_sync, "counters", lambda groups, on: torch.ones(groups * COUNTER_STRIDE.value).int())
    with pytest.raises(executor.KernelFault, match=RACE):
        _run(draw(*BY_BARRIER[0]), BARRIER)


def test_only_the_last_arrival_sets_its_counter_to_zero(executed):
    _change(executed, FORWARD, [(r"(@first red\S* [^,]*), [^;]*;", r"\1, 99;")])
    problem = draw("bf16", 3, 2, 4, 64)
    with torch.no_grad(), searching(**BARRIER):
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
    with searching(**BARRIER):
        assert layer.plan(problem, steps, device).persistent
        assert not layer.plan(problem, steps + 1, device).persistent


# ---- the same launch again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel, name", [(FORWARD, "y_ptr"), (BACKWARD, "dz_ptr")])
def test_a_launch_is_repeated_on_the_same_memory(kernel, name, executed, monkeypatch):
    """As a CUDA graph repeats it, with other inputs: the fill and the launch. Without the fill old states would be read. Two
    launches at once, as in two streams, share nothing but the stall word."""
    if executed is None:
        pytest.skip("a GPU does not say what was launched")
    recorded, execute = [], executed.execute
    with monkeypatch.context() as patch:
        patch.setattr(executed, "execute", lambda launch: (recorded.append(launch), execute(launch))[1])
        for seed in (1, 2):
            _run(draw(*BY_EXCHANGE[0], seed=seed), EXCHANGE)
    first, second = (launch for launch in recorded if launch.kernel == kernel)
    mine, others = ({n: t.detach() for n, _, t in launch.arguments if torch.is_tensor(t)} for launch in (first, second))
    shared = {t.untyped_storage().data_ptr() for t in mine.values()} & {
        t.untyped_storage().data_ptr() for t in others.values()
    }
    assert shared == {mine.pop("stall_ptr").data_ptr()}
    exchanged, right = mine.pop(name), others[name]
    for argument, tensor in mine.items():
        tensor.copy_(others[argument])
    executed.execute(first)
    assert not torch.equal(exchanged, right)
    for _ in range(2):
        exchanged.view(torch.int16).fill_(-1)
        executed.execute(first)
        assert torch.equal(exchanged, right)
