"""Launch configurations of cell and readout: pure functions from the problem and the device to tile sizes.

No number here has been measured on a GPU yet. They come from counting programs and bytes and from what the compiler reports
(registers, spills, shared memory) for sm_80 to sm_120; the tests compile every configuration that these functions return.
"""

import functools
from dataclasses import dataclass, field, fields
from typing import Any

import torch

# Registers per thread. Without this cap ptxas may use fewer, to raise occupancy, and spill.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class LaunchConfig:
    """The figures of every launch: warps per program, depth of the software pipeline, and the most registers per thread."""

    num_warps: int
    num_stages: int
    max_registers: int | None = field(default=None, kw_only=True)

    @property
    def options(self) -> dict[str, int]:
        """Options of Triton's compiler. enable_fp_fusion, by which a * b + c rounds once, is set because it changes results."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True, **limit}

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        """The other fields, which a kernel takes as meta-parameters under their names in capitals."""
        shared = {field.name for field in fields(LaunchConfig)}
        return {field.name.upper(): getattr(self, field.name) for field in fields(self) if field.name not in shared}


@dataclass(frozen=True)
class CellForwardConfig(LaunchConfig):
    """Tile of one program of the cell forward: block_b rows x block_h units (times four gates), block_k of I or H a step."""

    block_b: int
    block_h: int
    block_k: int


@dataclass(frozen=True)
class CellBackwardConfig(LaunchConfig):
    """Tiles of the cell backward: [block_b, block_n] of dx and dh_prev, [4 * block_h, block_n] of the weight gradients."""

    block_b: int
    block_h: int
    block_n: int


def cdiv(n: int, block: int) -> int:
    """Return how many blocks cover n. Triton's own cdiv takes microseconds of host time per call."""
    return -(-n // block)


@functools.cache
def uses_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    return dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and precision != "ieee")


@functools.lru_cache(maxsize=4096)
def cell_forward_config(B: int, H: int, dtype: torch.dtype, precision: str, multiprocessors: int) -> CellForwardConfig:
    """Return the tile for h [B, H]: as many units as leave at least one program for each SM.

    With few units per program h is read more often (from L2), but every SM reads a share of the weights, and at small batch
    reading the weights takes most of the time: at B = 16, H = 1024 four units per program make 256 programs.
    """
    on_tensor_cores = uses_tensor_cores(dtype, precision)
    # The most rows and units without spills: fewer on CUDA cores, and with tf32x3, which computes three products at once.
    rows, large = (64, 16) if on_tensor_cores and precision != "tf32x3" else (16 if dtype == torch.float64 else 32, 8)
    block_b, small = (16, 4) if B <= 16 else (rows, 8)
    block_h = large if cdiv(H, large) * cdiv(B, block_b) >= multiprocessors else small
    if not on_tensor_cores:
        # On CUDA cores a whole step of both operands is in registers, so longer steps would spill. At small batch many steps
        # are in flight, for the same reason as below: 8 or 9 KB of float32 weights per program.
        return CellForwardConfig(4, 10 if block_b == 16 else 3, block_b, block_h, 16, max_registers=MAX_REGISTERS)
    # A step takes 128 bytes of each weight row. The narrow tile keeps more steps in flight, about 3 MB on the whole device,
    # which is latency times memory bandwidth.
    stages, block_k = 6 if block_h == 4 else 4, 64 if dtype.itemsize == 2 else 32
    warps = 8 if block_b * block_h == 64 * 16 else 4  # with four warps the large tile spills where rows are unaligned
    return CellForwardConfig(warps, stages, block_b, block_h, block_k, max_registers=MAX_REGISTERS)


@functools.lru_cache(maxsize=4096)
def cell_backward_config(B: int, dtype: torch.dtype, precision: str) -> CellBackwardConfig:
    """Return the tiles for the gradients of h [B, H]."""
    block_b = 16 if B <= 16 else 32
    if not uses_tensor_cores(dtype, precision):
        warps, block_n = (4, 32) if dtype == torch.float32 else (8, 16)
        return CellBackwardConfig(warps, 2, 16, 4, block_n, max_registers=MAX_REGISTERS)
    if precision == "tf32x3":  # wider tiles spill, because the operands of three products are held at once
        return CellBackwardConfig(4, 2, 16, 16, 32, max_registers=MAX_REGISTERS)
    if dtype == torch.float32:
        return CellBackwardConfig(4, 2, block_b, 16, 32, max_registers=MAX_REGISTERS)
    return CellBackwardConfig(4, 3, block_b, 16, 32 if block_b == 16 else 64)


@dataclass(frozen=True)
class ReadoutForwardConfig(LaunchConfig):
    """Tile of one program of the readout: block_b rows x block_v columns, block_k of H a step.

    group: how many row tiles take turns before the next tile of columns.
    """

    block_b: int
    block_v: int
    block_k: int
    group: int


@dataclass(frozen=True)
class ReadoutRescaleConfig(LaunchConfig):
    """One program of the readout's second launch: block_tiles tiles of a row; block_stats of its statistics a step."""

    block_tiles: int
    block_stats: int


@dataclass(frozen=True)
class ReadoutBackwardConfig(LaunchConfig):
    """Tiles of the readout backward: [block_b, block_n] of dh, [block_v, block_n] of dW; block_parts parts of a dot."""

    block_b: int
    block_v: int
    block_n: int
    block_parts: int


@functools.lru_cache(maxsize=4096)
def readout_forward_config(
    B: int, V: int, dtype: torch.dtype, precision: str, multiprocessors: int
) -> ReadoutForwardConfig:
    """Return the tile of logits [B, V]: the largest with a program for every SM, else one that holds a row, else the smallest.

    At small batch reading the weight takes most of the time, and the number of programs decides: at B = 1, V = 128 K tiles of
    128 columns make 1024 programs. A tile that holds a whole row saves the second launch, which is assumed to save more than a
    full GPU does.
    """
    on_tensor_cores, half = uses_tensor_cores(dtype, precision), dtype.itemsize == 2
    if half:
        sizes = [(16, 32), (16, 128), (64, 128), (128, 128)]
    elif dtype == torch.float64:
        sizes = [(16, 32)]
    else:
        sizes = [(16, 64), *{"tf32": [(64, 128)], "ieee": [(64, 64)]}.get(precision, [])]
    sizes = [size for size in sizes if (size[0] == 16) == (B <= 16)] or sizes
    full = [(b, v) for b, v in sizes if cdiv(B, b) * cdiv(V, v) >= multiprocessors]
    whole_row = [(b, v) for b, v in sizes if V <= v]
    block_b, block_v = full[-1] if full else (whole_row or sizes)[0]
    if not on_tensor_cores:
        # CUDA cores keep a whole step of both operands in registers: short steps, or they spill.
        return ReadoutForwardConfig(4 if block_b == 16 else 8, 3, block_b, block_v, 16, 8)
    # 128 bytes of each row a step; of the largest tile 64, or it spills where rows are not aligned.
    block_k = 64 if half and block_b < 128 else 32
    return ReadoutForwardConfig(8 if block_v == 128 else 4, 4, block_b, block_v, block_k, 8)


@functools.lru_cache(maxsize=4096)
def readout_rescale_config(B: int, V: int, block_v: int, multiprocessors: int) -> ReadoutRescaleConfig:
    """Return long pieces of a row if they fill the GPU, because each program reads all statistics of a row; else short ones."""
    elements, warps = (4096, 8) if B * cdiv(V, 4096) >= multiprocessors else (512, 2)
    return ReadoutRescaleConfig(warps, 1, elements // block_v, 1024)


@functools.lru_cache(maxsize=4096)
def readout_backward_config(B: int, dtype: torch.dtype, precision: str) -> ReadoutBackwardConfig:
    """Return the tiles for the gradients of h [B, H] and W [V, H]."""
    # Wider tiles spill where rows are not aligned.
    if not uses_tensor_cores(dtype, precision) or precision == "tf32x3":
        return ReadoutBackwardConfig(4, 2, 16, 32, 32, 16)
    if B <= 16:
        return ReadoutBackwardConfig(4, 3, 16, 64, 64, 16)
    return ReadoutBackwardConfig(8, 2, 32, 32, 128, 16)


def steps_per_part(tiles: int, steps: int, multiprocessors: int, least: int = 4) -> int:
    """Return how many of the `steps` of a sum one program takes, so that `tiles` sums make up to 4 programs per SM.

    A part has at least `least` steps, as each costs a store and a load of its sum.
    """
    parts = min(cdiv(4 * multiprocessors, max(tiles, 1)), steps // least)
    return cdiv(steps, parts) if parts > 1 else max(steps, 1)
