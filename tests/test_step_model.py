"""The model of a time step, on lines of SASS written by hand and on a compiled kernel."""

import re

import pytest
from step_model import __file__ as script
from step_model import cycles, disassembled, time_step
from support.process import run_without_interpreter


def _listing(*lines: str | tuple) -> str:
    """Lines as nvdisasm prints them: a label, or the text of an instruction with its control fields."""
    printed = []
    for number, line in enumerate(lines):
        if isinstance(line, str) and line.endswith(":"):
            printed.append(line)
            continue
        text, fields = (line, {}) if isinstance(line, str) else line
        control = {"stall": 1, "result": 7, "sources": 7, "waits": 0} | fields
        upper = (control["stall"] | control["result"] << 5 | control["sources"] << 8 | control["waits"] << 11) << 41
        printed.append(f"        /*{16 * number:04x}*/                   {text} ;  /* 0x{number:016x} */")
        printed.append(f"                                                       /* 0x{upper:016x} */")
    return "\n".join(printed)


def _cycles(*lines, warps=1, most=False) -> float:
    return cycles(disassembled(_listing(*lines)), warps, most)


def test_an_instruction_waits_for_the_scoreboard_of_a_load():
    load = ("LDG.E.128 R4, desc[UR4][R2.64]", {"result": 2})
    assert _cycles(load, "FADD R8, R4, R5") < 263 < _cycles(load, ("FADD R8, R4, R5", {"waits": 1 << 2}))


@pytest.mark.parametrize("most, bytes_a_cycle", [(False, 64), (True, 40)])
@pytest.mark.parametrize("strength", ["", ".STRONG.GPU"])
def test_data_takes_the_port_to_the_l2_cache(strength, most, bytes_a_cycle):
    """Whether its loads are strong or not; all four partitions ask at once."""
    one, two = (
        _cycles(*[(f"LDG.E.128{strength} R4, desc[UR4][R2.64]", {"result": 0})] * n, ("EXIT", {"waits": 1}), most=most)
        for n in (1, 2)
    )
    assert two - one == pytest.approx(4 * 32 * 16 / bytes_a_cycle, abs=1)


STRONG = "LDG.E.128.STRONG.GPU"
# A counter that is polled, data that is loaded until it is there, and what runs when it never is.
COUNTER = [".L_x_2:", "LDG.E.STRONG.GPU R4, desc[UR4][R2.64]", "@!P0 BRA `(.L_x_2)"]
DATA = [".L_x_3:", *[f"{STRONG} R4, desc[UR4][R2.64]"] * 2, "@P1 BRA `(.L_x_4)", "IADD3 R5, R5, 1, RZ"]
TRAP = ["@P2 BRA `(.L_x_3)", "MEMBAR.SC.SYS", "BPT.TRAP 0x1", ".L_x_4:"]


def test_a_step_polls_a_counter_for_nothing_loads_what_tells_itself_once_and_never_waits_in_vain():
    step = [".L_x_1:", *COUNTER, *DATA, *TRAP, "FADD R1, R1, R1", "@!P2 BRA `(.L_x_1)"]
    listing = _listing("@P0 BRA `(.L_x_5)", *step, ".L_x_5:", "EXIT")
    assert [i.name for i in time_step(disassembled(listing))] == [STRONG, STRONG, "BRA", "FADD", "BRA"]


def test_warps_meet_at_a_barrier():
    slow = ("MUFU.EX2 R4, R4", {"result": 0})
    lines = [slow, ("BAR.SYNC.DEFER_BLOCKING 0x0", {"waits": 1}), "EXIT"]
    assert _cycles(*lines, warps=2) > _cycles(*lines) >= 18 + 18


@pytest.mark.long
def test_a_compiled_kernel():
    """One that test_aot_kernels compiles too."""
    told = run_without_interpreter(script, "80", "128", "64", "fp32", "backward")
    (found,) = re.findall(r"^sm_80 backward H=128 B=64 fp32: (\d+) to (\d+) cycles, (\d+) instructions", told, re.M)
    fewest, most, instructions = map(int, found)
    assert 100 < instructions < fewest < most
