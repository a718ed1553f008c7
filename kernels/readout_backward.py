"""The backward of the readout Y = softmax(h W^T + b), in two launches, or three where sums are divided among programs.

    dlogits = Y * (dY - sum_v dY * Y)    dh = dlogits W    dW = dlogits^T h    db = sum_b dlogits

The first launch computes the sums over v. In the second, programs of three kinds share the grid: tiles of dW, tiles of
dh and slices of db. Each computes the dlogits it needs from Y and dY, so dlogits is never in memory. Where the tiles are
too few to fill the GPU, the sum over b of a tile of dW or db, or the sum over v of a tile of dh, is divided into
parts, and the third launch adds these. Every sum has a fixed order, so two runs agree bit for bit.
"""

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv, readout_backward_config, steps_per_part
from .device import matmul_precision, multiprocessor_count
from .inputs import ReadoutGradients, ReadoutInputs, ReadoutOptions, ReadoutSaved
from .launch import Launcher, accumulator, accumulator_dtype
from .readout_sums import row_dots, sum_parts
from .tiles import load_tile, store_tile


@triton.jit
def _row_dots(upstream, first_row, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Return sum_v dY * Y of BLOCK_B rows, from its parts; 0 past B."""
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
    first_row,
    first_column,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return dlogits [BLOCK_B, BLOCK_V]; 0 past B, and 0 past V in rows that are finite."""
    dy_ptr, y_ptr, _, _, B, V, stride_dy_b, stride_dy_v = upstream
    offs_b = first_row + tl.arange(0, BLOCK_B)
    offs_v = first_column + tl.arange(0, BLOCK_V)
    dy = load_tile(dy_ptr, offs_b, offs_b < B, offs_v, offs_v < V, stride_dy_b, stride_dy_v).to(ACC)
    y = load_tile(y_ptr, offs_b, offs_b < B, offs_v, offs_v < V, V, 1).to(ACC)
    return y * (dy - dot[:, None])


@triton.jit
def _weight_gradient_tile(
    tile,
    out_ptr,
    factor,  # (h, H, its strides)
    part_b,
    upstream,
    B,
    V,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Compute one [BLOCK_V, BLOCK_N] tile of dlogits^T h, summed over part_b rows."""
    h_ptr, H, stride_h_b, stride_h_k = factor
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
    store_tile(out_ptr, acc, part.to(tl.int64) * V + offs_v, offs_v < V, offs_n, mask_n, H)


@triton.jit
def _input_gradient_tile(
    tile,
    out_ptr,
    factor,  # (W, H, its strides)
    part_v,
    upstream,
    B,
    V,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Compute one [BLOCK_B, BLOCK_N] tile of dlogits W, summed over part_v columns."""
    weight_ptr, H, stride_weight_v, stride_weight_k = factor
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
    store_tile(out_ptr, acc, part.to(tl.int64) * B + offs_b, offs_b < B, offs_n, mask_n, H)


@triton.jit
def _bias_gradient_slice(
    tile,
    out_ptr,
    part_b,
    upstream,
    B,
    V,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Compute BLOCK_V entries of db, summed over part_b rows."""
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
    # pointers: incoming gradient, inputs and saved tensors
    dy_ptr,  # [B, V]
    y_ptr,  # [B, V], contiguous
    dots_ptr,  # [B, parts_dot], summing to sum_v dY * Y
    h_ptr,  # [B, H]
    weight_ptr,  # [V, H]
    # pointers: gradients out, each contiguous, or None where not needed
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
    """Compute the gradients, or parts of their sums. The grid holds, in this order, tiles of dW, tiles of dh, slices of db."""
    upstream = (dy_ptr, y_ptr, dots_ptr, parts_dot, B, V, stride_dy_b, stride_dy_v)
    h, weight = (h_ptr, H, stride_h_b, stride_h_k), (weight_ptr, H, stride_weight_v, stride_weight_k)
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_v = tl.cdiv(V, BLOCK_V)
    tiles_n = tl.cdiv(H, BLOCK_N)
    parts_b = tl.maximum(tl.cdiv(B, part_b), 1)
    parts_v = tl.maximum(tl.cdiv(V, part_v), 1)
    tile = tl.program_id(0)
    if dweight_ptr is not None:
        tiles = parts_b * tiles_v * tiles_n
        if (tile >= 0) & (tile < tiles):
            _weight_gradient_tile(
                tile, dweight_ptr, h, part_b, upstream, B, V, ACC, PRECISION, BLOCK_B, BLOCK_V, BLOCK_N, BLOCK_PARTS
            )
        tile -= tiles
    if dh_ptr is not None:
        tiles = parts_v * tiles_b * tiles_n
        if (tile >= 0) & (tile < tiles):
            _input_gradient_tile(
                tile, dh_ptr, weight, part_v, upstream, B, V, ACC, PRECISION, BLOCK_B, BLOCK_V, BLOCK_N, BLOCK_PARTS
            )
        tile -= tiles
    if dbias_ptr is not None:
        if (tile >= 0) & (tile < parts_b * tiles_v):
            _bias_gradient_slice(tile, dbias_ptr, part_b, upstream, B, V, ACC, BLOCK_B, BLOCK_V, BLOCK_PARTS)


_backward = Launcher(_readout_backward_kernel)


def softmax_readout_backward(
    grads: ReadoutGradients,
    inputs: ReadoutInputs,
    saved: ReadoutSaved,
    needs: Collection[str],
    options: ReadoutOptions,
) -> dict[str, Tensor]:
    """Launch the backward kernels: two, and a third where sums are divided into parts.

    Args:
        grads: dy [B, V], of any strides.
        inputs, options: those of `softmax_readout_forward`. saved: its outputs.
        needs: the names of the inputs whose gradients are computed.

    Returns:
        These gradients by name, contiguous.
    """
    (dy,), (h, weight, _) = grads, inputs
    y = saved.y.contiguous()  # a hook on saved tensors may return any strides
    (B, H), V = h.shape, weight.shape[0]
    found = {
        name: torch.empty(t.shape, dtype=h.dtype, device=h.device)
        for name, t in zip(ReadoutInputs._fields, inputs)
        if name in needs and t is not None
    }
    precision = matmul_precision(h.dtype, options.precision)
    multiprocessors = multiprocessor_count(h.device)
    config = readout_backward_config(B, h.dtype, precision)
    acc, summed = accumulator(h.dtype), accumulator_dtype(h.dtype)
    tiles_b, tiles_v, tiles_n = cdiv(B, config.block_b), cdiv(V, config.block_v), cdiv(H, config.block_n)
    tiles_weight = tiles_v * tiles_n if "weight" in found else tiles_v
    part_b = config.block_b * steps_per_part(tiles_weight, tiles_b, multiprocessors)
    part_v = config.block_v * steps_per_part(tiles_b * tiles_n, tiles_v, multiprocessors)
    # An empty sum has one part too, because a program has to write its zeros.
    parts_b, parts_v = max(cdiv(B, part_b), 1), max(cdiv(V, part_v), 1)
    grid = (
        ("weight" in found) * parts_b * tiles_v * tiles_n
        + ("h" in found) * parts_v * tiles_b * tiles_n
        + ("bias" in found) * parts_b * tiles_v
    )
    if grid == 0:
        return found
    n_parts = {"h": parts_v, "weight": parts_b, "bias": parts_b}
    parts = {
        name: torch.empty((n_parts[name], *g.shape), dtype=summed, device=h.device)
        for name, g in found.items()
        if n_parts[name] > 1
    }

    dots = row_dots(dy, y)
    arguments = dict(dy_ptr=dy, y_ptr=y, dots_ptr=dots, h_ptr=h, weight_ptr=weight)
    outputs = {f"d{name}_ptr": (found | parts).get(name) for name in ReadoutInputs._fields}
    sizes = dict(B=B, H=H, V=V, parts_dot=dots.shape[1], part_b=part_b, part_v=part_v)
    _backward((grid, 1, 1), config, arguments | outputs | sizes | dict(ACC=acc, PRECISION=precision))
    if parts:
        sum_parts(parts, {name: found[name] for name in parts})
    return found
