"""What the launch configuration and the search choose, compiled without a GPU for a GPU of every generation: no spills inside
loops, room in shared memory, products on tensor cores.

One process for each part and architecture, without the interpreter: this file is also the script that it runs.
"""

import functools
import itertools
import sys

import pytest
import torch
from support.aot import ARCHITECTURES, KINDS
from support.process import run_without_interpreter

from lstm_triton.kernels import cell, cell_backward, readout, readout_backward
from lstm_triton.kernels.config import cell_forward_config, uses_tensor_cores
from lstm_triton.kernels.inputs import (
    CellGradients,
    CellInputs,
    CellOptions,
    CellOutputs,
    CellSaved,
    ReadoutGradients,
    ReadoutInputs,
    ReadoutOptions,
    ReadoutSaved,
)
from lstm_triton.kernels.launch import Launcher

SAMPLE = list(itertools.product(("steps", "sequences"), ARCHITECTURES))
ALL = [*SAMPLE, *itertools.product(("steps", "sequences"), (86, 89)), *(("cells", arch) for arch in ARCHITECTURES)]


@pytest.mark.long
@pytest.mark.parametrize("part, arch", SAMPLE)
def test_a_sample_compiles_well(part, arch):
    assert "kernels compiled well" in run_without_interpreter(__file__, part, str(arch), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("part, arch", ALL)
def test_the_full_product_compiles_well(part, arch):
    assert "kernels compiled well" in run_without_interpreter(__file__, part, str(arch), "all", timeout=3600)


@pytest.mark.parametrize("H, megabytes", [(512, 1.0), (1024, 1.5), (2048, 1.5)])
@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16"])
def test_enough_weights_are_in_flight_at_small_batch(kind, H, megabytes):
    """What 132 SMs at full memory bandwidth ask for by Little's law, while one step of the loop is computed."""
    dtype, precision = KINDS[kind]
    config = cell_forward_config(16, H, dtype, precision, 132)
    stage = 4 * config.block_h * config.block_k * dtype.itemsize
    assert -(-H // config.block_h) * (config.num_stages - 2) * stage >= megabytes * 1e6


# ---- steps: every tile of the cell and the readout, as it is launched ------------------------------------------------

ROWS = (1, 17, 64, 1000)
SIZES = {True: (16, 64, 1040, 4096), False: (19, 65, 1001, 4097)}  # aligned or not: of what is not rows
MULTIPROCESSORS = (16, 132)  # enough to have every tile chosen for one of these sizes


def _tensor(*shape, dtype, aligned):
    """Uninitialised, beginning at a multiple of 16 bytes or not."""
    size = functools.reduce(int.__mul__, shape)
    return (torch.empty(size, dtype=dtype) if aligned else torch.empty(size + 1, dtype=dtype)[1:]).view(shape)


def _cell(B, H, kind, aligned):
    """A step in training as part of a layer, and all gradients; for the most rows also inference, and weights alone."""
    dtype, precision = KINDS[kind]
    new, I = functools.partial(_tensor, dtype=dtype, aligned=aligned), 64 if aligned else 33
    inputs = CellInputs(new(B, I), new(B, H), new(B, H), new(4 * H, I), new(4 * H, H), new(4 * H), new(4 * H))
    gates, options, h, c = new(B, H, 4), CellOptions(precision), inputs.h, inputs.c
    y = gates.new_empty(B, 2, H)[:, 0]
    cell.launch_step(inputs, options, CellOutputs(h, c, gates), y, y, D=2)
    backward, saved = cell_backward.lstm_cell_backward, CellSaved(c, gates)
    backward(CellGradients(h, c), inputs, saved, CellInputs._fields, options)
    if B == ROWS[-1]:
        cell.lstm_cell_forward(inputs._replace(b_ih=None, b_hh=None), options)
        backward(CellGradients(h, None), inputs, saved, {"w_ih", "w_hh", "b_ih", "b_hh"}, options)


def _readout(B, V, kind, aligned):
    """Unaligned tensors of 16 bits are taken as under autocast, where y is float32."""
    dtype, precision = KINDS[kind]
    new, H = functools.partial(_tensor, aligned=aligned), 64 if aligned else 33
    inputs = ReadoutInputs(new(B, H, dtype=dtype), new(V, H, dtype=dtype), new(V, dtype=dtype))
    options = ReadoutOptions(precision, dtype if aligned or dtype.itemsize > 2 else torch.float32)
    y = new(B, V, dtype=options.dtype)
    readout.softmax_readout_forward(inputs, options)
    readout_backward.softmax_readout_backward(ReadoutGradients(y), inputs, ReadoutSaved(y), inputs._fields, options)


def _launched(arch, kind, forms):
    """The kernels of cell and readout by what tells them apart, uncompiled.

    forms: whether tensors are aligned, or not; of one form alone, tiles are told apart, and not what else Triton specialises.
    """
    from support.fake_driver import fake_driver

    found = {}
    for sms in MULTIPROCESSORS:
        with fake_driver(arch, sms, compiling=False):
            for function, B, aligned in itertools.product((_cell, _readout), ROWS, forms):
                for size in SIZES[aligned]:
                    function(B, size, kind, aligned)
            for kernel in (kernel for launcher in Launcher._all for kernel in launcher._compiled.values()):
                found.setdefault(kernel.src.hash() if len(forms) > 1 else _tile(kernel.src), kernel)
    return found


def _tile(source):
    constants = {source.fn.arg_names[index]: value for (index,), value in source.constants.items()}
    sizes = {name: value for name, value in constants.items() if name.startswith(("BLOCK_", "TILE_"))}
    return source.fn.__name__, *sizes.items()


def _steps(arch, everything):
    """All; for an architecture with the instructions of another, each tile in one form. Of a sample every other tile, for one
    architecture each.

    float16, the code of bfloat16 but for the type, is compiled once with all.
    """
    from support.aot import Report
    from support.fake_driver import fake_driver

    compiled, every_form = set(), everything and arch in ARCHITECTURES
    for turn, kind in enumerate(KINDS):
        if kind == "fp16" and not (everything and arch == 90):
            continue
        found = _launched(arch, kind, (True, False) if every_form else (turn % 2 == 0,))
        for n, key in enumerate(sorted(found, key=str)):
            is_another_s = not everything and (n + turn) % (2 * len(ARCHITECTURES)) != ARCHITECTURES.index(arch)
            if is_another_s or (every_form and key in compiled):
                continue
            compiled.add(key)
            with fake_driver(arch):
                kernel = found[key].compile()
                kernel._init_handles()
            report = Report(kernel, arch)
            is_product = report.name.endswith(("_forward_kernel", "_backward_kernel"))
            product = None if kind == "fp64" else is_product and uses_tensor_cores(*KINDS[kind])
            may_spill = report.name.startswith("_readout") and not report.local_memory_in_loops()
            yield (kind, *_tile(kernel.src)), report.faults(product, 1 << 20 if may_spill else 0)


# ---- sequences: what the search chooses for a device of this architecture --------------------------------------------

PLAIN, RESETS, DROPOUT = (), ("resets",), ("random", "dropout")
SEGMENTS = ("resets", "lengths", "cells", "reset_gradients")
EVERY = (*SEGMENTS, *DROPOUT)
# kind, H, B, D, features: each size of tile, in both directions and with all features where registers are short.
CASES = [
    ("bf16", 19, 16, 2, EVERY),
    ("bf16", 64, 64, 2, EVERY),
    ("bf16", 512, 64, 2, EVERY),
    ("bf16", 256, 256, 1, EVERY),
    ("bf16", 768, 16, 1, PLAIN),
    ("bf16", 1024, 64, 1, RESETS),
    ("bf16", 1536, 16, 1, EVERY),
    ("fp16", 512, 16, 1, PLAIN),
    ("tf32", 512, 64, 2, RESETS),
    ("tf32", 768, 16, 1, RESETS),
    ("tf32x3", 64, 64, 1, PLAIN),
    ("fp32", 256, 16, 1, EVERY),
    ("fp32", 128, 64, 1, PLAIN),
    ("fp32", 512, 64, 2, EVERY),
    ("fp64", 19, 16, 2, EVERY),
]
# Rows of odd lengths, and as many rows and units as fit.
FURTHER = {
    80: [("bf16", 415, 256, 1, SEGMENTS), ("bf16", 831, 64, 1, EVERY), ("tf32", 255, 256, 1, EVERY)],
    86: [("bf16", 640, 64, 1, EVERY)],
    89: [("bf16", 640, 64, 1, EVERY), ("tf32", 512, 64, 1, RESETS)],
    90: [
        ("bf16", 127, 16, 1, SEGMENTS),
        ("bf16", 512, 256, 1, PLAIN),
        ("bf16", 511, 256, 1, EVERY),
        ("bf16", 1408, 64, 1, PLAIN),
        ("tf32", 384, 256, 1, EVERY),
        ("bf16", 1024, 16, 2, ("lengths",)),
        ("tf32", 1024, 16, 1, PLAIN),
        ("tf32", 831, 32, 1, DROPOUT),
        ("tf32x3", 384, 16, 1, EVERY),
        ("fp32", 256, 64, 1, PLAIN),
    ],
    100: [
        ("bf16", 455, 512, 1, EVERY),
        ("bf16", 1022, 16, 1, EVERY),
        ("bf16", 767, 64, 1, RESETS),
        ("tf32", 254, 512, 2, EVERY),
        ("tf32", 1001, 16, 1, EVERY),
    ],
    120: [("bf16", 384, 128, 2, DROPOUT), ("bf16", 1279, 16, 1, EVERY), ("tf32", 734, 16, 1, EVERY)],
}
# Forward, programs of few units, of which several could share an SM and its tensor memory.
SHARING = {100: [("bf16", 136, 256, 2, PLAIN), ("bf16", 168, 128, 1, PLAIN), ("bf16", 328, 128, 2, PLAIN)]}
SLOW = 512  # units, from which on the kernels take seconds to compile, and several candidates
# Where every tile that fits needs more registers than there are, or nearly, some words are spilled, or each step is a launch.
# For these cases the count, which leaves out addresses and what the compiler keeps, says less than MANY_REGISTERS.
SCARCE = {("backward", 455, 512), ("backward", 254, 512), ("forward", 254, 512)}
MANY_REGISTERS = 216


def _cases(arch, everything):
    """What is compiled: each of CASES for one generation, one way; or everything both ways, of which 86 and 89, for which the
    compiler writes the same code, have a half each."""
    from support.aot_sequence import Case

    ways = ("forward", "backward")

    def case_of(way, kind, H, B, D, features):
        return Case(way, H, B, D, *KINDS[kind], (*features, "training"))

    further = [
        Case("forward", 512, 16, 1, torch.bfloat16, "ieee", ()),
        Case("backward", 512, 16, 1, torch.float16, "ieee", ("training",), recompute=True),
    ]
    if everything:
        for k, case in enumerate((*CASES, *FURTHER[arch])):
            its = ways if arch in ARCHITECTURES else (ways[(k + arch // 89) % 2],)
            yield from (case_of(way, *case) for way in its)
        yield from further
    else:
        turn = ARCHITECTURES.index(arch)
        cases = enumerate(CASES[turn :: len(ARCHITECTURES)])
        yield from (case_of(ways[k % 2], *case) for k, case in cases if case[1] < SLOW)
        yield from further[turn : turn + 1]
    sharing = SHARING.get(arch, [])
    yield from (case_of("forward", *case) for case in (sharing if everything else sharing[:1]))


def _sequences(arch, everything):
    from support.aot_sequence import DEVICES, choose, faults

    from lstm_triton.kernels.search import MOST_COMPILATIONS, candidates
    from lstm_triton.kernels.sequence_cost import registers

    for case in dict.fromkeys(_cases(arch, everything)):
        config, report, n = choose(case, arch)
        if n > MOST_COMPILATIONS:
            yield case, [f"{n} compilations"]
        fitting = [c for c in candidates(case.problem, DEVICES[arch]) if c.persistent]
        alike = (c for c in fitting if c.launches == config.launches)
        counted = min((registers(case.problem, c, DEVICES[arch]) for c in alike), default=0)
        is_scarce = (case.way, case.H, case.B) in SCARCE or counted > MANY_REGISTERS
        if fitting and not (config.persistent or is_scarce):
            yield case, ["one launch per step"]
        yield (case, config), faults(case, config, report, 32 if is_scarce else 8)


# ---- cells: ready-made ones, and the LSTM's generated equations beside the hand-written ones -------------------------


def _cells(arch, everything):
    """All of them both ways."""
    from support.aot_sequence import Case, choose
    from test_cells import CATALOGUE, eight, lstm

    from lstm_triton.cells import catalogue

    cells = [*CATALOGUE.items(), ("eight states", eight), ("generated LSTM", lstm), ("masks", catalogue.zoneout())]
    for way in ("forward", "backward"):
        case = Case(way, 256, 16, 1, torch.bfloat16, "ieee")
        written = choose(case, arch).report
        for name, own in cells:
            features = ("training", "random") if name == "masks" else case.features
            report = choose(case._replace(cell=own.key, features=features), arch).report
            # The LSTM's own equations compile to the same code, others to about as much for as many states.
            others = {1: (1.15, 1.05), 2: (1.15, 1.05), 4: (1.4, 1.25), 8: (1.4, 1.5)}[own.n_carried]
            registers, instructions = (1.01, 1.01) if own is lstm else others
            instructions += 0.5 * (name == "masks")  # random numbers take 270, the smallest kernel has 672
            found = [
                *(["local memory in loops"] if report.local_memory_in_loops() else []),
                *report.faults(True, 1 << 20),
            ]
            if report.registers > registers * written.registers:
                found.append(f"{report.registers} registers, not {written.registers}")
            if len(report.instructions) > instructions * len(written.instructions):
                found.append(f"{len(report.instructions)} instructions, not {len(written.instructions)}")
            yield (name, way), found


def _compile(part, arch, everything):
    found = [(what, list(faults)) for what, faults in PARTS[part](arch, everything)]
    print("\n".join(f"sm_{arch} {what}: {fault}" for what, faults in found for fault in faults))
    if any(faults for _, faults in found):
        sys.exit(1)
    print(len(found), "kernels compiled well")


PARTS = {"steps": _steps, "sequences": _sequences, "cells": _cells}
if __name__ == "__main__":
    _compile(sys.argv[1], int(sys.argv[2]), "all" in sys.argv)
