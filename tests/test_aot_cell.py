"""Every launch configuration of the cell, compiled for every architecture: no spills, room in shared memory, tensor cores.

Compilation needs no GPU, but a process without the interpreter: one for each architecture.
"""

import itertools
import sys

import pytest
import torch
from lstm_triton.kernels.config import (
    all_cell_backward_configs,
    all_cell_forward_configs,
    cell_backward_config,
    cell_forward_config,
)
from support.process import run_without_interpreter

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
    assert "configurations compiled well" in run_without_interpreter(__file__, str(arch), timeout=1200)


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


def _compilations():
    """(what, kernel, configuration, constants, kind) of everything that can be launched."""
    from lstm_triton.kernels.cell import _lstm_cell_forward_kernel as forward
    from lstm_triton.kernels.cell_backward import _lstm_cell_backward_kernel as backward
    from lstm_triton.kernels.launch import accumulator

    for kind, (dtype, precision, _) in KINDS.items():
        shared = {"ACC": accumulator(dtype), "PRECISION": precision}
        for config in sorted(all_cell_forward_configs(dtype, precision), key=repr):
            tile = {"BLOCK_B": config.block_b, "BLOCK_H": config.block_h, "BLOCK_K": config.block_k}
            yield forward, config, {**shared, **tile}, kind
        for config in sorted(all_cell_backward_configs(dtype, precision), key=repr):
            tile = {"BLOCK_B": config.block_b, "BLOCK_H": config.block_h, "BLOCK_N": config.block_n}
            yield backward, config, {**shared, **tile}, kind


def _faults(report, tensor_cores):
    if report.spill_bytes:
        yield f"{report.spill_bytes} bytes spilled"
    if report.local_memory_in_loops():
        yield f"{report.local_memory_in_loops()} accesses to local memory in loops"
    if not report.fits():
        yield f"{report.shared_memory} bytes of shared memory"
    if tensor_cores is not None and tensor_cores != (report.matrix_instructions() > 0):
        yield f"{report.matrix_instructions()} matrix instructions"


def _compile_all(arch):
    from support.aot import compile_ahead

    count, failures = 0, []
    for kernel, config, constants, kind in _compilations():
        for aligned in (True, False):
            signature = _signature(kernel, constants, POINTERS[kind], aligned)
            options = {"arch": arch, "num_warps": config.num_warps, "num_stages": config.num_stages}
            report = compile_ahead(kernel, signature, constants, **options)
            what = f"{report.name} sm_{arch} {kind} {'aligned' if aligned else 'unaligned'} {config}"
            failures += [f"{what}: {fault}" for fault in _faults(report, KINDS[kind][2])]
            count += 1
    if failures:
        sys.exit("\n".join(failures))
    print(count, "configurations compiled well")


if __name__ == "__main__":
    _compile_all(int(sys.argv[1]))
