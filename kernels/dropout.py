"""Random masks drawn by a layer's kernels, for dropout and cells: pure functions of a seed and of an element's position.

No mask is in memory: the backward draws the same random numbers again. They are those of Philox-4x32-10 under the seed, at the
counter (direction * H + unit, batch row, step, 0), so they depend neither on tiles nor on the memory order of a tensor. Each
draw gives four numbers. The first is for dropout: the forward kernel stores each h a second time, dropped, and the backward
drops the gradient likewise. The others are for the masks of a cell.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LaunchConfig, cdiv
from .launch import Launcher


def probability(p: float) -> tuple[int, int]:
    """Return p as integers hi * 2^-30 + lo * 2^-53. A float argument has 24 bits; a constexpr would compile for each p."""
    scaled = round(p * 2**53)
    return scaled >> 23, scaled & (2**23 - 1)


@triton.jit
def begin(seed_ptr, p_hi, p_lo, ACC: tl.constexpr):
    """Return seed, p and the scale 1 / (1 - p), which is 0 for p = 1."""
    p = p_hi.to(tl.float64) * 2.0**-30 + p_lo.to(tl.float64) * 2.0**-53
    scale = tl.where(p < 1.0, 1.0 / tl.where(p < 1.0, 1.0 - p, 1.0), 0.0)
    return tl.load(seed_ptr), p.to(tl.float32), scale.to(ACC)


@triton.jit
def _uniform(at, number: tl.constexpr):
    """Return random numbers [BLOCK_B, BLOCK_H] in [0, 1). at: (seed, t, rows [BLOCK_B], units [BLOCK_H]); number: 0 ... 3."""
    seed, t, rows_b, units = at
    random = tl.philox(seed, units[None, :].to(tl.int32), rows_b[:, None].to(tl.int32), t, 0)
    return tl.uint_to_uniform_float(random[number])


@triton.jit
def drop(values, at, p, scale):
    """Drop values [BLOCK_B, BLOCK_H] at (seed, t, rows, units). A NaN stays NaN, dropped or not."""
    return values * tl.where(_uniform(at, 0) >= p, scale, 0.0)


@triton.jit
def mask(like, at, number: tl.constexpr, p: tl.constexpr):
    """Return a tile like `like`: 1 with probability p and else 0, or p itself where at is None. number: 1 ... 3."""
    if at is None:
        return tl.full(like.shape, p, like.dtype)
    else:
        return (_uniform(at, number) < p).to(like.dtype)


@triton.jit(do_not_specialize=["B", "N", "p_hi", "p_lo"])
def _lstm_kept_kernel(
    seed_ptr,  # [1]
    out_ptr,  # [T, B, N] out, bytes
    B,
    N,
    p_hi,
    p_lo,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, b = tl.program_id(0) // B, tl.program_id(0) % B
    units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed, p, _ = begin(seed_ptr, p_hi, p_lo, tl.float32)
    kept = _uniform((seed, t, b + tl.arange(0, 1), units), NUMBER) >= p
    out = out_ptr + tl.program_id(0).to(tl.int64) * N + units[None, :]
    tl.store(out, kept.to(tl.uint8), mask=(units < N)[None, :])


_kept = Launcher(_lstm_kept_kernel)


def kept(seed: Tensor, p: float, shape: tuple[int, int, int], number: int = 0) -> Tensor:
    """Return the mask [T, B, N] bool that the sequence kernels apply to outputs of this shape, for the reference.

    Each element is False with probability p, by the random numbers of seed [1] int64. number: which of the four of each draw. A
    mask of a cell is 1 where this mask is False.
    """
    T, B, N = shape
    result = torch.empty(shape, dtype=torch.bool, device=seed.device)
    p_hi, p_lo = probability(p)
    arguments = dict(seed_ptr=seed, out_ptr=result.view(torch.uint8), B=B, N=N, p_hi=p_hi, p_lo=p_lo)
    _kept((T * B, cdiv(N, 128), 1), LaunchConfig(1, 1), arguments | dict(NUMBER=number, BLOCK=128))
    return result
