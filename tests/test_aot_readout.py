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
    (torch.float16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
    (torch.float32, "ieee"),
    (torch.float64, "ieee"),
]
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
INNERMOST = ("stride_h_k", "stride_weight_k", "stride_bias", "stride_dy_v")


@pytest.mark.parametrize("arch", SHARED_MEMORY_PER_BLOCK)
def test_every_configuration_compiles_well(arch):
    assert "kernels compiled" in run_without_interpreter(__file__, str(arch), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY_PER_BLOCK)
def test_the_full_product_compiles_well(arch):
    assert "kernels compiled" in run_without_interpreter(__file__, str(arch), "all", timeout=3600)


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


def _cases(arch, everything):
    """(kernel, constants, configuration, dtype, dtype of y, aligned, whether on tensor cores) to be compiled.

    Unless everything: without float16, which is the code of bfloat16 but for the type, and of unaligned tensors only the
    largest tiles, and none on 86, 89 and 120, which run the code of 80.
    """
    for dtype, precision in KINDS:
        if dtype == torch.float16 and not everything:
            continue
        tensor_cores = configs.uses_tensor_cores(dtype, precision)
        products = list(_products(dtype, precision))
        largest = {
            kernel: max(c.block_b * c.block_v for k, _, c in products if k is kernel) for kernel, _, _ in products
        }
        for kernel, constants, c in products:
            # Under autocast y and dy are float32.
            for result in (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,):
                if result == dtype or everything or kernel is readout_backward._readout_backward_kernel:
                    yield kernel, constants, c, dtype, result, True, tensor_cores
                if everything or (
                    result == dtype and arch in (80, 90, 100) and c.block_b * c.block_v == largest[kernel]
                ):
                    yield kernel, constants, c, dtype, result, False, tensor_cores
        if precision == "ieee":
            for aligned in (True, False) if everything else (True,):
                for launch in _others(dtype):
                    yield *launch, dtype, dtype, aligned, False


def _compile_all(arch, everything):
    compiled, failures = 0, []
    for kernel, constants, c, dtype, result, aligned, tensor_cores in _cases(arch, everything):
        signature = _signature(kernel, constants, dtype, result, aligned)
        options = {"arch": arch, "num_warps": c.num_warps, "num_stages": c.num_stages}
        report = compile_ahead(kernel, signature, constants, **options)
        what = f"{report.name} sm_{arch} {dtype} y {result} {'aligned' if aligned else 'unaligned'} {constants} {c}"
        if not report.fits():
            failures.append(f"{what}: {report.shared_memory} bytes of shared memory")
        if report.stack_bytes and report.local_memory_in_loops():
            failures.append(f"{what}: {report.local_memory_in_loops()} accesses to local memory in loops")
        if tensor_cores and "mma" not in report.ptx:
            failures.append(f"{what}: no tensor cores")
        compiled += 1
    if failures:
        sys.exit("\n".join(failures))
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
        _compile_all(int(sys.argv[1]), everything="all" in sys.argv)
    else:
        run_checks(globals())
