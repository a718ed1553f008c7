"""The sequence kernels as the configurations launch them, compiled ahead of time for every architecture.

One process per generation of architectures, without the interpreter: this file is also the script that it runs.
"""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from support.aot import GENERATIONS
from support.process import run_without_interpreter

pytestmark = pytest.mark.long

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
    ("bf16", 256, 256, 1, ALL),
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
# Programs of few units, of which several could share an SM and its tensor memory.
SHARING = {
    100: [
        ("bf16", 136, 256, 2, PLAIN),
        ("bf16", 168, 128, 1, PLAIN),
        ("bf16", 264, 256, 2, PLAIN),
        ("bf16", 328, 128, 2, PLAIN),
        ("tf32", 168, 256, 2, PLAIN),
    ]
}
# Where else registers are short.
FURTHER = {
    80: [
        ("bf16", 127, 512, 1, ALL),
        ("bf16", 415, 256, 1, SEGMENTS),
        ("bf16", 831, 64, 1, ALL),
        ("bf16", 1023, 32, 1, SEGMENTS),
        ("tf32", 255, 256, 1, ALL),
    ],
    90: [
        ("bf16", 127, 16, 1, SEGMENTS),
        ("bf16", 512, 256, 1, PLAIN),
        ("bf16", 511, 256, 1, ALL),
        ("tf32", 384, 256, 1, ALL),
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
        ("tf32", 831, 32, 1, DROPOUT),
        ("tf32", 905, 16, 1, ALL),
    ],
    100: [
        ("bf16", 455, 512, 1, ALL),
        ("bf16", 1022, 16, 1, ALL),
        ("bf16", 1600, 64, 1, PLAIN),
        ("bf16", 320, 256, 1, SEGMENTS),
        ("bf16", 766, 64, 1, PLAIN),
        ("bf16", 767, 64, 1, RESETS),
        ("bf16", 1352, 16, 1, DROPOUT),
        ("bf16", 1360, 16, 1, SEGMENTS),
        ("fp32", 1000, 64, 1, PLAIN),
        ("tf32", 254, 512, 2, ALL),
        ("tf32", 383, 128, 1, RESETS),
        ("tf32", 451, 64, 1, ALL),
        ("tf32", 907, 16, 1, SEGMENTS),
        ("tf32", 1001, 16, 1, ALL),
    ],
    120: [
        ("bf16", 384, 128, 2, DROPOUT),
        ("bf16", 1279, 16, 1, ALL),
        ("tf32", 734, 16, 1, ALL),
        ("bf16", 1359, 16, 1, SEGMENTS),
        ("fp32", 1000, 64, 1, ALL),
    ],
}


@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_representative_configurations_compile_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_the_full_product_compiles_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), "all", timeout=3600)


@pytest.mark.slow
@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_every_tile_compiles_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), "tiles", timeout=6 * 3600)


# ---- in a process without the interpreter --------------------------------------------------------------------------


def _cases(archs, extent):
    """What is compiled. Unless extent says "all" or "tiles", CASES in one way each, in the other for the next architectures."""
    from support.aot_sequence import Case

    ways = ("forward", "backward")
    turn = GENERATIONS.index(archs)
    launches = [(ways[(turn + position) % 2], case) for position, case in enumerate(CASES)]
    launches += [("forward", case) for case in SHARING.get(archs[0], [])]
    if extent:
        launches += itertools.product(ways, (*CASES, *SHARING.get(archs[0], []), *FURTHER.get(archs[0], [])))
    for way, (kind, H, B, D, features) in launches:
        yield Case(way, H, B, D, *KINDS[kind], (*features, "training"))
    if extent == "tiles":
        for arch, way in itertools.product(archs, ("forward", "backward")):
            for largest in _largest_of_each_tile(way, arch):
                for features in (PLAIN, RESETS, ("lengths",), ("resets", "lengths"), DROPOUT, SEGMENTS, ALL):
                    yield largest._replace(features=(*features, "training"))
    yield Case("forward", 512, 16, 1, torch.bfloat16, "ieee", ())
    yield Case("forward", 512, 16, 1, torch.bfloat16, "ieee", single_step=True)
    yield Case("backward", 512, 16, 1, torch.float16, "ieee", ("training",), recompute=True)


def _largest_of_each_tile(way, arch):
    """For each tile that is ever launched, the cases with most units and, of those with most chunks in flight, with most units.

    Of each kind of row: of a multiple of 16 units, of 8, of an even number, of an odd one; and of these that next below a
    multiple of 16, to which masks come cheaper. Tiles do with less what they do with more.
    """
    from support.aot_sequence import LIMITS, Case, configuration

    found = {}
    for H, kind, B, D in itertools.product(range(1, 1601), KINDS, (16, 32, 64, 128, 256, 512), (1, 2)):
        if kind == "fp16":  # as bf16
            continue
        case = Case(way, H, B, D, *KINDS[kind])
        config = configuration(case, LIMITS[arch])
        tile = replace(config, programs=0, groups=0, in_flight=0)
        key = (kind, tile, config.programs > 1, H % 16 == 0, H % 8 == 0, H % 2, H % 16 >= 14)
        _, most, of_most = found.get(key, (case, 0, case))
        if config.in_flight >= most:
            most, of_most = config.in_flight, case
        found[key] = case, most, of_most
    return dict.fromkeys(case for largest, _, of_most in found.values() for case in (largest, of_most))


def _compile_all(archs, extent):
    from support.aot import compile_ahead
    from support.aot_sequence import compile_cases, faults

    from lstm_triton.kernels.dropout import _lstm_kept_kernel

    compiled, found = 0, []
    signature = {"seed_ptr": "*i64:16", "out_ptr": "*u8:16", "B": "i32", "N": "i32", "p_hi": "i32", "p_lo": "i32"}
    masks = compile_ahead(_lstm_kept_kernel, signature, {"BLOCK": 128}, arch=archs[0], num_warps=1, num_stages=1)
    if masks.stack_bytes:
        found.append(f"{masks}")
    for case, config, report in compile_cases(dict.fromkeys(_cases(archs, extent)), archs):
        found += [f"sm_{report.arch} {case}, {config}: {fault}" for fault in faults(case, config, report)]
        compiled += 1
    if found:
        sys.exit("\n".join(found))
    print(f"{compiled} kernels compiled well")


if __name__ == "__main__":
    numbers = [argument for argument in sys.argv[1:] if argument.isdecimal()]
    _compile_all(tuple(map(int, numbers)), "".join(sys.argv[1 + len(numbers) :]))
