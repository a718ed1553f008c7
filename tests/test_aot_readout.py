"""The readout's kernels compiled for every architecture, in every launch configuration, without a GPU.

What runs without the interpreter runs in processes of its own: one per architecture, and one for the JIT's behaviour.
"""

import sys

import pytest
import torch
import triton.language as tl
from support.aot import SHARED_MEMORY_PER_BLOCK, compile_ahead
from support.fake_driver import count_compiled, fake_driver
from support.process import run_checks, run_without_interpreter

from lstm_triton.kernels import config as configs
from lstm_triton.kernels import readout, readout_backward

KINDS = [
    (torch.bfloat16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
    (torch.float32, "ieee"),
    (torch.float64, "ieee"),
]
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
INNERMOST = ("stride_h_k", "stride_weight_k", "stride_bias", "stride_dy_v")


@pytest.mark.parametrize("arch", SHARED_MEMORY_PER_BLOCK)
def test_every_configuration_compiles(arch):
    assert "kernels compiled" in run_without_interpreter(__file__, str(arch))


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


def _products(dtype, precision):
    """(kernel, constants, configuration) of every launch that multiplies matrices."""
    common = {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "PRECISION": precision}
    for c in configs.all_readout_forward_configs(dtype, precision):
        tile = {"BLOCK_B": c.block_b, "BLOCK_V": c.block_v, "BLOCK_K": c.block_k, "GROUP": c.group}
        yield readout._readout_forward_kernel, common | tile, c
    for c in configs.all_readout_backward_configs(dtype, precision):
        tile = {"BLOCK_B": c.block_b, "BLOCK_V": c.block_v, "BLOCK_N": c.block_n, "BLOCK_PARTS": c.block_parts}
        yield readout_backward._readout_backward_kernel, common | tile, c


def _others(dtype):
    """The same of the other launches, which do not depend on the precision."""
    common = {"ACC": tl.float64 if dtype == torch.float64 else tl.float32}
    for tile_v, c in configs.all_readout_rescale_configs(dtype, "ieee"):
        tile = {"TILE_V": tile_v, "BLOCK_TILES": c.block_tiles, "BLOCK_STATS": c.block_stats}
        yield readout._readout_rescale_kernel, common | tile, c
    c = configs.readout_row_dots_config()
    yield readout_backward._readout_row_dots_kernel, common | {"BLOCK_V": c.block_v}, c
    c = configs.readout_sum_parts_config()
    yield readout_backward._readout_sum_parts_kernel, common | {"BLOCK_P": c.block_parts, "BLOCK": c.block}, c


def _cases():
    """(kernel, constants, configuration, dtype, dtype of y, aligned, whether on tensor cores) to be compiled."""
    for dtype, precision in KINDS:
        for launch in _products(dtype, precision):
            tensor_cores = configs.uses_tensor_cores(dtype, precision)
            # fp16 has the configurations of bf16, and differs in one modifier of an instruction.
            yield *launch, dtype, dtype, True, tensor_cores
            unaligned = torch.float16 if dtype == torch.bfloat16 else dtype
            yield *launch, unaligned, unaligned, False, tensor_cores
            if dtype == torch.bfloat16 and launch[0] is readout_backward._readout_backward_kernel:
                yield *launch, dtype, torch.float32, True, tensor_cores  # as under autocast
        if precision == "ieee":
            for launch in _others(dtype):
                yield *launch, dtype, dtype, True, False


def _compile_all(arch):
    compiled = 0
    for kernel, constants, c, dtype, result, aligned, tensor_cores in _cases():
        signature = _signature(kernel, constants, dtype, result, aligned)
        report = compile_ahead(kernel, signature, constants, arch=arch, num_warps=c.num_warps, num_stages=c.num_stages)
        label = f"{report.name} {dtype}, y {result}, {constants} {c} for sm_{arch}, aligned: {aligned}"
        assert report.fits(), f"{label}: {report.shared_memory} bytes of shared memory"
        assert not report.stack_bytes or not report.local_memory_in_loops(), f"{label}: spills in a loop"
        assert not tensor_cores or "mma" in report.ptx, f"{label}: no tensor cores"
        compiled += 1
    print(f"{compiled} kernels compiled")


def _grids(driver):
    """The number of programs by kernel, of the launches since the last call."""
    found = {launch.kernel: launch.grid[0] for launch in driver.launches}
    driver.launches.clear()
    return found


def check_one_row_of_a_large_vocabulary_fills_the_gpu():
    B, H, V, multiprocessors = 1, 64, 128 * 1024, 132
    h, weight = torch.zeros(B, H, dtype=torch.bfloat16), torch.zeros(V, H, dtype=torch.bfloat16)
    with fake_driver(sm_count=multiprocessors) as driver:
        y = readout.softmax_readout_forward(h, weight)
        programs = _grids(driver)
        assert programs["_readout_forward_kernel"] == 1024 and len(programs) == 2, programs
        assert min(programs.values()) >= multiprocessors, programs
        readout_backward.softmax_readout_backward(y, y, h, weight, (True, False, False))
        programs = _grids(driver)
        assert programs["_readout_row_dots_kernel"] == 128, programs
        assert programs["_readout_backward_kernel"] >= 3 * multiprocessors, programs


def check_a_new_batch_size_does_not_recompile():
    H, V = 64, 1024
    weight = torch.zeros(V, H, dtype=torch.bfloat16)
    kernels = [
        readout._readout_forward_kernel,
        readout._readout_rescale_kernel,
        readout_backward._readout_row_dots_kernel,
        readout_backward._readout_backward_kernel,
        readout_backward._readout_sum_parts_kernel,
    ]
    with fake_driver():
        for B in (1, 3, 8, 16):
            h = torch.zeros(B, H, dtype=torch.bfloat16)
            y = readout.softmax_readout_forward(h, weight)
            readout_backward.softmax_readout_backward(y, y, h, weight)
        assert [count_compiled(kernel) for kernel in kernels] == [1] * 5, [count_compiled(k) for k in kernels]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _compile_all(int(sys.argv[1]))
    else:
        run_checks(globals())
