"""Dropout of a layer's output inside its own kernels: the mask is a pure function of a seed and of an element's position.

No mask is in memory. Forward the sequence kernel stores each h a second time, dropped. Backward it draws the same random
numbers again and drops the gradient alike. The numbers are those of Philox-4x32-10 under the seed, at the counter
(direction * H + unit, row, step, 0), so they depend neither on tiles nor on the memory order of a tensor.
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
    """(seed, p, 1 / (1 - p) or 0 for p = 1) for `drop`."""
    p = p_hi.to(tl.float64) * 2.0**-30 + p_lo.to(tl.float64) * 2.0**-53
    scale = tl.where(p < 1.0, 1.0 / tl.where(p < 1.0, 1.0 - p, 1.0), 0.0)
    return tl.load(seed_ptr), p.to(tl.float32), scale.to(ACC)


@triton.jit
def drop(values, seed, p, scale, t, rows_b, units):
    """values [BLOCK_B, BLOCK_H] of step t: a NaN stays one, dropped or not."""
    random, _, _, _ = tl.philox(seed, units[None, :].to(tl.int32), rows_b[:, None].to(tl.int32), t, 0)
    return values * tl.where(tl.uint_to_uniform_float(random) >= p, scale, 0.0)


@triton.jit(do_not_specialize=["B", "N", "p_hi", "p_lo"])
def _lstm_kept_kernel(
    seed_ptr,  # [1]
    out_ptr,  # [T, B, N] out, bytes
    B,
    N,
    p_hi,
    p_lo,
    BLOCK: tl.constexpr,
):
    t, b = tl.program_id(0) // B, tl.program_id(0) % B
    units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed, p, scale = begin(seed_ptr, p_hi, p_lo, tl.float32)
    dropped = drop(tl.full((1, BLOCK), 1.0, tl.float32), seed, p, scale, t, b + tl.arange(0, 1), units)
    out = out_ptr + tl.program_id(0).to(tl.int64) * N + units[None, :]
    tl.store(out, (dropped != 0).to(tl.uint8), mask=(units < N)[None, :])


_kept = Launcher(_lstm_kept_kernel)


def kept(seed: Tensor, p: float, shape: tuple[int, int, int]) -> Tensor:
    """Return the mask [T, B, N] bool that the sequence kernels apply to outputs of this shape, for other ways to compute them.

    Each element is False with probability p, by the random numbers of seed [1] int64.
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
            BLOCK=128,
        ),
    )
    return result
