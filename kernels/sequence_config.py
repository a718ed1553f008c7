"""Launch configurations of the sequence kernels: pure functions from the problem and the device to tiles and kind of launch.

No number here has been measured on a GPU yet: they come from a model of a step's time and from what the compiler reports for
sm_80 to sm_120 (registers, local memory in the time loop, shared memory).
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .config import MAX_REGISTERS, LaunchConfig, cdiv, uses_tensor_cores


@dataclass(frozen=True)
class DeviceLimits:
    """What bounds a launch: multiprocessors, and shared memory in bytes that one program may have.

    generation: the first number of the compute capability. It tells the tensor cores' kind, and how many registers the
    assembler needs.
    """

    multiprocessors: int
    shared_memory: int
    generation: int


@dataclass(frozen=True)
class SequenceConfig(LaunchConfig):
    """Tile of one program of a sequence kernel, and how the launch runs.

    A program owns block_b rows x block_h units; the recurrent product takes chunks of split_k x block_k of its inner dimension
    (H forward, 4H backward). persistent: W_hh stays on chip and all steps run in one launch, in which `groups` groups (row
    blocks times directions) of `programs` programs exchange their state, and load in_flight chunks of it at once; otherwise
    one launch computes one step.
    """

    block_b: int
    block_h: int
    split_k: int
    block_k: int
    in_flight: int
    programs: int
    groups: int
    persistent: bool

    def rounds(self, inner: int) -> int:
        """How often a step waits for loads of the exchanged state, of an inner dimension of this size."""
        return cdiv(cdiv(inner, self.split_k * self.block_k), self.in_flight)


def exchanged_row(H: int, dtype: torch.dtype) -> int:
    """Units from a row of h to the next where programs exchange it: each row begins at a multiple of 16 bytes."""
    return H if H * dtype.itemsize % 16 == 0 else cdiv(H, 8) * 8


@functools.lru_cache(maxsize=4096)
def sequence_forward_config(
    B: int, H: int, D: int, dtype: torch.dtype, precision: str, limits: DeviceLimits, stepwise: bool = False
) -> SequenceConfig:
    """How to run the recurrence of B rows, H units and D directions forward; stepwise: one launch per step, whatever fits."""
    product = _Product(H, 4, 1, dtype.itemsize)
    row_bytes, generation = H * dtype.itemsize, limits.generation
    configs: list[SequenceConfig] = []
    for block_h, block_b in () if stepwise else _tiles(product, H, 256 // dtype.itemsize, dtype, precision, limits):
        # 16 rows by 32 columns keep four warps busy; by 64, the addresses of long rows take the registers of eight, on 10.
        few_warps = block_h == 8 or (block_h == 16 and not (generation == 10 and row_bytes > 1024))
        num_warps = 4 if block_b == 16 and few_warps else 8
        scratch = 16 * block_b * block_h  # the sums in float32, for the layout of the pre-activations
        longest = _forward_chunk_bytes(block_b, block_h, H, row_bytes, generation) // block_b // dtype.itemsize
        shortest = 16
        if generation == 10 and block_b == 64:
            # Shorter ones take more than the 512 columns of tensor memory, and Triton refuses to launch the kernel.
            shortest, longest = 64, 128
        tile = _Tile(block_b, block_h, num_warps, shortest, longest, scratch, _BYTES_IN_FLIGHT)
        configs += _resident(product, (B, H, D), tile, limits)
    if configs:
        return min(configs, key=functools.partial(_clocks, product, limits))
    # Elements of rows that begin anywhere are loaded one by one, each with its address.
    return _stepwise_config(B, H, D, dtype, precision, few_rows=H % 16 != 0, num_warps=8 if H % 16 else 4)


def _forward_chunk_bytes(block_b: int, block_h: int, H: int, row_bytes: int, generation: int) -> int:
    """Of the exchanged state, at most. Short chunks take fewer registers, where tensor cores take W_hh through them."""
    if block_h == 128:
        return 64 * block_b
    if generation == 10 and block_h >= 16:
        return 16384  # the tensor cores there are waited for after each chunk
    if block_h == 8 and row_bytes > 2048 and generation != 8:
        return 2048 if generation == 9 or (generation == 10 and H % 2 == 0) else 1024 if H % 16 else 8192
    return 4096 if generation == 8 and block_b == 64 else 8192


@functools.lru_cache(maxsize=4096)
def sequence_backward_config(
    B: int, H: int, D: int, dtype: torch.dtype, precision: str, limits: DeviceLimits, stepwise: bool = False
) -> SequenceConfig:
    """How to run it backward: the inner dimension is 4H, split over eight warps."""
    product, generation = _Product(4 * H, 1, 8, dtype.itemsize), limits.generation
    configs: list[SequenceConfig] = []
    for block_h, block_b in () if stepwise else _tiles(product, H, 64, dtype, precision, limits):
        scratch = 4 * product.split_k * block_b * block_h  # for the sum over the splits, in float32
        area, bytes_in_flight, even_rounds = block_b * block_h, _BYTES_IN_FLIGHT, True
        chunk_bytes = 4096  # of each split
        # Many rows leave fewer registers.
        if generation == 10 and block_b > 16 and area == 512 and dtype.itemsize == 2:
            bytes_in_flight, chunk_bytes = 256 if H % 2 and H > 704 else 192, 2048
        elif generation == 10 and block_b > 16 and area == 1024:
            # 5, 5 and 1 chunks take far fewer than 4, 4 and 3.
            bytes_in_flight, even_rounds = (128, True) if H <= 320 else (160, False)
        elif block_b > 16 and area == 1024:
            chunk_bytes = 2048
        elif (
            (generation == 8 and block_b > 16 and H > 768 and H % 2)
            or (generation == 9 and block_h == 16 and dtype == torch.float32 and H > 768)
            or (generation == 10 and H > 1280)
        ):
            chunk_bytes = 1024
        longest = 16 if block_h == 64 else chunk_bytes // block_b // dtype.itemsize
        tile = _Tile(block_b, block_h, 8, 16, longest, scratch, bytes_in_flight, even_rounds)
        configs += _resident(product, (B, H, D), tile, limits)
    if configs:
        return min(configs, key=functools.partial(_clocks, product, limits))
    # Sixteen rows by four warps do not fit in registers on ordinary cores, on compute capability 10.
    full_precision = dtype == torch.float32 and precision == "ieee"
    return _stepwise_config(B, H, D, dtype, precision, num_warps=8 if full_precision and B <= 16 else 4)


@dataclass(frozen=True)
class _Product:
    """The recurrent product of one step in one program: [block_b, inner] by [inner, columns * block_h]."""

    inner: int
    columns: int  # for each unit
    split_k: int
    itemsize: int

    @property
    def backward(self) -> bool:
        return self.columns == 1


# What registers mostly have room for: bytes of the exchanged state that each thread loads at once, and addresses of chunks.
_BYTES_IN_FLIGHT = 256
_MOST_CHUNKS = 64
# More waits for the L2 cache take longer than a launch for each step.
_MOST_ROUNDS = 16
# Bytes of shared memory for the barriers with which the compiler waits for tensor cores.
_BARRIERS = 256
# Of an SM of sm_100.
_TENSOR_MEMORY_COLUMNS = 512


def _tiles(
    product: _Product, H: int, most_units: int, dtype: torch.dtype, precision: str, limits: DeviceLimits
) -> list[tuple[int, int]]:
    """(block_h, block_b) of which, as far as is known, the compiler keeps all but W_hh in registers.

    Many units, since each program reads the whole state; all of them, up to most_units, need no barrier.
    """
    # Ordinary cores want W_hh in registers, too, and tf32x3 three copies of it. Longer rows do not fit.
    if not uses_tensor_cores(dtype, precision) or precision == "tf32x3" or H > (1536 if dtype.itemsize == 2 else 1024):
        return []
    if limits.generation == 10 and H % 2:
        most_units = min(most_units, 64)
    alone = [(n, 16) for n in (32, 64, 128) if n // 2 < H <= n <= most_units]
    return alone + [
        (block_h, block_b)
        for block_h, block_b in itertools.product((32, 16, 8), (16, 32, 64))
        if (block_h == 8 or block_h // 2 < H) and _fits_in_registers(product, H, block_b, block_h, limits.generation)
    ]


def _fits_in_registers(product: _Product, H: int, block_b: int, block_h: int, generation: int) -> bool:
    """By what the compiler makes of tiles around these bounds, with every feature."""
    tile, row_bytes = block_b * block_h, H * product.itemsize
    state_bytes = block_b * row_bytes if block_b > 16 else 0  # of H units, where there are many rows
    if generation not in (8, 9, 10):  # 12, and what nothing is known of
        return tile <= 512 and state_bytes <= 32768 and (block_b == 16 or H % 2 == 0)
    if state_bytes > 65536 or (generation == 8 and block_b * product.itemsize > 128):
        return False
    if product.backward:
        weight_bytes = block_h * row_bytes  # of one gate
        most = 49152 if tile == 256 else 32768 if block_b == 16 else 24576
        few = block_b <= 32 and tile * product.itemsize <= 2048 and weight_bytes <= most
        return tile <= 1024 and (generation != 10 or few)
    # mma.sync takes W_hh through registers, wgmma and its successor from shared memory.
    if generation == 10 and (block_h * row_bytes > 49152 or (H % 2 and tile * product.itemsize > 4096)):
        return False
    return tile <= (1024 if generation == 8 else 2048)


class _Tile(NamedTuple):
    """A tile that keeps W_hh on chip, and how it loads the exchanged state.

    shortest, longest: of block_k. scratch: bytes of shared memory for what follows the product, in the place of the chunks.
    bytes_in_flight: of the exchanged state that each thread loads at once, at most. even_rounds: as many chunks in every round
    of loads, rather than most in the first ones.
    """

    block_b: int
    block_h: int
    num_warps: int
    shortest: int
    longest: int
    scratch: int
    bytes_in_flight: int
    even_rounds: bool = True


def _resident(
    product: _Product, sizes: tuple[int, int, int], tile: _Tile, limits: DeviceLimits
) -> Iterator[SequenceConfig]:
    """The configuration with this tile for sizes B, H, D, or none where W_hh does not fit."""
    (B, H, D), (block_b, block_h, num_warps, shortest, longest, scratch, bytes_in_flight, even_rounds) = sizes, tile
    programs, groups = cdiv(H, block_h), cdiv(B, block_b) * D
    # Programs that wait for each other must run at the same time; others may queue.
    if programs > 1 and programs * groups > limits.multiprocessors:
        return
    each = cdiv(product.inner, product.split_k)
    for block_k in (n for n in (1024, 512, 256, 128, 64, 32, 16) if shortest <= n <= longest):
        depth = product.split_k * block_k
        chunks = cdiv(product.inner, depth)
        if block_k > shortest and chunks * block_k > each + each // 8:
            continue  # too much padding
        chunk = block_b * depth * product.itemsize
        free = limits.shared_memory - chunks * depth * product.columns * block_h * product.itemsize - _BARRIERS
        at_once = min(free, bytes_in_flight * 32 * num_warps) // chunk
        if free >= scratch and chunks <= min(_MOST_ROUNDS * at_once, _MOST_CHUNKS):
            in_flight = cdiv(chunks, cdiv(chunks, at_once)) if even_rounds else min(chunks, at_once)
            if programs > 1 and limits.generation == 10:  # programs that wait: see grid_sync
                columns = _tensor_memory_columns(product, block_b, block_h, block_k)
                used = limits.shared_memory - _BARRIERS - free + max(in_flight * chunk, scratch)
                if columns * _programs_per_sm(num_warps, used) > _TENSOR_MEMORY_COLUMNS:
                    continue
            yield SequenceConfig(
                num_warps,
                1,
                block_b,
                block_h,
                product.split_k,
                block_k,
                in_flight,
                programs,
                groups,
                True,
                max_registers=MAX_REGISTERS,
            )
            return


def _tensor_memory_columns(product: _Product, block_b: int, block_h: int, block_k: int) -> int:
    """Columns of tensor memory that a program allocates on sm_100: one accumulator for each chunk of the product.

    An accumulator [4 * block_h, block_b] in float32 fills columns of 128 lanes. Smaller products than 64 rows, and batched
    ones, run on mma.sync. The compiler allocates a power of two, at least 32.
    """
    if product.backward or block_h < 16:
        return 0
    columns = cdiv(product.inner, block_k) * block_b * block_h // 32
    return max(1 << (columns - 1).bit_length(), 32)


def _programs_per_sm(num_warps: int, shared_memory: int) -> int:
    """The most programs of this much shared memory that share an SM of sm_100: 228 KiB, 1 KiB of it reserved for each program,
    and 64 warps."""
    return min((228 << 10) // (shared_memory + 1024), 64 // num_warps)


# The model of a step, in clocks of a multiprocessor, and bytes a clock.
_BARRIER = 1500  # between programs: an arrival, and seeing it
_L2_LATENCY = 500
_L2_SHARE, _L2_MOST = 24, 64  # of each multiprocessor where all read, and where few do
_SHARED_MEMORY = 128
_MMA_SYNC_LATENCY, _WGMMA_LATENCY = 33, 17  # of one in a chain, which multiplies 32 bytes of each row
# Multiply-adds of 16 bits; of TF32 half as many.
_MMA_SYNC = {9: 1024, 10: 1024}  # else 512
_WGMMA = {9: 2048, 10: 4096}


def _clocks(product: _Product, limits: DeviceLimits, config: SequenceConfig) -> float:
    """What one step takes, by a model, to choose among configurations.

    The barrier between programs; the way to the L2 cache and back, for each round of loads; the cache's throughput; and the
    slowest of shared memory, from which tensor cores take W_hh, the cores themselves, and the chain of sums in one of them.
    """
    row_bytes, columns = product.inner * product.itemsize, product.columns * config.block_h
    launched = config.programs * config.groups
    share = max(limits.multiprocessors / launched, 1)  # of the multiprocessors, for each program
    wgmma = limits.generation in _WGMMA and not product.backward and columns >= 64
    rate = (_WGMMA if wgmma else _MMA_SYNC).get(limits.generation, 512)
    products = config.block_b * columns * row_bytes / 2 / rate
    chain = row_bytes / product.split_k / 32 * (_WGMMA_LATENCY if wgmma else _MMA_SYNC_LATENCY)
    step = (
        (_BARRIER if config.programs > 1 else 0)
        + config.rounds(product.inner) * _L2_LATENCY
        + config.block_b * row_bytes / min(_L2_SHARE * share, _L2_MOST)
        + max(columns * row_bytes / _SHARED_MEMORY, products, chain)
    )
    return step * cdiv(launched, limits.multiprocessors)  # programs that are alone with their rows may queue


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
    return SequenceConfig(
        num_warps, 3, block_b, 16, 1, block_k, 1, programs, groups, False, max_registers=MAX_REGISTERS
    )
