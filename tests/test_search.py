"""The search: about which candidates the compiler is asked, and which one is taken."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from lstm_triton.kernels import device as device_module
from lstm_triton.kernels import interpreter, search
from lstm_triton.kernels.device import device_figures
from lstm_triton.kernels.sequence_config import Problem
from lstm_triton.kernels.sequence_cost import registers

CPU = torch.device("cpu")
H100 = device_figures(CPU)
PROBLEM = Problem("backward", 64, 512, 1, torch.bfloat16, "ieee")
FORWARD = PROBLEM._replace(way="forward")
LARGE = Problem("forward", 512, 455, 1, torch.bfloat16, "ieee")  # every tile that takes all rows at once spills
B200 = H100._replace(tensor_memory=512, wide_rate=4096)


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
        monkeypatch.setattr(search, "JITFunction", object)  # also what the interpreter has made of a kernel
        return asked

    return answering


@pytest.mark.parametrize("precision, alone", [("ieee", 4), ("tf32x3", 8)])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_in_full_float32_one_program_holds_all_units_where_two_cannot_share_them(way, precision, alone):
    for H in (alone, 32):
        problem = Problem(way, 16, H, 1, torch.float32, precision)
        persistent = [c for c in search.candidates(problem, H100) if c.persistent]
        assert {(c.in_band, c.programs > 1) for c in persistent} == {(H != alone, H != alone)}, H


def test_after_one_that_spills_comes_one_that_saves_registers(compiler):
    asked = compiler(60, 8)
    config = search.search(PROBLEM, H100)
    assert len(asked) == 2 and asked[1] == config and config.persistent
    saved = registers(PROBLEM, asked[0], H100) - registers(PROBLEM, config, H100)
    assert saved >= 30
    cheaper = itertools.takewhile(lambda c: c != config, search.candidates(PROBLEM, H100))
    assert all(registers(PROBLEM, asked[0], H100) - registers(PROBLEM, c, H100) < 30 for c in cheaper)


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
    configs, found = compiler(*answers), search.candidates(problem, device)
    assert search.search(problem, device) == configs[taken]
    assert [c.launches if c.persistent else 0 for c in configs] == asked and len(asked) <= search.MOST_COMPILATIONS
    if len(answers) == 2 and answers[1] == 0:
        assert configs == found[:2], "after what cannot be used comes the next"


def test_where_nothing_compiles_there_is_an_error(compiler):
    compiler(None)
    with pytest.raises(RuntimeError, match="Triton compiles no kernel for Problem"):
        search.search(PROBLEM, H100)


def test_a_choice_is_remembered(compiler, monkeypatch):
    monkeypatch.setattr(search, "remembered", {})
    asked = compiler(0)
    resets = PROBLEM._replace(features=frozenset({"resets"}))
    for problem, figures, n in (
        (PROBLEM, H100, 1),
        (PROBLEM, H100, 1),
        (resets, H100, 2),
        (PROBLEM, H100._replace(sms=60), 3),
        (resets, H100, 3),
    ):
        search.choose(problem, figures, CPU)
        assert len(asked) == n


def test_what_was_measured_fixes_the_choice(compiler, monkeypatch):
    """Whatever the compiler would say, so that all processes with one file choose alike."""
    monkeypatch.setattr(search, "remembered", {})
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    asked = compiler(60)
    measured = search.candidates(PROBLEM, H100)[7]
    monkeypatch.setattr(device_module, "measured", lambda problem, on: measured)
    assert search.choose(PROBLEM, H100, CPU) == measured and not asked


def test_the_interpreter_is_not_asked(monkeypatch):
    if not interpreter.is_interpreting():
        pytest.skip("needs a process with TRITON_INTERPRET=1")
    monkeypatch.setattr(search, "compile_for", None)
    waiting, *_ = found = search.candidates(PROBLEM, H100)
    alone = PROBLEM._replace(H=64)
    assert waiting.waits and not search.search(PROBLEM, H100).persistent
    assert search.search(alone, H100).programs == 1 and search.search(alone, H100).persistent
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    assert search.search(PROBLEM, H100) == found[0]
