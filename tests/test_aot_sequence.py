"""The sequence kernels as the configurations launch them, compiled ahead of time for every architecture.

One process per generation of architectures, without the interpreter: this file is also the script that it runs.
"""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.aot import GENERATIONS
from support.process import run_without_interpreter

KINDS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "fp32": (torch.float32, "ieee"),
    "fp64": (torch.float64, "ieee"),
}
PLAIN, RESETS, DROPOUT = (), ("resets",), ("dropout",)
SEGMENTS = ("resets", "lengths", "cells", "learned reset state")
ALL = (*SEGMENTS, *DROPOUT)
# kind, H, B, D, features: one of each size of tile, in both directions and with all features where registers are short.
CASES = [
    ("bf16", 19, 16, 2, ALL),
    ("bf16", 64, 64, 2, ALL),
    ("bf16", 512, 64, 2, ALL),
    ("bf16", 768, 16, 1, PLAIN),
    ("bf16", 1024, 64, 1, RESETS),
    ("bf16", 1536, 16, 1, ALL),
    ("bf16", 1536, 16, 1, PLAIN),
    ("fp16", 512, 16, 1, PLAIN),
    ("tf32", 512, 64, 2, RESETS),
    ("tf32", 768, 16, 1, RESETS),
    ("fp32", 512, 64, 2, ALL),
    ("fp64", 19, 16, 2, ALL),
]
# Where else registers are short.
FURTHER = {
    90: [
        ("bf16", 256, 256, 1, PLAIN),
        ("bf16", 384, 128, 2, DROPOUT),
        ("bf16", 512, 64, 2, DROPOUT),
        ("bf16", 1000, 16, 1, ALL),
        ("bf16", 1024, 16, 2, ("lengths",)),
        ("tf32", 64, 16, 1, PLAIN),
        ("tf32", 512, 16, 1, PLAIN),
        ("tf32", 1001, 16, 1, ALL),
        ("tf32", 1024, 16, 1, PLAIN),
        ("tf32", 1024, 16, 1, RESETS),
        ("bf16", 650, 64, 1, ALL),
        ("tf32x3", 64, 64, 1, PLAIN),
        ("bf16", 1501, 64, 1, ALL),
    ],
    100: [("bf16", 1600, 64, 1, PLAIN), ("fp32", 1000, 64, 1, PLAIN), ("tf32", 1001, 16, 1, ALL)],
    120: [("bf16", 384, 128, 2, DROPOUT), ("fp32", 1000, 64, 1, ALL)],
}


@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_representative_configurations_compile_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_every_tile_compiles_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), "all", timeout=6 * 3600)


def test_the_lint_finds_what_the_interpreter_cannot():
    assert "every mutant found" in run_without_interpreter(__file__, "mutants")


# ---- in a process without the interpreter --------------------------------------------------------------------------


def _cases(archs, everything):
    from support.aot_sequence import Case

    for way, (kind, H, B, D, features) in itertools.product(("forward", "backward"), CASES + FURTHER.get(archs[0], [])):
        yield Case(way, H, B, D, *KINDS[kind], (*features, "training"))
    if everything:
        for arch, way in itertools.product(archs, ("forward", "backward")):
            for largest in _largest_of_each_tile(way, arch):
                for features in (PLAIN, RESETS, ("lengths",), ("resets", "lengths"), DROPOUT, SEGMENTS, ALL):
                    yield largest._replace(features=(*features, "training"))
    yield Case("forward", 512, 16, 1, torch.bfloat16, "ieee", ())
    yield Case("forward", 512, 16, 1, torch.bfloat16, "ieee", single_step=True)
    yield Case("backward", 512, 16, 1, torch.float16, "ieee", ("training",), recompute=True)


def _largest_of_each_tile(way, arch):
    """For each tile that is ever launched, the cases with most units: tiles do with fewer what they do with more.

    Of each kind of row: aligned, of an even number of units, of an odd one.
    """
    from support.aot_sequence import LIMITS, Case, configuration

    sizes = (
        *range(16, 1601, 16),
        *(n + k for n in (16, 32, 64, 128, 256, 500, 896, 1000, 1024, 1500) for k in (-6, -1, 1)),
    )
    found = {}
    for H, kind, B, D in itertools.product(sorted(sizes), KINDS, (16, 32, 64, 128, 256, 512), (1, 2)):
        if kind == "fp16":  # as bf16
            continue
        case = Case(way, H, B, D, *KINDS[kind])
        config = configuration(case, LIMITS[arch])
        tile = replace(config, programs=0, groups=0)
        found[kind, tile, config.programs > 1, H % 16 == 0, H % 2] = case
    return found.values()


def _faults(case, config, report):
    from support.aot import lint_grid_barrier, loads_behind_grid_barrier
    from support.aot_sequence import LIMITS

    from lstm_triton.kernels.config import uses_tensor_cores

    if report.local_memory_in_loops():
        yield f"{report.local_memory_in_loops()} accesses to local memory in loops"
    if report.shared_memory > LIMITS[report.arch].shared_memory:
        yield f"{report.shared_memory} bytes of shared memory"
    if uses_tensor_cores(case.dtype, case.precision):
        if not report.matrix_instructions():
            yield "no matrix instructions"
        wide = case.way == "forward" and 4 * config.block_h >= 64
        if report.arch == 90 and wide and not report.counts["HGMMA"]:
            yield "no wgmma"
    # The compiler lays operands out for the narrowest type loaded on the way to them: anything else costs a move per element.
    if other := set(re.findall(r"kWidth = (\d+)", report.ttgir)) - {str(max(4 // case.dtype.itemsize, 1))}:
        yield f"operands laid out for elements of another width: kWidth {other}"
    if not config.persistent:
        return
    # Two functions of the special function unit (exp2, reciprocal) an activation.
    activations = 1 if case.way == "backward" and not case.recompute else 5
    each = max(config.block_b * config.block_h // (32 * config.num_warps), 1)
    computed = sum(instruction.opcode == "MUFU" for instruction in report.in_loops)
    if case.dtype != torch.float64 and computed > 2 * activations * each:
        yield f"{computed} special functions, not {2 * activations * each}: is a unit computed by several threads?"
    waits = config.programs > 1 and not case.single_step
    exchanged, own = _loads_of_a_step(case, config)
    exact = case.features == ("training",) and case.H % 16 == 0
    if waits:
        yield from lint_grid_barrier(report)
        # Features and odd rows make more loads of it, never fewer.
        behind = loads_behind_grid_barrier(report)
        if behind < exchanged[0] or (exact and behind > exchanged[-1]):
            yield f"{behind} loads between wait and arrive, not {' to '.join(map(str, exchanged))}"
    loads = [i.text for i in report.in_loops if i.opcode in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")]
    data = [text for text in loads if ".STRONG.GPU" not in text]
    polls = len(loads) - len(data)
    if polls > (2 if waits else 0):
        yield f"{polls} polls"
    if exact and not exchanged[0] <= len(data) - own <= exchanged[-1]:
        yield f"{len(data)} loads in the time loop, not {own} + {' to '.join(map(str, exchanged))}: is W_hh among them?"


def _loads_of_a_step(case, config):
    """Of the exchanged state of all units, fewest and most; and of what belongs to the program's own units and rows."""

    def loads(elements, most_bytes=16):
        """By each thread."""
        return max(elements * case.dtype.itemsize // (most_bytes * 32 * config.num_warps), 1)

    own = config.block_b * config.block_h
    depth = config.split_k * config.block_k
    inner = case.H if case.way == "forward" else 4 * case.H
    chunks, rest = divmod(inner, depth)
    exchanged = chunks * loads(config.block_b * depth)
    # Of the last chunk what is past the end may be left out.
    exchanged = [exchanged + loads(config.block_b * n) for n in (rest, depth)] if rest else [exchanged]
    if case.way == "forward":
        return exchanged, loads(4 * own)  # the pre-activations
    # The gates, dh_n and the c before the step; and dy, of whose alignment nothing is known.
    return exchanged, loads(4 * own) + 2 * loads(own) + loads(own, case.dtype.itemsize)


def _compile_all(archs, everything):
    from support.aot import compile_ahead
    from support.aot_sequence import compile_cases

    from lstm_triton.kernels.dropout import _lstm_kept_kernel

    compiled, faults = 0, []
    signature = {"seed_ptr": "*i64:16", "out_ptr": "*u8:16", "B": "i32", "N": "i32", "p_hi": "i32", "p_lo": "i32"}
    masks = compile_ahead(_lstm_kept_kernel, signature, {"BLOCK": 128}, arch=archs[0], num_warps=1, num_stages=1)
    if masks.spill_bytes:
        faults.append(f"{masks}")
    for case, config, report in compile_cases(dict.fromkeys(_cases(archs, everything)), archs):
        faults += [f"sm_{report.arch} {case}, {config}: {fault}" for fault in _faults(case, config, report)]
        compiled += 1
    if faults:
        sys.exit("\n".join(faults))
    print(f"{compiled} kernels compiled well")


def _find_mutants():
    """What the threads of one program do among themselves shows in the compiled code alone."""
    import triton
    import triton.language as tl
    from support.aot import RELEASE_COLLECTS_STORES, lint_grid_barrier, loads_behind_grid_barrier
    from support.aot_sequence import LIMITS, Case, compile_case, configuration

    from lstm_triton.kernels import sequence, sequence_backward

    @triton.jit
    def arrive_without_barrier(counter_ptr):
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")

    @triton.jit
    def relaxed_arrive(counter_ptr):
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")

    @triton.jit
    def wait_relaxed(counter_ptr, target, stall_ptr):
        while tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") < target:
            pass
        tl.debug_barrier()

    @triton.jit
    def no_wait(counter_ptr, target, stall_ptr):
        pass

    mutants = [
        ("arrive", arrive_without_barrier, "no bar.sync between the stores and the release"),
        ("arrive", relaxed_arrive, "no release"),
        ("wait", wait_relaxed, "no acquire"),
        ("wait", no_wait, "no acquire"),
    ]
    if RELEASE_COLLECTS_STORES:
        del mutants[0]
    for way, module in (("forward", sequence), ("backward", sequence_backward)):
        case = Case(way, 256, 16, 1, torch.bfloat16, "ieee")
        for name, mutant, fault in mutants:
            sound = getattr(module, name)
            setattr(module, name, mutant)
            found = lint_grid_barrier(compile_case(case, 90))
            setattr(module, name, sound)
            assert any(fault in text for text in found), (way, fault, found)
        assert lint_grid_barrier(compile_case(case, 90)) == []
        [expected], _ = _loads_of_a_step(case, configuration(case, LIMITS[90]))
        assert loads_behind_grid_barrier(compile_case(case, 90)) == expected
        with _mutated(way, functools.partial(_waiting_after_the_loads, way)):
            assert loads_behind_grid_barrier(compile_case(case, 90)) == 0
        case = case._replace(features=("training",))
        with _mutated(way, _loading_weights_in_every_step):
            found = list(_faults(case, configuration(case, LIMITS[90]), compile_case(case, 90)))
            assert any("is W_hh among them?" in text for text in found), found
    with _mutated("backward", _computing_units_in_every_warp):
        case = Case("backward", 256, 16, 1, torch.bfloat16, "ieee")
        found = list(_faults(case, configuration(case, LIMITS[90]), compile_case(case, 90)))
        assert any("special functions" in text for text in found), found
    with _mutated("forward", _loading_resets_on_the_way_to_the_product):
        case = Case("forward", 256, 16, 1, torch.bfloat16, "ieee", ("resets", "training"))
        found = list(_faults(case, configuration(case, LIMITS[120]), compile_case(case, 120)))
        assert any("another width" in text for text in found), found
    print("every mutant found")


def _waiting_after_the_loads(way, source):
    wait = re.search(r"        if counters_ptr is not None:\n            wait\(.*\n", source)[0]
    behind = {"forward": "        z_i, z_f, z_g, z_o = split", "backward": "        dh_next = tl.gather("}[way]
    assert source.count(behind) == 1
    return source.replace(wait, "").replace(behind, wait + behind)


def _loading_weights_in_every_step(source):
    [load] = re.findall(r"weights \+ \(.*\n\s*(_load_weight_chunk\(.*\)),\n", source)
    return source.replace("weights[chunk]", load)


def _computing_units_in_every_warp(source):
    return source.replace("tl.gather(tl.sum(parts, axis=0), units, axis=1)", "tl.sum(parts, axis=0)")


def _loading_resets_on_the_way_to_the_product(source):
    load = re.search(r"    resets = resets_at\(t, .*\n", source)[0]
    use = "            reset_h_rows = reset_state_rows("
    return source.replace(use, 12 * " " + load.lstrip() + use)


@contextlib.contextmanager
def _mutated(way, change):
    """The kernel of this way with its module's source changed."""
    from support import aot_sequence

    kernel = aot_sequence._KERNELS[way]
    path = Path(inspect.getsourcefile(kernel.fn))
    source = change(path.read_text())
    assert source != path.read_text()
    with tempfile.TemporaryDirectory() as folder:
        mutated = Path(folder, path.name)
        mutated.write_text(re.sub(r"from \.(\w+) import", r"from lstm_triton.kernels.\1 import", source))
        spec = importlib.util.spec_from_file_location("mutated", mutated)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        aot_sequence._KERNELS[way] = getattr(module, kernel.fn.__name__)
        yield
        aot_sequence._KERNELS[way] = kernel


if __name__ == "__main__":
    if sys.argv[1] == "mutants":
        _find_mutants()
    else:
        _compile_all([int(arch) for arch in sys.argv[1:] if arch != "all"], everything="all" in sys.argv)
