"""Names the kernel that timed out while it waited.

A kernel that waits too long (`grid_sync.wait`, `exchange.load_words`) stops the device with a trap. CUDA then reports only
an "unspecified launch failure", from whichever call comes next. Before the trap the kernel therefore writes to a word of pinned
host memory, which outlives the CUDA context. The next layer names the kernel, or else the end of the process does.
"""

import atexit
import ctypes
import functools
import sys

import torch

from .device import refuse_capture

# The words are read in place: reading them through torch would cost an operator in every launch.
_values: dict[str, ctypes.c_int32] = {}


@functools.cache
def word(kernel: str, pinned: bool) -> torch.Tensor:
    """Return the word of the kernel of this name, [1] int32: zero, or the number of polls after which it timed out."""
    if pinned:
        refuse_capture(kernel)
    if not _values:
        atexit.register(_report)
    memory = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pinned)
    _values[kernel] = ctypes.c_int32.from_address(memory.data_ptr())
    return memory  # the cache keeps it, and so its address


def message() -> str | None:
    """Return the message that names the kernels that timed out, or None."""
    kernels = " and ".join(name for name, polls in _values.items() if polls.value)
    if not kernels:
        return None
    return (
        f"lstm_triton: {kernels} timed out, waiting for a program of the same launch, and stopped with a"
        " trap. The CUDA context of this process is lost. backend='triton-stepwise' computes the same without waiting."
    )


def check() -> None:
    """Raise RuntimeError if a kernel of this process has timed out."""
    if text := message():
        raise RuntimeError(text)


class _NamesTheKernel:
    """Give a CUDA error inside this context, after a timeout, the message that names the kernel."""

    def __enter__(self) -> None:
        check()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and (text := message()):
            raise RuntimeError(text) from error


names_the_kernel = _NamesTheKernel()


def _report() -> None:
    if text := message():
        print(text, file=sys.stderr)
