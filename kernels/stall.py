"""Which kernel gave up waiting for a program that never came.

A kernel that waits too long (`grid_sync.wait`) stops the device with a trap, and all that CUDA says then is "unspecified launch
failure", of whatever call comes next. Before it traps, the kernel writes to a word of pinned host memory, which outlives the
device's context: the next launch of a waiting kernel, or else the end of the process, names it.
"""

import atexit
import functools
import sys

import torch

_words: dict[str, torch.Tensor] = {}


@functools.cache
def word(kernel: str, pinned: bool) -> torch.Tensor:
    """The word [1] int32 of the kernel of this name: zero until it gives up waiting."""
    if not _words:
        atexit.register(_report)
    _words[kernel] = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
    return _words[kernel]


def message() -> str | None:
    """What to tell about the kernels that gave up; None if none did."""
    kernels = " and ".join(name for name, stalled in _words.items() if stalled.item())
    if not kernels:
        return None
    return (
        f"lstm_triton: {kernels} waited for seconds for a program of the same launch that never came, and was stopped by a trap. "
        "The CUDA context of this process is lost. backend='triton-stepwise' computes the same without waiting."
    )


def check() -> None:
    """Raise RuntimeError if a kernel of this process gave up waiting."""
    if told := message():
        raise RuntimeError(told)


def _report() -> None:
    if told := message():
        print(told, file=sys.stderr)
