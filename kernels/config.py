"""Launch configurations: pure functions from the problem and the device to tile sizes. The only tuned numbers of the project.

No number here has been measured on a GPU yet. They come from counting programs and bytes and from what the compiler reports
(registers, spills, shared memory) for sm_80 to sm_120; the tests compile every configuration that `all_cell_*_configs` lists.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LaunchConfig:
    """What every launch has: warps per program and depth of the software pipeline."""

    num_warps: int
    num_stages: int


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


def _tiles(n: int, block: int) -> int:
    return -(-n // block)


def _uses_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    return dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and precision != "ieee")


@functools.lru_cache(maxsize=4096)
def cell_forward_config(
    B: int, I: int, H: int, dtype: torch.dtype, precision: str, multiprocessors: int
) -> CellForwardConfig:
    """The tile for x [B, I], h [B, H]: as many units as leave at least one program for each multiprocessor.

    Few units per program read h more often (from L2) but are what gives every multiprocessor a share of the weights, and at
    small batch the kernel is a stream of the weights: at B = 16, H = 1024 four units make 256 programs.
    """
    block_b, small, large = (16, 4, 16) if B <= 16 else (64, 8, 16)
    block_h = large if _tiles(H, large) * _tiles(B, block_b) >= multiprocessors else small
    return _cell_forward_tile(block_b, block_h, dtype, precision)


def _cell_forward_tile(block_b: int, block_h: int, dtype: torch.dtype, precision: str) -> CellForwardConfig:
    if _uses_tensor_cores(dtype, precision):
        # 128 bytes of each weight row a step. The narrow tile keeps more steps in flight: together about 3 MB over the device,
        # what latency times memory bandwidth asks for.
        stages = 6 if block_h == 4 else 4
        return CellForwardConfig(4, stages, block_b, block_h, 64 if dtype.itemsize == 2 else 32)
    # Products on the ordinary cores keep a whole step of both operands in registers: short steps, or they spill.
    return CellForwardConfig(4, 3, block_b, block_h, 16)


@functools.lru_cache(maxsize=4096)
def cell_backward_config(
    B: int, I: int, H: int, dtype: torch.dtype, precision: str, multiprocessors: int
) -> CellBackwardConfig:
    """Tiles for the gradients of x [B, I], h [B, H]."""
    return _cell_backward_tile(16 if B <= 16 else 32, dtype, precision)


def _cell_backward_tile(block_b: int, dtype: torch.dtype, precision: str) -> CellBackwardConfig:
    if not _uses_tensor_cores(dtype, precision):
        return CellBackwardConfig(4, 2, 16, 4, 32)
    if precision == "tf32x3":  # three products' operands at once: wider tiles spill
        return CellBackwardConfig(4, 2, 16, 16, 32)
    return CellBackwardConfig(4, 3, block_b, 16, 32 if block_b == 16 or dtype.itemsize == 4 else 64)


def all_cell_forward_configs(dtype: torch.dtype, precision: str) -> set[CellForwardConfig]:
    """Every configuration that `cell_forward_config` can return for this dtype and precision."""
    pairs = ((16, 4), (16, 16), (64, 8), (64, 16))
    return {_cell_forward_tile(b, h, dtype, precision) for b, h in pairs}


def all_cell_backward_configs(dtype: torch.dtype, precision: str) -> set[CellBackwardConfig]:
    """Every configuration that `cell_backward_config` can return for this dtype and precision."""
    return {_cell_backward_tile(b, dtype, precision) for b in (16, 32)}
