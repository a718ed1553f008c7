"""The sequence kernels that the search chooses for a device of every generation, compiled without a GPU.

One process per generation of architectures, without the interpreter: this file is also the script that it runs.
"""

import sys

import pytest
import torch
from support.aot import ARCHITECTURES, KINDS
from support.process import run_without_interpreter

PLAIN, RESETS, DROPOUT = (), ("resets",), ("random", "dropout")
SEGMENTS = ("resets", "lengths", "cells", "reset_gradients")
ALL = (*SEGMENTS, *DROPOUT)
# kind, H, B, D, features: each size of tile, in both directions and with all features where registers are short.
CASES = [
    ("bf16", 19, 16, 2, ALL),
    ("bf16", 64, 64, 2, ALL),
    ("bf16", 512, 64, 2, ALL),
    ("bf16", 256, 256, 1, ALL),
    ("bf16", 768, 16, 1, PLAIN),
    ("bf16", 1024, 64, 1, RESETS),
    ("bf16", 1536, 16, 1, ALL),
    ("fp16", 512, 16, 1, PLAIN),
    ("tf32", 512, 64, 2, RESETS),
    ("tf32", 768, 16, 1, RESETS),
    ("tf32x3", 64, 64, 1, PLAIN),
    ("fp32", 256, 16, 1, ALL),
    ("fp32", 128, 64, 1, PLAIN),
    ("fp32", 512, 64, 2, ALL),
    ("fp64", 19, 16, 2, ALL),
]
# Rows of odd lengths, and as many rows and units as fit.
FURTHER = {
    80: [("bf16", 415, 256, 1, SEGMENTS), ("bf16", 831, 64, 1, ALL), ("tf32", 255, 256, 1, ALL)],
    86: [("bf16", 640, 64, 1, ALL)],
    89: [("bf16", 640, 64, 1, ALL), ("tf32", 512, 64, 1, RESETS)],
    90: [
        ("bf16", 127, 16, 1, SEGMENTS),
        ("bf16", 512, 256, 1, PLAIN),
        ("bf16", 511, 256, 1, ALL),
        ("bf16", 1408, 64, 1, PLAIN),
        ("tf32", 384, 256, 1, ALL),
        ("bf16", 1024, 16, 2, ("lengths",)),
        ("tf32", 1024, 16, 1, PLAIN),
        ("tf32", 831, 32, 1, DROPOUT),
        ("tf32x3", 384, 16, 1, ALL),
        ("fp32", 256, 64, 1, PLAIN),
    ],
    100: [
        ("bf16", 455, 512, 1, ALL),
        ("bf16", 1022, 16, 1, ALL),
        ("bf16", 767, 64, 1, RESETS),
        ("tf32", 254, 512, 2, ALL),
        ("tf32", 1001, 16, 1, ALL),
    ],
    120: [("bf16", 384, 128, 2, DROPOUT), ("bf16", 1279, 16, 1, ALL), ("tf32", 734, 16, 1, ALL)],
}
# Forward, programs of few units, of which several could share an SM and its tensor memory.
SHARING = {100: [("bf16", 136, 256, 2, PLAIN), ("bf16", 168, 128, 1, PLAIN), ("bf16", 328, 128, 2, PLAIN)]}
SLOW = 1024  # units, from which on the kernels take seconds to compile, and several candidates
# Where every tile that fits needs more registers than there are, or nearly, some words are spilled, or each step is a launch.
# For these cases the count, which leaves out addresses and what the compiler keeps, says less than MANY_REGISTERS.
SCARCE = {("backward", 455, 512), ("backward", 254, 512), ("forward", 254, 512)}
MANY_REGISTERS = 216


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chosen_kernels_are_compiled_well(arch):
    assert "kernels are compiled well" in run_without_interpreter(__file__, str(arch), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("arch", FURTHER)
def test_the_full_product_compiles_well(arch):
    assert "kernels are compiled well" in run_without_interpreter(__file__, str(arch), "all", timeout=3600)


# ---- in a process without the interpreter --------------------------------------------------------------------------


def _cases(arch, everything):
    """What is compiled: each of CASES for one generation, one way, or everything both ways for all of them."""
    from support.aot_sequence import Case

    ways = ("forward", "backward")

    def case_of(way, kind, H, B, D, features):
        return Case(way, H, B, D, *KINDS[kind], (*features, "training"))

    further = [
        Case("forward", 512, 16, 1, torch.bfloat16, "ieee", ()),
        Case("backward", 512, 16, 1, torch.float16, "ieee", ("training",), recompute=True),
    ]
    if everything:
        yield from (case_of(way, *case) for way in ways for case in (*CASES, *FURTHER[arch]))
        yield from further
    else:
        turn = ARCHITECTURES.index(arch)
        cases = enumerate(CASES[turn :: len(ARCHITECTURES)])
        yield from (case_of(ways[k % 2], *case) for k, case in cases if case[1] < SLOW)
        yield from further[turn : turn + 1]
    sharing = SHARING.get(arch, [])
    yield from (case_of("forward", *case) for case in (sharing if everything else sharing[:1]))


def _compile_all(arch, everything):
    from support.aot_sequence import DEVICES, choose, faults

    from lstm_triton.kernels.search import MOST_COMPILATIONS, candidates
    from lstm_triton.kernels.sequence_cost import registers

    found, compilations = [], []
    for case in dict.fromkeys(_cases(arch, everything)):
        config, report, n = choose(case, arch)
        compilations.append(n)
        if n > MOST_COMPILATIONS:
            found.append(f"{case}: {n} compilations")
        fitting = [c for c in candidates(case.problem, DEVICES[arch]) if c.persistent]
        alike = (c for c in fitting if c.launches == config.launches)
        counted = min((registers(case.problem, c, DEVICES[arch]) for c in alike), default=0)
        is_scarce = (case.way, case.H, case.B) in SCARCE or counted > MANY_REGISTERS
        if fitting and not (config.persistent or is_scarce):
            found.append(f"{case}: one launch per step")
        found += [f"{case}, {config}: {fault}" for fault in faults(case, config, report, 32 if is_scarce else 8)]
    if found:
        sys.exit("\n".join(f"sm_{arch} {text}" for text in found))
    print(
        f"{len(compilations)} kernels are compiled well, the first of the candidates in {compilations.count(1)} cases"
    )


if __name__ == "__main__":
    _compile_all(int(sys.argv[1]), "all" in sys.argv)
