"""The readout's kernels compiled for every architecture, in every launch configuration, without a GPU.

What runs without the interpreter runs in processes of its own: one per architecture, and one for the JIT's behaviour.
"""

import itertools
import sys

import pytest
import torch
import triton.language as tl
from support.aot import GENERATIONS, KINDS, Variant, compile_all, in_turn
from support.fake_driver import count_compiled, fake_driver
from support.process import run_checks, run_without_interpreter

from lstm_triton.kernels import config as configs
from lstm_triton.kernels import readout, readout_backward, readout_sums
from lstm_triton.kernels.inputs import ReadoutGradients, ReadoutInputs, ReadoutOptions, ReadoutSaved

pytestmark = pytest.mark.long

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
SIZES = (1, 16, 17, 64, 65, 128, 1000, 128 * 1024)
INNERMOST = ("stride_h_k", "stride_weight_k", "stride_bias", "stride_dy_v")


@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_every_configuration_compiles_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_the_full_product_compiles_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), "all", timeout=3600)


def test_jit():
    assert "checks passed" in run_without_interpreter(__file__)


def _signature(kernel, constants, dtype, result, aligned):
    """The types of a launch: y and dy in `result`, sums in the accumulator's type, everything else in `dtype`.

    aligned: whether addresses and sizes are multiples of 16 and rows contiguous, or nothing is known of them.
    """
    summed = "fp64" if dtype == torch.float64 else "fp32"
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            continue
        if name.endswith("_ptr"):
            is_sum = name in ("stats_ptr", "dots_ptr") or "_parts_" in name
            type_ = "*" + (summed if is_sum else TYPES[result if name in ("y_ptr", "dy_ptr") else dtype])
        else:
            type_ = "i32"
        hint = "" if not aligned or parameter.do_not_specialize else ":1" if name in INNERMOST else ":16"
        signature[name] = type_ + hint
    return signature


def _forward_configs(dtype, precision):
    """Every configuration of the forward that any problem has on any device."""
    problems = itertools.product(SIZES, SIZES, (1, 16, 84, 132, 192))
    return sorted({configs.readout_forward_config(B, V, dtype, precision, n) for B, V, n in problems}, key=repr)


def _products(dtype, precision):
    """(kernel, constants, configuration) of every launch that multiplies matrices."""
    common = {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "PRECISION": precision}
    for c in _forward_configs(dtype, precision):
        yield readout._readout_forward_kernel, common | c.constants, c
    for c in sorted({configs.readout_backward_config(B, dtype, precision) for B in SIZES}, key=repr):
        yield readout_backward._readout_backward_kernel, common | c.constants, c


def _others(dtype):
    """The same of the other launches, which do not depend on the precision."""
    common = {"ACC": tl.float64 if dtype == torch.float64 else tl.float32}
    for tile_v in sorted({c.block_v for c in _forward_configs(dtype, "ieee")}):
        for c in {configs.readout_rescale_config(B, 4096, tile_v, 132) for B in (1, 132)}:
            yield readout._readout_rescale_kernel, common | c.constants | {"TILE_V": tile_v}, c
    for kernel, c in (
        (readout_sums._readout_row_dots_kernel, configs.READOUT_ROW_DOTS),
        (readout_sums._readout_sum_parts_kernel, configs.READOUT_SUM_PARTS),
    ):
        yield kernel, common | c.constants, c


def _variants(archs, everything):
    """What is launched: each configuration aligned, and unaligned with the dtype that y and dy may have besides.

    float16, which is the code of bfloat16 but for the type, on one generation alone and with everything.
    """
    for turn, (kind, (dtype, precision)) in enumerate(KINDS.items()):
        if kind == "fp16" and not (everything and archs == (90,)):
            continue
        tensor_cores = configs.uses_tensor_cores(dtype, precision)
        launches = [(launch, tensor_cores) for launch in _products(dtype, precision)]
        if precision == "ieee":
            launches += [(launch, False) for launch in _others(dtype)]
        for position, ((kernel, constants, config), on_tensor_cores) in enumerate(launches):
            # Under autocast y and dy of the products are float32.
            under_autocast = dtype.itemsize == 2 and on_tensor_cores
            forms = [(dtype, True), (torch.float32 if under_autocast else dtype, False)]
            for result, aligned in in_turn(archs, everything, turn + position, forms):
                signature = _signature(kernel, constants, dtype, result, aligned)
                words = f"{kind} {result} {'' if aligned else 'un'}aligned {constants}"
                yield Variant(kernel, signature, constants, config, on_tensor_cores, words)


def _grids(driver):
    """The number of programs by kernel, of the launches since the last call."""
    found = {launch.kernel: launch.grid[0] for launch in driver.launches}
    driver.launches.clear()
    return found


def check_one_row_of_a_large_vocabulary_fills_the_gpu():
    B, H, V, multiprocessors = 1, 64, 128 * 1024, 132
    h, weight = torch.zeros(B, H, dtype=torch.bfloat16), torch.zeros(V, H, dtype=torch.bfloat16)
    with fake_driver(sm_count=multiprocessors, compiling=False) as driver:
        inputs, options = ReadoutInputs(h, weight), ReadoutOptions(None, h.dtype)
        (y,) = readout.softmax_readout_forward(inputs, options)
        programs = _grids(driver)
        assert programs["_readout_forward_kernel"] == 1024 and len(programs) == 2, programs
        assert min(programs.values()) >= multiprocessors, programs
        readout_backward.softmax_readout_backward(ReadoutGradients(y), inputs, ReadoutSaved(y), {"h"}, options)
        programs = _grids(driver)
        assert programs["_readout_row_dots_kernel"] == 128, programs
        assert programs["_readout_backward_kernel"] >= 3 * multiprocessors, programs


def _compiled(*shapes):
    """How often each of the five kernels has been compiled, after problems of these shapes B, H, V."""
    for B, H, V in shapes:
        h, weight = torch.zeros(B, H, dtype=torch.bfloat16), torch.zeros(V, H, dtype=torch.bfloat16)
        inputs, options = ReadoutInputs(h, weight, torch.zeros(V, dtype=h.dtype)), ReadoutOptions(None, h.dtype)
        (y,) = readout.softmax_readout_forward(inputs, options)
        needs = set(ReadoutInputs._fields)
        readout_backward.softmax_readout_backward(ReadoutGradients(y), inputs, ReadoutSaved(y), needs, options)
    return [
        count_compiled(kernel)
        for kernel in (
            readout._readout_forward_kernel,
            readout._readout_rescale_kernel,
            readout_sums._readout_row_dots_kernel,
            readout_backward._readout_backward_kernel,
            readout_sums._readout_sum_parts_kernel,
        )
    ]


def check_sizes_recompile_only_by_divisibility():
    with fake_driver(compiling=False):
        assert _compiled((8, 64, 1024)) == [1] * 5
        assert _compiled(*((B, 64, 1024) for B in (1, 3, 8, 16))) == [1] * 5, "the batch size recompiles"
        assert _compiled((8, 128, 1024), (8, 1600, 1024)) == [1] * 5, "H recompiles"
        assert _compiled((8, 64, 1040), (8, 64, 4096)) == [1] * 5, "V recompiles"
        # Sums of parts of dh alone, as here, are of one size, which is not specialised.
        odd = [2, 2, 2, 2, 1]
        assert _compiled((8, 33, 1025)) == odd, "no multiples of 16"
        assert _compiled((8, 77, 1025), (8, 2, 1025), (8, 33, 999), (3, 33, 4001)) == odd, "an odd size recompiles"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_all(_variants, spills=True)
    else:
        run_checks(globals())
