"""Launch configurations of the sequence kernels: pure functions from the problem and the device to tiles and kind of launch.

No number here has been measured on a GPU yet: they come from a cost model of the exchange between programs and from what the
compiler reports for sm_80 to sm_120 (registers, local memory in the time loop, shared memory).
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .config import MAX_REGISTERS, LaunchConfig, cdiv, uses_tensor_cores


@dataclass(frozen=True)
class DeviceLimits:
    """What bounds a launch: multiprocessors, and shared memory in bytes that one program may have.

    generation: the first number of the compute capability, as the assembler needs more registers for some than for others.
    """

    multiprocessors: int
    shared_memory: int
    generation: int = 9


@dataclass(frozen=True)
class SequenceConfig(LaunchConfig):
    """Tile of one program of a sequence kernel, and how the launch runs.

    A program owns block_b rows x block_h units; the recurrent product takes split_k x block_k of its inner dimension (H
    forward, 4H backward) at a time. persistent: W_hh stays on chip and all steps run in one launch, in which `groups` groups
    (row blocks times directions) of `programs` programs exchange their state; otherwise one launch computes one step.
    """

    block_b: int
    block_h: int
    split_k: int
    block_k: int
    programs: int
    groups: int
    persistent: bool


# Shared memory that a resident kernel needs besides W_hh: for one chunk of state, and later, in the same place, for layout
# conversions and reductions.
_SCRATCH = 12 * 1024


def _block_k(n: int, largest: int, padding: int) -> int:
    """The largest power of two that pads n by at most n / padding, or else the one that pads it least."""
    blocks = [b for b in (256, 128, 64, 32, 16) if b <= max(largest, 16)]
    return next((b for b in blocks if cdiv(n, b) * b <= n + n // padding), blocks[-1])


def exchanged_row(H: int, dtype: torch.dtype) -> int:
    """Units from a row of h to the next where programs exchange it: each row begins at a multiple of 16 bytes."""
    return H if H * dtype.itemsize % 16 == 0 else cdiv(H, 8) * 8


@functools.lru_cache(maxsize=4096)
def sequence_forward_config(
    B: int, H: int, D: int, dtype: torch.dtype, precision: str, limits: DeviceLimits, stepwise: bool = False
) -> SequenceConfig:
    """How to run the recurrence of B rows, H units and D directions forward; stepwise: one launch per step, whatever fits."""
    row_bytes = exchanged_row(H, dtype) * dtype.itemsize
    # One wgmma each 32 bytes of a weight row, each with a descriptor in registers: long rows leave room for little else.
    most_rows, chunk = (64, 8192) if row_bytes <= 1024 else (32, 4096) if row_bytes <= 2048 else (16, 2048)
    # Wide elements and masks of units take registers, too.
    masked = H % 16 != 0
    most_rows = max(most_rows * 2 // dtype.itemsize, 16)
    if masked:
        longest_of_many = {8: 1792, 12: 1024}.get(limits.generation, 2048)
        most_rows = min(most_rows, 64 // dtype.itemsize) if row_bytes <= longest_of_many else 16
    longest_of_four_warps = 768 if masked else 2048 if limits.generation == 10 else 3072  # bytes of a row
    if masked and row_bytes > 2048 and limits.generation != 10:
        chunk //= 2
    if not stepwise and _can_be_resident(dtype, precision, H):
        # With sixteen units, rows of more than 3072 bytes do not fit in registers.
        units = _unit_blocks(H, 64 if masked else 256 // dtype.itemsize) if row_bytes <= 3072 else (8,)
        blocks_b = [rows for rows in (16, 32, 64) if rows <= most_rows]
        for block_h, block_b in itertools.product(units, blocks_b):
            for block_k in _forward_chunks(H, block_h, block_b, chunk, dtype.itemsize, limits.generation):
                weights = 4 * block_h * cdiv(H, block_k) * block_k * dtype.itemsize
                state = block_b * block_k * dtype.itemsize
                programs, groups = cdiv(H, block_h), cdiv(B, block_b) * D
                scratch = max(_SCRATCH, 16 * block_b * block_h)  # for the pre-activations, in float32
                if _can_be_launched(programs, groups, weights + max(state, scratch), limits):
                    large = max(block_h, block_b) >= 64 or row_bytes > longest_of_four_warps
                    many_chunks = limits.generation == 12 and cdiv(H, block_k) > 8
                    on_mma_sync = limits.generation == 12 or (limits.generation == 8 and dtype.itemsize == 4)
                    many_rows = block_b > 16 and (masked or on_mma_sync)
                    warps = 8 if large or many_chunks or many_rows else 4
                    return SequenceConfig(
                        warps, 1, block_b, block_h, 1, block_k, programs, groups, True, max_registers=MAX_REGISTERS
                    )
    # Elements of rows that begin anywhere are loaded one by one, each with its address.
    return _stepwise_config(B, H, D, dtype, precision, few_rows=masked, num_warps=8 if masked else 4)


def _forward_chunks(H: int, block_h: int, block_b: int, longest: int, itemsize: int, generation: int) -> Iterator[int]:
    """block_k to try, the best first; longest in bytes of all rows."""
    if block_h == 128:
        yield 32
        return
    if block_h == 8 and generation == 10 and H % 16:
        yield 64
    elif generation == 12 or block_h == 8:
        # Of shorter chunks the compiler keeps the weights in registers, or the addresses.
        most = 16384 if block_b == 32 and H % 16 else 8192
        if generation == 12 and H % 16 and 896 < H <= 1152:
            yield 256  # eight or nine chunks of 128 do not fit
        yield min(max(_block_k(H, most // block_b // itemsize, 8), 128), max(1 << (H - 1).bit_length(), 16))
    if generation != 12 or block_b == 16:
        yield _block_k(H, longest // block_b // itemsize, 8)


@functools.lru_cache(maxsize=4096)
def sequence_backward_config(
    B: int, H: int, D: int, dtype: torch.dtype, precision: str, limits: DeviceLimits, stepwise: bool = False
) -> SequenceConfig:
    """How to run it backward: the inner dimension is 4H, split over eight warps."""
    split_k = 8
    resident = not stepwise and _can_be_resident(dtype, precision, H)
    for block_h, block_b, block_k in _backward_tiles(H, split_k, dtype.itemsize, limits.generation) if resident else ():
        depth = split_k * block_k
        weights = cdiv(4 * H, depth) * depth * block_h * dtype.itemsize
        state = block_b * depth * dtype.itemsize
        scratch = max(_SCRATCH, 4 * split_k * block_b * block_h)  # for the sum over the splits
        programs, groups = cdiv(H, block_h), cdiv(B, block_b) * D
        if _can_be_launched(programs, groups, weights + max(state, scratch), limits):
            return SequenceConfig(
                8, 1, block_b, block_h, split_k, block_k, programs, groups, True, max_registers=MAX_REGISTERS
            )
    # Sixteen rows by four warps do not fit in registers on ordinary cores, on compute capability 10.
    full_precision = dtype == torch.float32 and precision == "ieee"
    return _stepwise_config(B, H, D, dtype, precision, num_warps=8 if full_precision and B <= 16 else 4)


def _backward_tiles(H: int, split_k: int, itemsize: int, generation: int) -> Iterator[tuple[int, int, int]]:
    """(block_h, block_b, block_k) to try, the best first."""
    aligned = H % 16 == 0
    for block_h in _unit_blocks(H, 64 // itemsize if aligned else 32):
        # Odd rows of dz in 16 bits are read in pieces, each with its address.
        for block_b in (16, 32) if aligned or (itemsize == 2 and H % 2 == 0 and H <= 1024) else (16,):
            many = block_b == 32 or (generation == 10 and not aligned)
            if itemsize == 4 and block_h > 8 and H > (512 if many else 768):
                continue  # does not fit in registers
            # Threads wait for each other twice a chunk: few chunks are worth some padding.
            # Outside these bounds, in bytes, chunks do not fit in registers: short ones are many, with many addresses.
            fits_long = H <= 1024 or (generation == 10 and H > 1080)
            longest, shortest = 256 if aligned else 128 if fits_long else 64, 2 * block_b
            for chunk in (n for n in (256, 128, 64, 32) if shortest <= n <= longest):
                yield block_h, block_b, _block_k(cdiv(4 * H, split_k), chunk // itemsize, 3)


def _can_be_resident(dtype: torch.dtype, precision: str, H: int) -> bool:
    # Ordinary cores want W_hh in registers, tf32x3 three copies of it. Longer rows spill or do not fit.
    largest = 1536 if dtype.itemsize == 2 else 1024
    return uses_tensor_cores(dtype, precision) and precision != "tf32x3" and H <= largest


def _can_be_launched(programs: int, groups: int, shared_memory: int, limits: DeviceLimits) -> bool:
    """Whether the programs fit. Those that wait for each other must run at the same time; others may queue."""
    at_once = programs == 1 or programs * groups <= limits.multiprocessors
    return at_once and shared_memory <= limits.shared_memory


def _unit_blocks(H: int, most: int) -> tuple[int, ...]:
    """Units per program to try: all of them, which needs no barrier; else the most that fit, since each reads the whole state.

    most: where more at once would not fit in registers.
    """
    alone = next(((n,) for n in (32, 64, 128) if n // 2 < H <= n <= most), ())
    return (*alone, 16, 8)


def _stepwise_config(
    B: int, H: int, D: int, dtype: torch.dtype, precision: str, few_rows: bool = False, num_warps: int = 4
) -> SequenceConfig:
    """One launch per step, with W_hh read again in each: fits every device.

    few_rows: more at once would not fit in registers.
    """
    block_k = (64 if dtype.itemsize == 2 else 32) if uses_tensor_cores(dtype, precision) else 16
    # float64, TF32's operands and tf32x3's three products take two or three times the registers.
    few_rows |= dtype == torch.float64 or (dtype == torch.float32 and precision != "ieee")
    block_b = 16 if B <= 16 or few_rows else 32
    groups = cdiv(B, block_b) * D
    programs = cdiv(H, 16)
    return SequenceConfig(num_warps, 3, block_b, 16, 1, block_k, programs, groups, False, max_registers=MAX_REGISTERS)
