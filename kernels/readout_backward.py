"""Backward of the readout Y = softmax(h W^T + b), in two launches, or three where sums are divided among programs.

    dlogits = Y * (dY - sum_v dY * Y)    dh = dlogits W    dW = dlogits^T h    db = sum_b dlogits

The first launch computes the sums over v. In the second, programs of three kinds share the grid: tiles of dW, tiles of
dh and slices of db. Each computes the dlogits it needs from Y and dY, so dlogits is never in memory. Where the tiles are
too few to fill the GPU, the sum over b of a tile of dW or db, or the sum over v of a tile of dh, is divided into
parts, and the third launch adds these. Every sum has a fixed order: two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl

from .config import cdiv, readout_backward_config, readout_row_dots_config, readout_sum_parts_config, steps_per_part
from .launch import Launcher, accumulator, matmul_precision, multiprocessor_count
from .tiles import load_tile


@triton.jit(do_not_specialize=["B", "part_v"])
def _readout_row_dots_kernel(
    # pointers
    dy_ptr,  # [B, V]
    y_ptr,  # [B, V], contiguous
    dots_ptr,  # [B, parts] out
    # sizes
    B, V, part_v,  # columns per part, a multiple of BLOCK_V
    # strides
    stride_dy_b, stride_dy_v,
    # meta-parameters
    ACC: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sum_v dY * Y over part_v columns of one row."""
    parts = tl.cdiv(V, part_v)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    dot = tl.zeros((BLOCK_V,), ACC)
    for first in range(part * part_v, tl.minimum(part * part_v + part_v, V), BLOCK_V):
        offs_v = first + tl.arange(0, BLOCK_V)
        dy = tl.load(dy_ptr + row * stride_dy_b + offs_v.to(tl.int64) * stride_dy_v, mask=offs_v < V, other=0.0)
        y = tl.load(y_ptr + row * V + offs_v, mask=offs_v < V, other=0.0)
        dot += dy.to(ACC) * y.to(ACC)
    tl.store(dots_ptr + row * parts + part, tl.sum(dot, axis=0))


@triton.jit
def _row_dots(upstream, first_row, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """sum_v dY * Y of BLOCK_B rows, from its parts; 0 past B."""
    _, _, dots_ptr, parts, B, _, _, _ = upstream
    offs_b = first_row + tl.arange(0, BLOCK_B)
    dot = tl.zeros((BLOCK_B,), ACC)
    for first in range(0, parts, BLOCK_PARTS):
        offs_p = first + tl.arange(0, BLOCK_PARTS)
        dot += tl.sum(load_tile(dots_ptr, offs_b, offs_b < B, offs_p, offs_p < parts, parts, 1), axis=1)
    return dot


@triton.jit
def _logit_gradients(
    upstream,  # (dy, y, dots, parts_dot, B, V, stride_dy_b, stride_dy_v): see _readout_backward_kernel
    dot,  # [BLOCK_B]
    first_row, first_column,
    ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dlogits [BLOCK_B, BLOCK_V]; past B all are 0, and past V those of finite rows."""
    dy_ptr, y_ptr, _, _, B, V, stride_dy_b, stride_dy_v = upstream
    offs_b = first_row + tl.arange(0, BLOCK_B)
    offs_v = first_column + tl.arange(0, BLOCK_V)
    dy = load_tile(dy_ptr, offs_b, offs_b < B, offs_v, offs_v < V, stride_dy_b, stride_dy_v).to(ACC)
    y = load_tile(y_ptr, offs_b, offs_b < B, offs_v, offs_v < V, V, 1).to(ACC)
    return y * (dy - dot[:, None])


@triton.jit
def _weight_gradient_tile(
    tile, out_ptr, h_ptr, H, part_b, stride_h_b, stride_h_k, upstream, B, V,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_V, BLOCK_N] tile of dlogits^T h, summed over part_b rows."""
    tiles_n = tl.cdiv(H, BLOCK_N)
    tiles = tl.cdiv(V, BLOCK_V) * tiles_n
    part = tile // tiles
    first_column = tile % tiles // tiles_n * BLOCK_V
    offs_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < H
    acc = tl.zeros((BLOCK_V, BLOCK_N), ACC)
    for first_row in range(part * part_b, tl.minimum(part * part_b + part_b, B), BLOCK_B):
        dot = _row_dots(upstream, first_row, ACC, BLOCK_B, BLOCK_PARTS)
        dlogits = _logit_gradients(upstream, dot, first_row, first_column, ACC, BLOCK_B, BLOCK_V)
        offs_b = first_row + tl.arange(0, BLOCK_B)
        h = load_tile(h_ptr, offs_b, offs_b < B, offs_n, mask_n, stride_h_b, stride_h_k)
        acc = tl.dot(tl.trans(dlogits).to(h.dtype), h, acc, input_precision=PRECISION, out_dtype=ACC)
    offs_v = first_column + tl.arange(0, BLOCK_V)
    offsets = (part.to(tl.int64) * V + offs_v)[:, None] * H + offs_n[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(offs_v < V)[:, None] & mask_n[None, :])


@triton.jit
def _input_gradient_tile(
    tile, out_ptr, weight_ptr, H, part_v, stride_weight_v, stride_weight_k, upstream, B, V,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_B, BLOCK_N] tile of dlogits W, summed over part_v columns."""
    tiles_n = tl.cdiv(H, BLOCK_N)
    tiles = tl.cdiv(B, BLOCK_B) * tiles_n
    part = tile // tiles
    first_row = tile % tiles // tiles_n * BLOCK_B
    offs_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < H
    dot = _row_dots(upstream, first_row, ACC, BLOCK_B, BLOCK_PARTS)
    acc = tl.zeros((BLOCK_B, BLOCK_N), ACC)
    for first_column in range(part * part_v, tl.minimum(part * part_v + part_v, V), BLOCK_V):
        dlogits = _logit_gradients(upstream, dot, first_row, first_column, ACC, BLOCK_B, BLOCK_V)
        offs_v = first_column + tl.arange(0, BLOCK_V)
        w = load_tile(weight_ptr, offs_v, offs_v < V, offs_n, mask_n, stride_weight_v, stride_weight_k)
        acc = tl.dot(dlogits.to(w.dtype), w, acc, input_precision=PRECISION, out_dtype=ACC)
    offs_b = first_row + tl.arange(0, BLOCK_B)
    offsets = (part.to(tl.int64) * B + offs_b)[:, None] * H + offs_n[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(offs_b < B)[:, None] & mask_n[None, :])


@triton.jit
def _bias_gradient_slice(
    tile, out_ptr, part_b, upstream, B, V,
    ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """BLOCK_V entries of db, summed over part_b rows."""
    tiles = tl.cdiv(V, BLOCK_V)
    part = tile // tiles
    first_column = tile % tiles * BLOCK_V
    db = tl.zeros((BLOCK_V,), ACC)
    for first_row in range(part * part_b, tl.minimum(part * part_b + part_b, B), BLOCK_B):
        dot = _row_dots(upstream, first_row, ACC, BLOCK_B, BLOCK_PARTS)
        db += tl.sum(_logit_gradients(upstream, dot, first_row, first_column, ACC, BLOCK_B, BLOCK_V), axis=0)
    offs_v = first_column + tl.arange(0, BLOCK_V)
    tl.store(out_ptr + part.to(tl.int64) * V + offs_v, db.to(out_ptr.dtype.element_ty), mask=offs_v < V)


@triton.jit(do_not_specialize=["B", "parts_dot", "part_b", "part_v"])
def _readout_backward_kernel(
    # pointers: what arrives and what was saved
    dy_ptr,  # [B, V]
    y_ptr,  # [B, V], contiguous
    dots_ptr,  # [B, parts_dot], summing to sum_v dY * Y
    h_ptr,  # [B, H]
    weight_ptr,  # [V, H]
    # pointers: the gradients, each contiguous, or None when not asked for
    dh_ptr,  # [parts of V, B, H]
    dweight_ptr,  # [parts of B, V, H]
    dbias_ptr,  # [parts of B, V]
    # sizes
    B, H, V, parts_dot, part_b, part_v,  # rows and columns per part
    # strides
    stride_dy_b, stride_dy_v, stride_h_b, stride_h_k, stride_weight_v, stride_weight_k,
    # meta-parameters
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """The gradients, or parts of their sums. The grid holds, in this order, tiles of dW, tiles of dh, slices of db."""
    upstream = (dy_ptr, y_ptr, dots_ptr, parts_dot, B, V, stride_dy_b, stride_dy_v)
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_v = tl.cdiv(V, BLOCK_V)
    tiles_n = tl.cdiv(H, BLOCK_N)
    parts_b = tl.maximum(tl.cdiv(B, part_b), 1)
    parts_v = tl.maximum(tl.cdiv(V, part_v), 1)
    tile = tl.program_id(0)
    if dweight_ptr is not None:
        tiles = parts_b * tiles_v * tiles_n
        if (tile >= 0) & (tile < tiles):
            _weight_gradient_tile(tile, dweight_ptr, h_ptr, H, part_b, stride_h_b, stride_h_k, upstream, B, V,
                                  ACC, PRECISION, BLOCK_B, BLOCK_V, BLOCK_N, BLOCK_PARTS)  # fmt: skip
        tile -= tiles
    if dh_ptr is not None:
        tiles = parts_v * tiles_b * tiles_n
        if (tile >= 0) & (tile < tiles):
            _input_gradient_tile(tile, dh_ptr, weight_ptr, H, part_v, stride_weight_v, stride_weight_k, upstream, B, V,
                                 ACC, PRECISION, BLOCK_B, BLOCK_V, BLOCK_N, BLOCK_PARTS)  # fmt: skip
        tile -= tiles
    if dbias_ptr is not None:
        if (tile >= 0) & (tile < parts_b * tiles_v):
            _bias_gradient_slice(tile, dbias_ptr, part_b, upstream, B, V, ACC, BLOCK_B, BLOCK_V, BLOCK_PARTS)


@triton.jit
def _sum_of_parts(
    block, parts_ptr, out_ptr, parts, size, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements of the sum of [parts, size] over parts."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), ACC)
    for first in range(0, parts, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        total += tl.sum(load_tile(parts_ptr, offs_p, offs_p < parts, offs, mask, size, 1), axis=0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size_h", "parts_b", "parts_v"])
def _readout_sum_parts_kernel(
    # pointers: each pair None where there is nothing to add
    dh_parts_ptr,  # [parts_v, size_h]
    dweight_parts_ptr,  # [parts_b, size_weight]
    dbias_parts_ptr,  # [parts_b, V]
    dh_ptr,  # [size_h] out
    dweight_ptr,  # [size_weight] out
    dbias_ptr,  # [V] out
    # sizes
    size_h, size_weight, V, parts_b, parts_v,
    # meta-parameters
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the parts of dh, dW and db; the grid holds the blocks of each in this order."""
    block = tl.program_id(0)
    if dh_ptr is not None:
        blocks = tl.cdiv(size_h, BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_of_parts(block, dh_parts_ptr, dh_ptr, parts_v, size_h, ACC, BLOCK_P, BLOCK)
        block -= blocks
    if dweight_ptr is not None:
        blocks = tl.cdiv(size_weight, BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_of_parts(block, dweight_parts_ptr, dweight_ptr, parts_b, size_weight, ACC, BLOCK_P, BLOCK)
        block -= blocks
    if dbias_ptr is not None:
        if (block >= 0) & (block < tl.cdiv(V, BLOCK)):
            _sum_of_parts(block, dbias_parts_ptr, dbias_ptr, parts_b, V, ACC, BLOCK_P, BLOCK)


_dots = Launcher(_readout_row_dots_kernel)
_backward = Launcher(_readout_backward_kernel)
_sum_parts = Launcher(_readout_sum_parts_kernel)


def softmax_readout_backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
    *,
    precision: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Launch the backward kernels: two, and a third where sums are divided into parts.

    Args:
        dy: [B, V], the gradient of y, any strides; y: [B, V], what `softmax_readout_forward` returned; h, weight: what
            it was given.
        needs: which of dh, dW, db to compute.
        precision: as in `softmax_readout_forward`.

    Returns:
        (dh [B, H], dW [V, H], db [V]), None where not needed.
    """
    B, H = h.shape
    V = weight.shape[0]
    shapes = ((B, H), (V, H), (V,))
    grads = tuple(torch.empty(s, dtype=h.dtype, device=h.device) if n else None for s, n in zip(shapes, needs))
    precision = matmul_precision(h.dtype, precision)
    multiprocessors = multiprocessor_count(h.device)
    config = readout_backward_config(B, h.dtype, precision)
    acc = accumulator(h.dtype)
    tiles_b, tiles_v, tiles_n = (
        cdiv(size, block) for size, block in ((B, config.block_b), (V, config.block_v), (H, config.block_n))
    )
    needs_h, needs_weight, needs_bias = needs
    part_b = config.block_b * steps_per_part(tiles_v * tiles_n if needs_weight else tiles_v, tiles_b, multiprocessors)
    part_v = config.block_v * steps_per_part(tiles_b * tiles_n, tiles_v, multiprocessors)
    # An empty sum has one part all the same: someone has to write its zeros.
    parts_b, parts_v = max(cdiv(B, part_b), 1), max(cdiv(V, part_v), 1)
    grid = (
        needs_weight * parts_b * tiles_v * tiles_n
        + needs_h * parts_v * tiles_b * tiles_n
        + needs_bias * parts_b * tiles_v
    )
    if grid == 0:
        return grads
    summed = torch.float64 if acc == tl.float64 else torch.float32
    parts = tuple(
        None if g is None or n == 1 else torch.empty((n, *g.shape), dtype=summed, device=h.device)
        for g, n in zip(grads, (parts_v, parts_b, parts_b))
    )

    dots_config = readout_row_dots_config()
    part_dot = dots_config.block_v * steps_per_part(B, cdiv(V, dots_config.block_v), multiprocessors, 1)
    parts_dot = cdiv(V, part_dot)
    dots = torch.empty((B, parts_dot), dtype=summed, device=h.device)
    if dots.numel():
        _dots(
            (B * parts_dot, 1, 1),
            (dy, y, dots),
            (B, V, part_dot, *dy.stride()),
            (acc, dots_config.block_v),
            dots_config,
        )
    _backward(
        (grid, 1, 1),
        (dy, y, dots, h, weight, *(g if p is None else p for g, p in zip(grads, parts))),
        (B, H, V, parts_dot, part_b, part_v, *dy.stride(), *h.stride(), *weight.stride()),
        (acc, precision, config.block_b, config.block_v, config.block_n, config.block_parts),
        config,
    )
    if any(p is not None for p in parts):
        divided = tuple(None if p is None else g for g, p in zip(grads, parts))
        sum_config = readout_sum_parts_config()
        _sum_parts(
            (sum(cdiv(g.numel(), sum_config.block) for g in divided if g is not None), 1, 1),
            (*parts, *divided),
            (B * H, V * H, V, parts_b, parts_v),
            (acc, sum_config.block_parts, sum_config.block),
            sum_config,
        )
    return grads
