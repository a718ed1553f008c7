"""Figures of a device on which the choice of a launch rests. The only place that knows compute capabilities.

What a GPU says of itself is asked of it. The rest are published figures, or round ones from other people's measurements; this
project has measured none yet.
"""

from typing import NamedTuple


class DeviceFigures(NamedTuple):
    """A device: its SMs, and the shared memory that one program may have; times in cycles, rates per cycle and SM."""

    sms: int
    shared_memory: int  # bytes; all that an SM has but 1 KiB for each program on it
    # Tensor cores: multiply-adds of 16-bit numbers, and the latency of 32 bytes of K in a chain of sums.
    mma_rate: int  # by mma.sync
    wide_rate: int  # by wgmma or tcgen05, for 64 columns of W_hh and more; 0 without
    tensor_memory: int  # columns in an SM; 0 where sums stay in registers
    fma_rate: int = 128  # of CUDA cores: multiply-adds of float32, for which 32 bytes of K are two in a chain
    fma_latency: int = 8
    mma_latency: int = 33
    wide_latency: int = 17
    wide_end: int = 100  # from the last sum of one chunk to the first of the next
    launch: int = 3500  # from the end of one to the work of the next
    # Between SMs.
    barrier: int = 1500  # an arrival, and seeing it
    store: int = 500  # until others can load what was stored
    l2_latency: int = 500
    l2_share: int = 24  # bytes, where every SM reads
    l2_most: int = 64  # bytes, where few do
    # Within an SM.
    shared_bytes: int = 128
    special_functions: int = 16  # exponentials, reciprocals
    scattered: int = 300  # loads and stores of tiles smaller than a program, which go through shared memory


# By compute capability, or by its first number alone: mma_rate, wide_rate, tensor_memory; fma_rate where it is not 128.
_CORES = {
    (8, 0): (1024, 0, 0, 64),
    8: (512, 0, 0),
    9: (1024, 2048, 0),
    10: (1024, 4096, 512),
    12: (512, 0, 0),
}
_UNKNOWN = (512, 512, 512)  # slow, and with tensor memory, of which programs may run short


def figures(sms: int, shared_memory: int, capability: tuple[int, int]) -> DeviceFigures:
    """Those of a device of this compute capability; see `DeviceFigures`."""
    known = _CORES.get(capability) or _CORES.get(capability[0], _UNKNOWN)
    return DeviceFigures(sms, shared_memory, *known)
