"""Every launch configuration of the cell, compiled for every architecture: no spills, room in shared memory, tensor cores.

Compilation needs no GPU, but a process without the interpreter: one for each architecture.
"""

import itertools
import re
import sys

import pytest
import torch
from support.process import run_without_interpreter

from lstm_triton.kernels.config import (
    all_cell_backward_configs,
    all_cell_forward_configs,
    cell_backward_config,
    cell_forward_config,
)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# dtype, precision, and whether the products run on the tensor cores (None: up to the architecture).
KINDS = {
    "fp32": (torch.float32, "ieee", False),
    "tf32": (torch.float32, "tf32", True),
    "tf32x3": (torch.float32, "tf32x3", True),
    "fp16": (torch.float16, "ieee", True),
    "bf16": (torch.bfloat16, "ieee", True),
    "fp64": (torch.float64, "ieee", None),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_compiles_well(arch):
    assert "configurations compiled well" in run_without_interpreter(__file__, str(arch), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_full_product_compiles_well(arch):
    assert "configurations compiled well" in run_without_interpreter(__file__, str(arch), "all", timeout=3600)


@pytest.mark.parametrize("kind", KINDS)
def test_every_configuration_in_use_is_among_those(kind):
    dtype, precision, _ = KINDS[kind]
    sizes = (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 256, 1000, 4096, 65536)
    found = set(), set()
    for B, H, multiprocessors in itertools.product(sizes, sizes, (1, 16, 28, 58, 84, 108, 132, 148, 192)):
        for I in (1, 128, 1000):
            found[0].add(cell_forward_config(B, I, H, dtype, precision, multiprocessors))
            found[1].add(cell_backward_config(B, I, H, dtype, precision, multiprocessors))
    assert found[0] == all_cell_forward_configs(dtype, precision)
    assert found[1] == all_cell_backward_configs(dtype, precision)


# ---- in a process without the interpreter --------------------------------------------------------------------------

POINTERS = {"fp32": "*fp32", "tf32": "*fp32", "tf32x3": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "fp64": "*fp64"}


def _signature(kernel, constants, pointer, aligned):
    """What the JIT makes of dense tensors: sizes that are multiples of 16, or odd ones and pointers off by an element."""
    hint = ":16" if aligned else ""
    inner = ("_k", "_i", "_h", "stride_dh_h", "stride_b_ih", "stride_b_hh")  # the strides that are 1
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = pointer + hint
        elif name.startswith("stride_"):
            signature[name] = "i32:1" if name.endswith(inner) and not name.endswith("_b_h") else "i32" + hint
        elif name not in constants:
            signature[name] = "i32" if name == "B" else "i32" + hint
    return signature


def _rows(config):
    return config.block_b, config.block_h


def _is_in_the_main_selection(arch, kind, aligned, config, configs):
    """All that is emitted takes two minutes for each architecture; without what follows, half a minute:

    float16, which is the code of bfloat16 but for the type; and of unaligned tensors all but the largest tile, and all on
    86, 89 and 120, which run the code of 80 with less shared memory, of which unaligned loads need little.
    """
    return kind != "fp16" and (aligned or (arch in (80, 90, 100) and _rows(config) == max(map(_rows, configs))))


def _compilations(arch, everything):
    """(kernel, configuration, constants, kind, aligned, whether it is in the main selection) of what is launched."""
    from lstm_triton.kernels.cell import _lstm_cell_forward_kernel as forward
    from lstm_triton.kernels.cell_backward import _lstm_cell_backward_kernel as backward
    from lstm_triton.kernels.launch import accumulator

    for kind, (dtype, precision, _) in KINDS.items():
        shared = {"ACC": accumulator(dtype), "PRECISION": precision}
        for kernel, configs, block in (
            (forward, all_cell_forward_configs(dtype, precision), "block_k"),
            (backward, all_cell_backward_configs(dtype, precision), "block_n"),
        ):
            for config, aligned in itertools.product(sorted(configs, key=repr), (True, False)):
                is_main = _is_in_the_main_selection(arch, kind, aligned, config, configs)
                if everything or is_main:
                    tile = {name.upper(): getattr(config, name) for name in ("block_b", "block_h", block)}
                    yield kernel, config, {**shared, **tile}, kind, aligned, is_main


def _faults(report, tensor_cores, may_spill):
    if report.spill_bytes > may_spill:
        yield f"{report.spill_bytes} bytes spilled"
    if not may_spill and report.stack_bytes and report.local_memory_in_loops():
        yield f"{report.local_memory_in_loops()} accesses to local memory in loops"
    if not report.fits():
        yield f"{report.shared_memory} bytes of shared memory"
    matrix_instructions = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", report.ptx)
    if tensor_cores is not None and tensor_cores != bool(matrix_instructions):
        yield f"{len(matrix_instructions)} matrix instructions"


def _compile_all(arch, everything):
    from support.aot import compile_ahead

    count, failures = 0, []
    for kernel, config, constants, kind, aligned, is_main in _compilations(arch, everything):
        signature = _signature(kernel, constants, POINTERS[kind], aligned)
        options = {"arch": arch, "num_warps": config.num_warps, "num_stages": config.num_stages}
        report = compile_ahead(kernel, signature, constants, **options)
        what = f"{report.name} sm_{arch} {kind} {'aligned' if aligned else 'unaligned'} {config}"
        # Outside the main selection: with unaligned tensors ptxas sometimes stops at 96 registers and spills the last six.
        may_spill = 0 if is_main or aligned else 32
        failures += [f"{what}: {fault}" for fault in _faults(report, KINDS[kind][2], may_spill)]
        count += 1
    if failures:
        sys.exit("\n".join(failures))
    print(count, "configurations compiled well")


if __name__ == "__main__":
    _compile_all(int(sys.argv[1]), everything="all" in sys.argv)
