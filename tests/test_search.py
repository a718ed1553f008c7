"""The candidates of the sequence kernels; about which of them the compiler is asked, and which one is taken."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from support import aot_sequence
from support.aot import KINDS

from lstm_triton.kernels import device as device_module
from lstm_triton.kernels import interpreter, search
from lstm_triton.kernels.config import cdiv
from lstm_triton.kernels.figures import figures
from lstm_triton.kernels.search import candidates
from lstm_triton.kernels.sequence_config import Problem, exchanged_row
from lstm_triton.kernels.sequence_cost import cost, registers

CPU = torch.device("cpu")
DEVICES = {
    **aot_sequence.DEVICES,
    "a slice of an H100": figures(14, 227 << 10, (9, 0)),
    "one that nobody knows yet": figures(200, 227 << 10, (17, 3)),
}
H100, B200 = DEVICES[90], DEVICES[100]
WAYS = ("forward", "backward")
PROBLEM = Problem("backward", 64, 512, 1, torch.bfloat16, "ieee")
FORWARD = PROBLEM._replace(way="forward")
LARGE = Problem("forward", 512, 455, 1, torch.bfloat16, "ieee")  # every tile that takes all rows at once spills

# ---- candidates ------------------------------------------------------------------------------------------------------

# Around every tile, and on: odd and even ones, to where no kernel keeps its weights on chip.
UNITS = sorted({1, 9, *range(29, 1600, 314), *(n + k for n in (16, 128, 1536) for k in (-1, 0, 1))})
ROWS = (1, 17, 64, 1024)


@pytest.mark.parametrize("device", DEVICES.values(), ids=map(str, DEVICES))
def test_every_candidate_can_be_launched(device):
    kinds = [kind for name, kind in KINDS.items() if name != "fp16"]  # whose sizes are those of bfloat16
    for n, ((dtype, precision), way, B, H) in enumerate(itertools.product(kinds, WAYS, ROWS, UNITS)):
        D = 1 + n % 2  # the units are an odd number, so every other meets both
        problem = Problem(way, B, H, D, dtype, precision)
        found = candidates(problem, device)
        assert len(set(found)) == len(found) and not found[-1].persistent, problem
        for config in found:
            case = problem, config
            if config.persistent:
                full = dtype == torch.float32 and precision != "tf32"  # W_hh is in registers, or all in one program
                assert dtype != torch.float64 and (config.in_band or config.programs == 1 or not full), case
                assert config.programs == 1 or config.programs * config.groups_at_once <= device.sms, case
                assert config.launches == 1 or config.programs * config.groups > device.sms, case
                if way == "forward":  # somebody stores all that is exchanged, padding included
                    assert config.programs * config.block_h >= exchanged_row(H, dtype), case
                if config.launches > 1:
                    assert config.waits and cost(problem, config, device) < cost(problem, found[-1], device), case
                if config.in_band:
                    assert config.waits and config.split_k == config.num_warps, case
                    assert config.block_k * dtype.itemsize == 64, case
                    assert way == "forward" or problem.inner * dtype.itemsize % 16 == 0, case
            assert config.programs * config.block_h >= H > (config.programs - 1) * config.block_h, case
            assert config.groups == cdiv(B, config.block_b) * D, case
            for tile in (config.block_b, config.block_h, config.block_k, config.split_k):
                assert tile & (tile - 1) == 0, case


def test_candidates_come_by_their_cost_and_steps_last():
    found = candidates(FORWARD, H100)
    persistent = [c for c in found if c.persistent and c.launches == 1]
    costs = [cost(FORWARD, c, H100) for c in persistent]
    assert len(costs) > 10 and costs == sorted(costs) and found[: len(costs)] == persistent
    assert {c.num_warps for c in persistent} == {4, 8}
    several = [c for c in found if c.launches > 1]
    assert candidates(FORWARD._replace(stepwise=True), H100) == found[len(costs) + len(several) :]
    assert several and found[len(costs) :][: len(several)] == several


@pytest.mark.parametrize("way", WAYS)
def test_which_layers_run_in_one_launch(way):
    """The sweep would also hold if every candidate were one launch per step."""
    for kind, in_one, in_more in (  # H, B
        ("bf16", [(512, 64), (1024, 16), (1536, 1), (1024, 256)], [(2048, 1), (1024, 1024)]),
        ("tf32", [(768, 16)], []),
        ("tf32x3", [(384, 64)], [(768, 64)]),
        ("fp32", [(64, 1), (256, 64)], [(512, 16)]),
        ("fp64", [], [(64, 1)]),
    ):
        for H, B in in_one + in_more:
            first = candidates(Problem(way, B, H, 1, *KINDS[kind]), H100)[0]
            assert first.persistent == ((H, B) in in_one), (kind, H, B)
    # In full float32 one program holds all units where two cannot share them.
    for kind, H, shared in (("fp32", 4, False), ("tf32x3", 8, False), ("fp32", 32, True), ("tf32x3", 32, True)):
        found = [c for c in candidates(Problem(way, 16, H, 1, *KINDS[kind]), H100) if c.persistent]
        assert {(c.in_band, c.programs > 1) for c in found} == {(shared, shared)}, (kind, H)
    # Sixteen units of a row for each thread of one program take longer than a barrier between programs.
    assert way == "backward" or candidates(Problem(way, 16, 128, 1, *KINDS["bf16"]), H100)[0].programs > 1


@pytest.mark.parametrize("arch", [90, 80])
def test_smaller_layers_run_in_one_launch_too(arch):
    """As docs/design.md says beside the largest."""
    for kind, D, B in itertools.product(("bf16", "tf32"), (1, 2), (16, 64, 256)):
        fits = [
            all(candidates(Problem(way, B, H, D, *KINDS[kind]), DEVICES[arch])[0].persistent for way in WAYS)
            for H in range(32, 1601, 96)
        ]
        assert any(fits) and fits == sorted(fits, reverse=True), (kind, D, B, 32 + 96 * fits.index(False))


# ---- the search ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """compiler(answers): `search` gets these for one candidate after the other, the last one again and again.

    An answer: words of local memory, or (words, PTX, columns of tensor memory), or None for a kernel that cannot be loaded.
    Returns a list of the configurations that were asked about.
    """

    def answering(*answers):
        asked = []

        def compile_for(problem, config):
            answer = answers[min(len(asked), len(answers) - 1)]
            asked.append(config)
            if answer is None:
                return None
            words, ptx, columns = answer if isinstance(answer, tuple) else (answer, "mma.sync", 0)
            metadata = SimpleNamespace(tmem_size=columns, shared=64 << 10)
            return SimpleNamespace(n_spills=words, n_regs=64, metadata=metadata, asm={"ptx": ptx})

        monkeypatch.setattr(search, "compile_for", compile_for)
        return asked

    monkeypatch.setattr(search, "JITFunction", object)  # also what the interpreter has made of a kernel
    monkeypatch.setattr(search, "remembered", {})
    return answering


@pytest.mark.parametrize(
    "problem, device, answers, asked, taken",
    [
        (PROBLEM, H100, [0], [1], 0),  # the cheapest candidate, if it compiles well
        (PROBLEM, H100, [None, 0], [1, 1], 1),  # what cannot be loaded is passed over
        (PROBLEM, H100, [(0, "fma.rn.f32", 0), 0], [1, 1], 1),  # so is what has lost its product
        # and what leaves too few columns of tensor memory to programs that wait: three of 64 KiB share 228
        (PROBLEM, H100, [(0, "tcgen05.mma", 512), 0], [1, 1], 1),
        (FORWARD, B200, [(0, "tcgen05.mma", 128)], [1], 0),
        (FORWARD, B200, [(0, "tcgen05.mma", 256), 0], [1, 1], 1),
        # Some words are better than a launch for each step; a few launches are better than many words or that.
        (PROBLEM, H100, [32, 9], [1, 1, 1, 1], 1),
        (LARGE, H100, [40, 40, 4], [1, 1, 2], 2),
        (LARGE, H100, [40, 30], [1, 1], 1),
        # A choice takes few compilations.
        (PROBLEM, H100, [33], [1, 1, 1, 1, 0, 0], 4),
        (PROBLEM, H100, [1000], [1, 0, 0, 0, 0], 1),
        (PROBLEM, H100, [None, None, None, None, 90, 70], [1, 1, 1, 1, 0, 0], 5),
    ],
)
def test_which_candidate_is_taken(problem, device, answers, asked, taken, compiler):
    """asked: in how many launches each candidate runs all steps about which the compiler is asked; 0 for a launch a step."""
    configs, found = compiler(*answers), candidates(problem, device)
    assert search.search(problem, device) == configs[taken]
    assert [c.launches if c.persistent else 0 for c in configs] == asked and len(asked) <= search.MOST_COMPILATIONS
    if len(answers) == 2 and answers[1] == 0:
        assert configs == found[:2], "after what cannot be used comes the next"


def test_after_one_that_spills_comes_one_that_saves_registers(compiler):
    asked = compiler(60, 8)
    config = search.search(PROBLEM, H100)
    assert len(asked) == 2 and asked[1] == config and config.persistent
    saved = [registers(PROBLEM, asked[0], H100) - registers(PROBLEM, c, H100) for c in candidates(PROBLEM, H100)]
    assert next(n for n, words in enumerate(saved) if words >= 30) == candidates(PROBLEM, H100).index(config)


def test_where_nothing_compiles_there_is_an_error(compiler):
    compiler(None)
    with pytest.raises(RuntimeError, match="Triton compiles no kernel for Problem"):
        search.search(PROBLEM, H100)


def test_a_choice_is_remembered_and_fixed_by_what_was_measured(compiler, monkeypatch):
    """Whatever the compiler would say, so that all processes with one file choose alike."""
    asked, resets = compiler(0), PROBLEM._replace(features=frozenset({"resets"}))
    smaller = H100._replace(sms=60)
    calls = (PROBLEM, H100), (PROBLEM, H100), (resets, H100), (PROBLEM, smaller), (resets, H100)
    for (problem, device), n in zip(calls, (1, 1, 2, 3, 3)):
        search.choose(problem, device, CPU)
        assert len(asked) == n
    search.remembered.clear()
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    measured = candidates(PROBLEM, H100)[7]
    monkeypatch.setattr(device_module, "measured", lambda problem, on: measured)
    assert search.choose(PROBLEM, H100, CPU) == measured and len(asked) == 3


def test_the_interpreter_is_not_asked(monkeypatch):
    if not interpreter.is_interpreting():
        pytest.skip("needs a process with TRITON_INTERPRET=1")
    monkeypatch.setattr(search, "compile_for", None)
    waiting, *_ = found = candidates(PROBLEM, H100)
    alone = PROBLEM._replace(H=64)
    assert waiting.waits and not search.search(PROBLEM, H100).persistent
    assert search.search(alone, H100).programs == 1 and search.search(alone, H100).persistent
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    assert search.search(PROBLEM, H100) == found[0]
