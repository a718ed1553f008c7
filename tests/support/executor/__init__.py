"""Triton's compiled kernels, executed on a CPU: the PTX is run, and every launch is checked.

    with executing("sm_90") as device:
        y = functional.lstm_cell(x, (h, c), *weights, backend="triton")  # CPU tensors, the package's own launchers
        assert device.executed[-1].kernel == "_lstm_cell_forward_kernel"

A launch goes through Triton's real JIT and compiler for that architecture. Its programs, warps and lanes take turns in random
order (`seed`), and the launch raises `KernelFault` if it

* accesses memory outside the tensors of the launch, outside its shared memory, or misaligned;
* has a race: in shared memory, or in global memory between its programs (happens-before over releases, acquires and barriers);
* uses a register, or a byte of shared memory, that nothing has written;
* uses what is in flight: cp.async, wgmma, tcgen05.mma, ld and st before their waits; or lets the matrix unit read what was
  written without a proxy fence;
* diverges at a barrier or an instruction of a whole warp, stops itself, or waits for ever.

Each report names the kernel, the program, the thread, the source line and the instruction. An instruction, modifier or form of
operand that is not known raises `Unsupported`. Rounding is the hardware's (to nearest even; TF32 operands lose their low
bits), approximations are computed as exactly as float32 allows, and a product of the matrix unit is exact up to one rounding
of each sum.

What it does not show: what ptxas makes of the PTX; values that a weakly ordered memory would give (what is weak is reported
as a race instead); of more than two programs that read the same byte of global memory, those before the last two.

Not in a process with TRITON_INTERPRET=1. `why_not` says why it cannot run here: it needs a C compiler.
"""

from .build import why_not
from .driver import ExecutingDriver, KernelFault, Launch, Report, executing
from .ptx import Unsupported

__all__ = ["ExecutingDriver", "KernelFault", "Launch", "Report", "Unsupported", "executing", "why_not"]
