"""Dropout of a layer's output inside its own kernels: what is kept is a pure function of a seed and of the output's place.

No mask is in memory. Forward the sequence kernel stores each h a second time, dropped; backward it draws the same random
numbers again, for the gradient of what it stored. The numbers are those of Philox-4x32-10 at the counter (unit, row, step, 0)
under the seed: they depend neither on tiles nor on the memory order of a tensor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LaunchConfig, cdiv
from .launch import Launcher


@triton.jit
def drop(values, seed, t, rows_b, units, P: tl.constexpr):
    """values [BLOCK_B, BLOCK_H] of step t, each set to 0 with probability P, the others divided by 1 - P."""
    KEPT_SCALE: tl.constexpr = 1 / (1 - P) if P < 1 else 0.0
    random, _, _, _ = tl.philox(seed, units[None, :].to(tl.int32), rows_b[:, None].to(tl.int32), t, 0)
    return tl.where(tl.uint_to_uniform_float(random) >= P, values * KEPT_SCALE, 0.0)


@triton.jit
def _lstm_kept_kernel(
    seed_ptr,  # [1]
    out_ptr,  # [T, B, N] out, bytes
    B, N,
    P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, b = tl.program_id(0) // B, tl.program_id(0) % B
    units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dropped = drop(tl.full((1, BLOCK), 1.0, tl.float32), tl.load(seed_ptr), t, b + tl.arange(0, 1), units, P)
    out = out_ptr + tl.program_id(0).to(tl.int64) * N + units[None, :]
    tl.store(out, (dropped != 0).to(tl.uint8), mask=(units < N)[None, :])


_kept = Launcher(_lstm_kept_kernel)


def kept(seed: Tensor, p: float, T: int, B: int, N: int) -> Tensor:
    """[T, B, N] bool: what the sequence kernels keep of outputs of this shape."""
    result = torch.empty((T, B, N), dtype=torch.bool, device=seed.device)
    _kept((T * B, cdiv(N, 128), 1), (seed, result.view(torch.uint8)), (B, N), (p, 128), LaunchConfig(1, 1))
    return result


def dropped(y: Tensor, kept: Tensor, p: float) -> Tensor:
    """y dropped as the sequence kernels do it, differentiable: for those who compute y otherwise."""
    return torch.where(kept, y * (1 / (1 - p) if p < 1 else 0.0), 0.0)
