"""The readout Y = softmax(h W^T + b), in at most two launches and with no [B, V] buffer besides Y.

In the first launch each program computes one tile of the logits [B, V] and stores exp(logit - m) in Y, where m is the
largest logit of the row within the tile. It also stores m and the sum s of these exponentials. The second launch multiplies
Y by the factor from a tile's softmax to the row's, with M and S taken over the tiles t of the row:

    M = max_t m_t    S = sum_t s_t exp(m_t - M)    Y = exp(logit - m_t) * exp(m_t - M) / S

Where one tile holds a whole row, the first launch divides by s and is the only one.
"""

import torch
import triton
import triton.language as tl

from .config import cdiv, readout_forward_config, readout_rescale_config
from .device import matmul_precision, multiprocessor_count
from .inputs import ReadoutInputs, ReadoutOptions, ReadoutOutputs
from .launch import Launcher, accumulator, accumulator_dtype
from .tiles import add_projections


@triton.jit
def _finite_shift(m):
    """Return what to subtract before the exponential: m, or 0 if all logits are -inf, since exp(-inf + inf) is NaN, not 0."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit(do_not_specialize=["B"])
def _readout_forward_kernel(
    # pointers
    h_ptr,  # [B, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V] or None
    y_ptr,  # [B, V] out: exponentials within the tile
    stats_ptr,  # [B, tiles, 2] out: largest logit and sum; None when one tile holds a row, and y is divided by the sum
    # sizes
    B,
    H,
    V,
    # strides
    stride_h_b,
    stride_h_k,
    stride_weight_v,
    stride_weight_k,
    stride_bias,
    # meta-parameters
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute the softmax of one [BLOCK_B, BLOCK_V] tile of h W^T + b, which stays in registers until y is stored."""
    # Programs that run at the same time share up to GROUP row tiles of h and neighbouring tiles of the weight.
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_v = tl.cdiv(V, BLOCK_V)
    pid = tl.program_id(0)
    first_tile_b = pid // (GROUP * tiles_v) * GROUP
    group = tl.minimum(tiles_b - first_tile_b, GROUP)
    pid %= GROUP * tiles_v
    tile_v = pid // group
    offs_b = (first_tile_b + pid % group) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_b = offs_b < B
    mask_v = offs_v < V

    logits = tl.zeros((BLOCK_B, BLOCK_V), ACC)
    factors = (h_ptr, weight_ptr, H, stride_h_b, stride_h_k, stride_weight_v, stride_weight_k)
    logits = add_projections(logits, offs_b, mask_b, offs_v, mask_v, factors, None, BLOCK_K, PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_v.to(tl.int64) * stride_bias, mask=mask_v, other=0.0)
        logits += bias.to(ACC)[None, :]
    logits = tl.where(mask_v[None, :], logits, -float("inf"))

    m = tl.max(logits, axis=1)
    y = tl.exp(logits - _finite_shift(m)[:, None])
    s = tl.sum(y, axis=1)
    offs_b = offs_b.to(tl.int64)
    if stats_ptr is None:
        y /= s[:, None]
    else:
        stats_ptrs = stats_ptr + (offs_b * tiles_v + tile_v) * 2
        tl.store(stats_ptrs, m, mask=mask_b)
        tl.store(stats_ptrs + 1, s, mask=mask_b)
    offsets = offs_b[:, None] * V + offs_v[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_v[None, :])


@triton.jit(do_not_specialize=["tiles"])
def _readout_rescale_kernel(
    # pointers
    y_ptr,  # [B, V] in and out
    stats_ptr,  # [B, tiles, 2]
    # sizes
    V,
    tiles,
    # meta-parameters
    ACC: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
):
    """Turn the softmax of each tile into that of the row: one program owns BLOCK_TILES tiles of one row."""
    programs = tl.cdiv(tiles, BLOCK_TILES)  # per row
    row = (tl.program_id(0) // programs).to(tl.int64)
    stats_ptr += row * tiles * 2
    offs_t = tl.arange(0, BLOCK_STATS)
    m = tl.full((BLOCK_STATS,), -float("inf"), ACC)
    for first in range(0, tiles, BLOCK_STATS):
        mask_t = offs_t < tiles - first
        m = tl.maximum(m, tl.load(stats_ptr + (first + offs_t) * 2, mask=mask_t, other=-float("inf")))
    m = _finite_shift(tl.max(m, axis=0))
    s = tl.zeros((BLOCK_STATS,), ACC)
    for first in range(0, tiles, BLOCK_STATS):
        mask_t = offs_t < tiles - first
        m_t = tl.load(stats_ptr + (first + offs_t) * 2, mask=mask_t, other=-float("inf"))
        s += tl.load(stats_ptr + (first + offs_t) * 2 + 1, mask=mask_t, other=0.0) * tl.exp(m_t - m)
    s = tl.sum(s, axis=0)

    tile = tl.program_id(0) % programs * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    m_t = tl.load(stats_ptr + tile * 2, mask=tile < tiles, other=0.0)
    scale = tl.exp(m_t - m) / s
    offs_v = tile[:, None] * TILE_V + tl.arange(0, TILE_V)[None, :]
    y_ptrs = y_ptr + row * V + offs_v
    y = tl.load(y_ptrs, mask=offs_v < V, other=0.0).to(ACC) * scale[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=offs_v < V)


_forward = Launcher(_readout_forward_kernel)
_rescale = Launcher(_readout_rescale_kernel)


def softmax_readout_forward(inputs: ReadoutInputs, options: ReadoutOptions, save: bool = False) -> ReadoutOutputs:
    """Compute softmax(h W^T + b) along V, in one launch where a tile holds a row, else in two.

    Args:
        inputs: tensors of one floating-point dtype and device, of any strides. The caller checks them.
        save: ignored, because the backward needs only y.

    Returns:
        y [B, V], contiguous.
    """
    h, weight, bias = inputs
    (B, H), V = h.shape, weight.shape[0]
    y = torch.empty((B, V), dtype=options.dtype, device=h.device)
    if y.numel() == 0:
        return ReadoutOutputs(y)
    precision = matmul_precision(h.dtype, options.precision)
    multiprocessors = multiprocessor_count(h.device)
    config = readout_forward_config(B, V, h.dtype, precision, multiprocessors)
    acc = accumulator(h.dtype)
    tiles = cdiv(V, config.block_v)
    stats = torch.empty((B, tiles, 2), dtype=accumulator_dtype(h.dtype), device=h.device) if tiles > 1 else None
    arguments = dict(h_ptr=h, weight_ptr=weight, bias_ptr=bias, y_ptr=y, stats_ptr=stats, B=B, H=H, V=V)
    _forward((cdiv(B, config.block_b) * tiles, 1, 1), config, arguments | dict(ACC=acc, PRECISION=precision))
    if stats is not None:
        rescale = readout_rescale_config(B, V, config.block_v, multiprocessors)
        arguments = dict(y_ptr=y, stats_ptr=stats, V=V, tiles=tiles, ACC=acc, TILE_V=config.block_v)
        _rescale((B * cdiv(tiles, rescale.block_tiles), 1, 1), rescale, arguments)
    return ReadoutOutputs(y)
