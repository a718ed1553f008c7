"""Figures of a device, for the cost model of the sequence kernels. Only this file knows compute capabilities.

The number of SMs and their shared memory come from the GPU itself. The rest are published figures, or round figures that are
assumed; this project has measured none yet.
"""

from typing import NamedTuple


class DeviceFigures(NamedTuple):
    """The figures of a device. Times are in cycles, rates per cycle and SM."""

    sms: int
    shared_memory: int  # bytes that one program may have: all of an SM but 1 KiB for each program on it
    # Rates of tensor cores count multiply-adds of 16-bit numbers; latencies are those of 32 bytes of K in a chain of sums.
    mma_rate: int  # of mma.sync
    wide_rate: int  # of wgmma or tcgen05, for 64 columns of W_hh and more; 0 without
    tensor_memory: int  # columns of an SM; 0 where sums stay in registers
    fma_rate: int = 128  # multiply-adds of float32 on CUDA cores, where 32 bytes of K are two in a chain
    fma_latency: int = 8
    mma_latency: int = 33
    wide_latency: int = 17
    wide_end: int = 100  # from the last sum of one chunk to the first of the next
    launch: int = 3500  # from the end of one launch to the work of the next
    # Between SMs.
    barrier: int = 1500  # from an arrival until another program sees it
    store: int = 500  # until other programs can load what was stored
    l2_latency: int = 500
    l2_share: int = 24  # bytes, where every SM reads
    l2_most: int = 64  # bytes, where few do
    # Within an SM.
    shared_bytes: int = 128
    special_functions: int = 16  # exponentials and reciprocals
    scattered: int = 300  # loads and stores of tiles with fewer units than threads, which go through shared memory


# By compute capability, or by its major number: mma_rate, wide_rate, tensor_memory, and fma_rate where it is not 128.
_CORES = {
    (8, 0): (1024, 0, 0, 64),
    8: (512, 0, 0),
    9: (1024, 2048, 0),
    10: (1024, 4096, 512),
    12: (512, 0, 0),
}
_UNKNOWN = (512, 512, 512)  # the safe assumption: slow, and with tensor memory, which programs that wait must share


def figures(sms: int, shared_memory: int, capability: tuple[int, int]) -> DeviceFigures:
    """Return the figures of a device of this compute capability."""
    known = _CORES.get(capability) or _CORES.get(capability[0], _UNKNOWN)
    return DeviceFigures(sms, shared_memory, *known)
