"""Which kernel gave up waiting for a program that never came.

A kernel that waits too long (`grid_sync.wait`) stops the device with a trap, and all that CUDA says then is "unspecified launch
failure", of whatever call comes next. Before it traps, the kernel writes to a word of pinned host memory, which outlives the
device's context: the next layer, or else the end of the process, names it.
"""

import atexit
import ctypes
import functools
import sys

import torch

from .device import refuse_capture

# The values of the words, read where they lie: torch's way to a tensor's value is an operator, on every launch.
_values: dict[str, ctypes.c_int32] = {}


@functools.cache
def word(kernel: str, pinned: bool) -> torch.Tensor:
    """The word [1] int32 of the kernel of this name: zero, or how often it polled before it gave up waiting."""
    if pinned:
        refuse_capture(kernel)
    if not _values:
        atexit.register(_report)
    memory = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pinned)
    _values[kernel] = ctypes.c_int32.from_address(memory.data_ptr())
    return memory  # the cache keeps it, and so its address


def message() -> str | None:
    """What to tell about the kernels that gave up; None if none did."""
    kernels = " and ".join(name for name, polls in _values.items() if polls.value)
    if not kernels:
        return None
    return (
        f"lstm_triton: {kernels} waited for seconds for a program of the same launch that never came, and was stopped by a"
        " trap. The CUDA context of this process is lost. backend='triton-stepwise' computes the same without waiting."
    )


def check() -> None:
    """Raise RuntimeError if a kernel of this process gave up waiting."""
    if told := message():
        raise RuntimeError(told)


class _NamesTheKernel:
    """Where a kernel gave up waiting, before or inside this context, its error says so: not only that CUDA failed."""

    def __enter__(self) -> None:
        check()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and (told := message()):
            raise RuntimeError(told) from error


names_the_kernel = _NamesTheKernel()


def _report() -> None:
    if told := message():
        print(told, file=sys.stderr)
