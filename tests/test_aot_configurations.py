"""Every configuration of cell and readout, as it is launched, compiled for a GPU of every generation: no spills, room in shared
memory, products on tensor cores.

Compilation needs no GPU, but a process without the interpreter: one for each architecture, which runs this file as a script.
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

ROWS = (1, 17, 64, 1000)
ALIGNED, ODD = (16, 64, 1040, 4096), (19, 65, 1001, 4097)  # sizes of the rest
MULTIPROCESSORS = (16, 132)  # enough to have every tile chosen for one of these sizes


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_sample_compiles_well(arch):
    assert "kernels compiled well" in run_without_interpreter(__file__, str(arch), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("arch", (*ARCHITECTURES, 86, 89))
def test_the_full_product_compiles_well(arch):
    assert "kernels compiled well" in run_without_interpreter(__file__, str(arch), "all", timeout=3600)


@pytest.mark.parametrize("H, megabytes", [(512, 1.0), (1024, 1.5), (2048, 1.5)])
@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16"])
def test_enough_weights_are_in_flight_at_small_batch(kind, H, megabytes):
    """What 132 SMs at full memory bandwidth ask for by Little's law, while one step of the loop is computed."""
    dtype, precision = KINDS[kind]
    config = cell_forward_config(16, H, dtype, precision, 132)
    stage = 4 * config.block_h * config.block_k * dtype.itemsize
    assert -(-H // config.block_h) * (config.num_stages - 2) * stage >= megabytes * 1e6


# ---- in a process without the interpreter --------------------------------------------------------------------------


def _tensor(*shape, dtype, aligned):
    """Uninitialised, beginning at a multiple of 16 bytes or not."""
    size = functools.reduce(int.__mul__, shape)
    return (torch.empty(size, dtype=dtype) if aligned else torch.empty(size + 1, dtype=dtype)[1:]).view(shape)


def _cell(B, H, kind, aligned):
    dtype, precision = KINDS[kind]
    new, I = functools.partial(_tensor, dtype=dtype, aligned=aligned), 64 if aligned else 33
    inputs = CellInputs(new(B, I), new(B, H), new(B, H), new(4 * H, I), new(4 * H, H), new(4 * H), new(4 * H))
    return inputs, new(B, H, 4), CellOptions(precision)


def _cell_forward(*case):
    """A step in training as part of a layer; for the most rows also one of inference."""
    inputs, gates, options = _cell(*case)
    y = gates.new_empty(len(gates), 2, gates.shape[1])[:, 0]
    cell.launch_step(inputs, options, CellOutputs(inputs.h, inputs.c, gates), y, y, D=2)
    if case[0] == ROWS[-1]:
        cell.lstm_cell_forward(inputs._replace(b_ih=None, b_hh=None), options)


def _cell_backward(*case):
    """All gradients; for the most rows also those of the weights of h alone."""
    inputs, gates, options = _cell(*case)
    h, c, backward = inputs.h, inputs.c, cell_backward.lstm_cell_backward
    backward(CellGradients(h, c), inputs, CellSaved(c, gates), CellInputs._fields, options)
    if case[0] == ROWS[-1]:
        needs = {"w_ih", "w_hh", "b_ih", "b_hh"}
        backward(CellGradients(h, None), inputs, CellSaved(c, gates), needs, options)


def _readout(B, V, kind, aligned):
    """Unaligned tensors of 16 bits are taken as under autocast, where y is float32."""
    dtype, precision = KINDS[kind]
    new, H = functools.partial(_tensor, aligned=aligned), 64 if aligned else 33
    inputs = ReadoutInputs(new(B, H, dtype=dtype), new(V, H, dtype=dtype), new(V, dtype=dtype))
    options = ReadoutOptions(precision, dtype if aligned or dtype.itemsize > 2 else torch.float32)
    return inputs, new(B, V, dtype=options.dtype), options


def _readout_forward(*case):
    inputs, _, options = _readout(*case)
    readout.softmax_readout_forward(inputs, options)


def _readout_backward(*case):
    inputs, y, options = _readout(*case)
    readout_backward.softmax_readout_backward(ReadoutGradients(y), inputs, ReadoutSaved(y), inputs._fields, options)


CALLS = (_cell_forward, _cell_backward, _readout_forward, _readout_backward)


def _launched(kind, forms, kernels):
    """The calls (function, B, size, aligned, SMs) that launch what is not yet among `kernels`, which grows.

    forms: whether tensors are aligned, or not; of one form alone, tiles are told apart, and not what else Triton specialises.
    """
    from support.fake_driver import fake_driver

    found = []
    for sms in MULTIPROCESSORS:
        with fake_driver(sm_count=sms, compiling=False):
            for call, B, aligned in itertools.product(CALLS, ROWS, forms):
                for size in ALIGNED if aligned else ODD:
                    call(B, size, kind, aligned)
                    launched = [kernel for launcher in Launcher._all for kernel in launcher._compiled.values()]
                    new = {kernel.src.hash() if len(forms) > 1 else _tile(kernel.src) for kernel in launched} - kernels
                    if new:
                        found.append((call, B, size, aligned, sms))
                        kernels |= new
    return found


def _tile(source):
    constants = {source.fn.arg_names[index]: value for (index,), value in source.constants.items()}
    sizes = {name: value for name, value in constants.items() if name.startswith(("BLOCK_", "TILE_"))}
    return source.fn.__name__, *sizes.items()


def _faults(report, kind):
    if report.stack_bytes and (report.name.startswith("_lstm") or report.local_memory_in_loops()):
        yield f"{report.stack_bytes} bytes of local memory"
    if not report.fits():
        yield f"{report.shared_memory} bytes of shared memory"
    is_product = report.name.endswith(("_forward_kernel", "_backward_kernel"))
    expected = is_product and uses_tensor_cores(*KINDS[kind])
    if kind != "fp64" and expected != bool(report.matrix_instructions()):  # float64's are up to the architecture
        yield f"{report.matrix_instructions()} matrix instructions"


def _compile(arch, everything):
    """Compile all; or each tile in one form for the architecture whose turn it is.

    float16, the code of bfloat16 but for the type, is compiled once with all.
    """
    from support.aot import Report
    from support.fake_driver import fake_driver

    count, faults, kernels = 0, [], set()
    for turn, kind in enumerate(KINDS):
        if kind == "fp16" and not (everything and arch == 90):
            continue
        calls = _launched(kind, (True, False) if everything else (turn % 2 == 0,), kernels if everything else set())
        for n, (call, *arguments, aligned, sms) in enumerate(calls):
            if not everything and (n + turn) % len(ARCHITECTURES) != ARCHITECTURES.index(arch):
                continue
            with fake_driver(arch, sms):
                call(*arguments, kind, aligned)
                compiled = [kernel for launcher in Launcher._all for kernel in launcher._compiled.values()]
            for report in (Report(kernel, arch) for kernel in compiled):
                what = f"{report.name} sm_{arch} {kind} {arguments} {'' if aligned else 'un'}aligned"
                faults += [f"{what}: {fault}" for fault in _faults(report, kind)]
                count += 1
    print("\n".join(faults) or f"{count} kernels compiled well")
    sys.exit(bool(faults))


if __name__ == "__main__":
    _compile(int(sys.argv[1]), "all" in sys.argv)
