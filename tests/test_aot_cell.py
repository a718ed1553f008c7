"""Every launch configuration of the cell, compiled for every architecture: no spills, room in shared memory, tensor cores.

Compilation needs no GPU, but a process without the interpreter: one for each generation of architectures.
"""

import itertools
import re
import sys

import pytest
import torch
from support.aot import GENERATIONS
from support.process import run_without_interpreter

from lstm_triton.kernels.config import cell_backward_config, cell_forward_config

pytestmark = pytest.mark.long

# dtype, precision, and whether the products run on the tensor cores (None: up to the architecture).
KINDS = {
    "fp32": (torch.float32, "ieee", False),
    "tf32": (torch.float32, "tf32", True),
    "tf32x3": (torch.float32, "tf32x3", True),
    "fp16": (torch.float16, "ieee", True),
    "bf16": (torch.bfloat16, "ieee", True),
    "fp64": (torch.float64, "ieee", None),
}


@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_every_configuration_compiles_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("archs", GENERATIONS, ids=str)
def test_the_full_product_compiles_well(archs):
    assert "kernels compiled well" in run_without_interpreter(__file__, *map(str, archs), "all", timeout=3600)


@pytest.mark.parametrize("H, megabytes", [(512, 1.0), (1024, 1.5), (2048, 1.5)])
@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16"])
def test_enough_weights_are_in_flight_at_small_batch(kind, H, megabytes):
    """What 132 SMs at full memory bandwidth ask for by Little's law, while one step of the loop is computed."""
    dtype, precision, _ = KINDS[kind]
    config = cell_forward_config(16, H, dtype, precision, 132)
    stage = 4 * config.block_h * config.block_k * dtype.itemsize
    assert -(-H // config.block_h) * (config.num_stages - 2) * stage >= megabytes * 1e6


# ---- in a process without the interpreter --------------------------------------------------------------------------

POINTERS = {"fp32": "*fp32", "tf32": "*fp32", "tf32x3": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "fp64": "*fp64"}


# What is None where no gradient is wanted, there is no bias and no layer, and in the last step of a classifier with frozen
# inputs.
INFERENCE = ("b_ih_ptr", "b_hh_ptr", "gates_ptr", "y_ptr", "cells_ptr")
WEIGHTS_OF_H = ("dc_ptr", "dx_ptr", "dh_prev_ptr", "dc_prev_ptr")


def _configs(dtype, precision):
    """Every configuration of the forward, and of the backward, that any problem has on any device."""
    sizes = (1, 16, 17, 64, 65, 1000, 65536)
    problems = itertools.product(sizes, sizes, (1, 16, 84, 132, 192))
    forward = {cell_forward_config(B, H, dtype, precision, multiprocessors) for B, H, multiprocessors in problems}
    return forward, {cell_backward_config(B, dtype, precision) for B in sizes}


def _signature(kernel, constants, pointer, aligned, absent=()):
    """What the JIT makes of dense tensors: sizes that are multiples of 16, or odd ones and pointers off by an element."""
    hint = ":16" if aligned else ""
    inner = ("_k", "_i", "_h", "stride_dh_h", "stride_b_ih", "stride_b_hh")  # the strides that are 1
    signature = {}
    for name in kernel.arg_names:
        if name in absent:
            signature[name] = None
        elif name.endswith("_ptr"):
            signature[name] = pointer + hint
        elif name.startswith("stride_"):
            signature[name] = "i32:1" if name.endswith(inner) and not name.endswith("_b_h") else "i32" + hint
        elif name == "D":
            signature[name] = "i32:1" if "y_ptr" in absent else "i32"
        elif name not in constants:
            signature[name] = "i32" if name == "B" else "i32" + hint
    return signature


def _compilations(archs, everything):
    """(kernel, configuration, constants, signature, kind, in words) of what is launched.

    float16, which is the code of bfloat16 but for the type, on one generation alone. Unless everything: without float16, and
    each configuration on one generation of architectures, as one variant.
    """
    from lstm_triton.kernels.cell import _lstm_cell_forward_kernel as forward
    from lstm_triton.kernels.cell_backward import _lstm_cell_backward_kernel as backward
    from lstm_triton.kernels.cells import backward_of, forward_of
    from lstm_triton.kernels.launch import accumulator

    generation = GENERATIONS.index(archs)
    for turn, (kind, (dtype, precision, _)) in enumerate(KINDS.items()):
        if kind == "fp16" and not (everything and archs == (90,)):
            continue
        shared = {"ACC": accumulator(dtype), "PRECISION": precision}
        of_forward = {"FORWARD": forward_of("lstm"), "STATES": 1}
        of_backward = {"BACKWARD": backward_of("lstm"), "STATES": 1}
        launched = _configs(dtype, precision)
        for kernel, configs, absent, equations in (
            (forward, launched[0], INFERENCE, of_forward),
            (backward, launched[1], WEIGHTS_OF_H, of_backward),
        ):
            largest = max(configs, key=lambda config: (config.block_b, config.block_h))
            launches = []
            for position, config in enumerate(sorted(configs, key=repr)):
                variants = [(True, ()), (False, ()), *([(True, absent)] if config == largest else [])]
                if not everything:
                    chosen, its_generation = divmod(turn + position, len(GENERATIONS))
                    variants = [variants[chosen % len(variants)]] if generation == its_generation else []
                launches += [(config, *variant) for variant in variants]
            for config, aligned, without in launches:
                constants = {**shared, **config.constants, **equations}
                signature = _signature(kernel, constants, POINTERS[kind], aligned, without)
                words = f"{'aligned' if aligned else 'unaligned'}{', without ' * bool(without)}{', '.join(without)}"
                yield kernel, config, constants, signature, kind, words


def _faults(report, tensor_cores):
    if report.stack_bytes:
        yield f"{report.stack_bytes} bytes of local memory"
    if not report.fits():
        yield f"{report.shared_memory} bytes of shared memory"
    matrix_instructions = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", report.ptx)
    if tensor_cores is not None and tensor_cores != bool(matrix_instructions):
        yield f"{len(matrix_instructions)} matrix instructions"


def _compile_all(archs, everything):
    from support.aot import compile_for

    count, failures = 0, []
    for kernel, config, constants, signature, kind, words in _compilations(archs, everything):
        for report in compile_for(archs, kernel, signature, constants, **config.options):
            what = f"{report.name} sm_{report.arch} {kind} {words} {config}"
            failures += [f"{what}: {fault}" for fault in _faults(report, KINDS[kind][2])]
            count += 1
    if failures:
        sys.exit("\n".join(failures))
    print(count, "kernels compiled well")


if __name__ == "__main__":
    _compile_all(tuple(int(arch) for arch in sys.argv[1:] if arch != "all"), everything="all" in sys.argv)
