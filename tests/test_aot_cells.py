"""Ready-made cells, compiled for every generation of GPUs; and the LSTM's generated equations beside the hand-written ones.

In a process without the interpreter, one for each generation.
"""

import sys

import pytest
import torch
from support.aot import ARCHITECTURES
from support.process import run_without_interpreter

pytestmark = pytest.mark.long


SOME_ARCHS = (90, 120)


def test_cells_compile_well():
    """Each of them for one architecture, one way."""
    assert "cells compiled well" in run_without_interpreter(__file__, *map(str, SOME_ARCHS), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_full_product_compiles_well(arch):
    assert "cells compiled well" in run_without_interpreter(__file__, str(arch), "all", timeout=1800)


def _compile(arch: int, everything: bool) -> None:
    from support.aot_sequence import Case, choose
    from test_cells import CATALOGUE, eight, lstm

    from lstm_triton.cells import catalogue

    count, index = 0, SOME_ARCHS.index(arch) if arch in SOME_ARCHS else 0
    cells = [*CATALOGUE.items(), ("eight states", eight), ("generated LSTM", lstm), ("masks", catalogue.zoneout())]
    for turn, way in enumerate(("forward", "backward")):
        case = Case(way, 256, 16, 1, torch.bfloat16, "ieee")
        written = choose(case, arch).report
        for name, cell in cells if everything else cells[(turn + index) % 2 + 2 * index :: 4]:
            features = ("training", "random") if name == "masks" else case.features
            report = choose(case._replace(cell=cell.key, features=features), arch).report
            assert report.local_memory_in_loops() == 0 and report.matrix_instructions() > 0, (name, way)
            # The LSTM's own equations compile to the same code, others to about as much for as many states.
            others = {1: (1.15, 1.05), 2: (1.15, 1.05), 4: (1.4, 1.25), 8: (1.4, 1.5)}[cell.n_carried]
            registers, instructions = (1.01, 1.01) if cell is lstm else others
            instructions += 0.5 * (name == "masks")  # random numbers take 270, the smallest kernel has 672
            assert report.registers <= registers * written.registers, (name, way, report.registers, written.registers)
            assert len(report.instructions) <= instructions * len(written.instructions), (name, way)
            count += 1
    print(count, "cells compiled well")


if __name__ == "__main__":
    for arch in sys.argv[1:]:
        if arch != "all":
            _compile(int(arch), everything="all" in sys.argv)
