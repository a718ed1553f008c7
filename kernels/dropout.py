"""Random masks inside a layer's kernels, of dropout and of cells: pure functions of a seed and of an element's position.

No mask is in memory: backward the same random numbers are drawn again. They are those of Philox-4x32-10 under the seed, at the
counter (direction * H + unit, row, step, 0), so they depend neither on tiles nor on the memory order of a tensor. Each draw
gives four numbers: the first is that of dropout, for which the forward kernel stores each h a second time, dropped, and the
backward drops the gradient alike; the others are those of the masks of a cell.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LaunchConfig, cdiv
from .launch import Launcher


def probability(p: float) -> tuple[int, int]:
    """p as two integers hi * 2^-30 + lo * 2^-53: a float argument has 24 bits, and a constant would compile for each p."""
    scaled = round(p * 2**53)
    return scaled >> 23, scaled & (2**23 - 1)


@triton.jit
def begin(seed_ptr, p_hi, p_lo, ACC: tl.constexpr):
    """(seed, p, 1 / (1 - p) or 0 for p = 1)."""
    p = p_hi.to(tl.float64) * 2.0**-30 + p_lo.to(tl.float64) * 2.0**-53
    scale = tl.where(p < 1.0, 1.0 / tl.where(p < 1.0, 1.0 - p, 1.0), 0.0)
    return tl.load(seed_ptr), p.to(tl.float32), scale.to(ACC)


@triton.jit
def _uniform(at, number: tl.constexpr):
    """The random numbers [BLOCK_B, BLOCK_H] in [0, 1), at (seed, t, rows [BLOCK_B], units [BLOCK_H]); number: 0 ... 3."""
    seed, t, rows_b, units = at
    random = tl.philox(seed, units[None, :].to(tl.int32), rows_b[:, None].to(tl.int32), t, 0)
    return tl.uint_to_uniform_float(random[number])


@triton.jit
def drop(values, at, p, scale):
    """values [BLOCK_B, BLOCK_H] at (seed, t, rows, units): a NaN stays one, dropped or not."""
    return values * tl.where(_uniform(at, 0) >= p, scale, 0.0)


@triton.jit
def mask(like, at, number: tl.constexpr, p: tl.constexpr):
    """1 with probability p and else 0, or where `at` is None p itself, as a tile like another; number: 1 ... 3."""
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
    """Return the mask [T, B, N] bool that the sequence kernels apply to outputs of this shape, for other ways to compute them.

    Each element is False with probability p, by the random numbers of seed [1] int64. number: of the four of each draw; where
    those of dropout are kept, the masks of a cell are 0.
    """
    T, B, N = shape
    result = torch.empty(shape, dtype=torch.bool, device=seed.device)
    p_hi, p_lo = probability(p)
    _kept(
        (T * B, cdiv(N, 128), 1),
        LaunchConfig(1, 1),
        dict(
            seed_ptr=seed,
            out_ptr=result.view(torch.uint8),
            B=B,
            N=N,
            p_hi=p_hi,
            p_lo=p_lo,
            NUMBER=number,
            BLOCK=128,
        ),
    )
    return result
