"""Every launch configuration of the cell, compiled for every architecture: no spills, room in shared memory, tensor cores.

Compilation needs no GPU, but a process without the interpreter: one for each generation of architectures.
"""

import itertools

import pytest
from support.aot import GENERATIONS, KINDS, Variant, compile_all, in_turn
from support.process import run_without_interpreter

from lstm_triton.kernels.config import cell_backward_config, cell_forward_config

pytestmark = pytest.mark.long


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
    dtype, precision = KINDS[kind]
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


def _variants(archs, everything):
    """What is launched: each configuration aligned, unaligned, and the largest without what may be absent.

    float16, which is the code of bfloat16 but for the type, on one generation alone and with everything.
    """
    from lstm_triton.kernels.cell import _lstm_cell_forward_kernel as forward
    from lstm_triton.kernels.cell_backward import _lstm_cell_backward_kernel as backward
    from lstm_triton.kernels.cells import backward_of, forward_of
    from lstm_triton.kernels.launch import accumulator

    of_forward, of_backward = {"FORWARD": forward_of("lstm")}, {"BACKWARD": backward_of("lstm")}
    for turn, (kind, (dtype, precision)) in enumerate(KINDS.items()):
        if kind == "fp16" and not (everything and archs == (90,)):
            continue
        shared = {"ACC": accumulator(dtype), "PRECISION": precision, "STATES": 1}
        launched = _configs(dtype, precision)
        for kernel, configs, absent, equations in (
            (forward, launched[0], INFERENCE, of_forward),
            (backward, launched[1], WEIGHTS_OF_H, of_backward),
        ):
            largest = max(configs, key=lambda config: (config.block_b, config.block_h))
            for position, config in enumerate(sorted(configs, key=repr)):
                forms = [(True, ()), (False, ()), *([(True, absent)] if config == largest else [])]
                for aligned, without in in_turn(archs, everything, turn + position, forms):
                    constants = {**shared, **config.constants, **equations}
                    signature = _signature(kernel, constants, POINTERS[kind], aligned, without)
                    words = f"{kind} {'aligned' if aligned else 'unaligned'}{', without ' * bool(without)}{', '.join(without)}"
                    yield Variant(kernel, signature, constants, config, kind not in ("fp32", "fp64"), words)


if __name__ == "__main__":
    compile_all(_variants, spills=False)
