"""Triton's compiled kernels, executed on a CPU: the PTX is run, and every launch is checked.

    with executing("sm_90") as device:
        y = functional.lstm_cell(x, (h, c), *weights, backend="triton")  # CPU tensors, the package's own launchers
        assert device.executed[-1].kernel == "_lstm_cell_forward_kernel"

A launch goes through Triton's real JIT and compiler for that architecture. Its programs, warps and lanes take turns in random
order (`seed`), and the launch raises `KernelFault` if one of the checks finds something: docs/testing.md lists them, and what
they do not show. A report names the kernel, the program, the thread, the source line and the instruction.

An instruction, modifier or form of operand that is not known raises `Unsupported`. Rounding is the hardware's (to nearest even;
TF32 operands lose their low bits), approximations are as exact as float32 allows, and a product of the matrix unit is exact up
to one rounding of each sum. Of more than two programs that read the same byte of global memory, the last two are kept.

Not in a process with TRITON_INTERPRET=1. `why_not` says why it cannot run here: it needs a C compiler.
"""

from .build import why_not
from .driver import ExecutingDriver, KernelFault, Launch, Report, executing
from .ptx import Unsupported

__all__ = ["ExecutingDriver", "KernelFault", "Launch", "Report", "Unsupported", "executing", "why_not"]
