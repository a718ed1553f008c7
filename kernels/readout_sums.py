"""The sums of the readout's backward: one launch before its matrix products and one after them (see readout_backward)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LaunchConfig, cdiv, steps_per_part
from .device import multiprocessor_count
from .launch import Launcher, accumulator, accumulator_dtype
from .tiles import load_tile

_CONFIG = LaunchConfig(num_warps=4, num_stages=1)
_BLOCK_V = 1024  # columns of a row a step
_BLOCK, _BLOCK_PARTS = 128, 16  # elements of a sum, and its parts a step


@triton.jit(do_not_specialize=["part_v"])
def _readout_row_dots_kernel(
    # pointers
    dy_ptr,  # [B, V]
    y_ptr,  # [B, V], contiguous
    dots_ptr,  # [B, parts] out
    # sizes
    V,
    part_v,  # columns per part, a multiple of BLOCK_V
    # strides
    stride_dy_b,
    stride_dy_v,
    # meta-parameters
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute sum_v dY * Y over part_v columns of one row."""
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


_dots = Launcher(_readout_row_dots_kernel)


def row_dots(dy: Tensor, y: Tensor) -> Tensor:
    """Return [B, parts], the sums of dY * Y over parts of V, of dy [B, V] of any strides and y [B, V], contiguous."""
    B, V = dy.shape
    part_v = _BLOCK_V * steps_per_part(B, cdiv(V, _BLOCK_V), multiprocessor_count(dy.device), 1)
    dots = torch.empty((B, cdiv(V, part_v)), dtype=accumulator_dtype(y.dtype), device=y.device)
    if dots.numel():
        arguments = dict(dy_ptr=dy, y_ptr=y, dots_ptr=dots, V=V, part_v=part_v)
        _dots((dots.numel(), 1, 1), _CONFIG, arguments | dict(ACC=accumulator(y.dtype), BLOCK_V=_BLOCK_V))
    return dots


@triton.jit
def _sum_of_parts(
    block, parts_ptr, out_ptr, parts, size, ACC: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute BLOCK elements of the sum of [parts, size] over parts."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), ACC)
    for first in range(0, parts, BLOCK_PARTS):
        offs_p = first + tl.arange(0, BLOCK_PARTS)
        total += tl.sum(load_tile(parts_ptr, offs_p, offs_p < parts, offs, mask, size, 1), axis=0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size_h", "parts_b", "parts_v"])
def _readout_sum_parts_kernel(
    # pointers: both of a pair are None where there is nothing to add
    dh_parts_ptr,  # [parts_v, size_h]
    dweight_parts_ptr,  # [parts_b, size_weight]
    dbias_parts_ptr,  # [parts_b, V]
    dh_ptr,  # [size_h] out
    dweight_ptr,  # [size_weight] out
    dbias_ptr,  # [V] out
    # sizes
    size_h,
    size_weight,
    V,
    parts_b,
    parts_v,
    # meta-parameters
    ACC: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of dh, dW and db; the grid holds the blocks of each in this order."""
    block = tl.program_id(0)
    if dh_ptr is not None:
        blocks = tl.cdiv(size_h, BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_of_parts(block, dh_parts_ptr, dh_ptr, parts_v, size_h, ACC, BLOCK_PARTS, BLOCK)
        block -= blocks
    if dweight_ptr is not None:
        blocks = tl.cdiv(size_weight, BLOCK)
        if (block >= 0) & (block < blocks):
            _sum_of_parts(block, dweight_parts_ptr, dweight_ptr, parts_b, size_weight, ACC, BLOCK_PARTS, BLOCK)
        block -= blocks
    if dbias_ptr is not None:
        if (block >= 0) & (block < tl.cdiv(V, BLOCK)):
            _sum_of_parts(block, dbias_parts_ptr, dbias_ptr, parts_b, V, ACC, BLOCK_PARTS, BLOCK)


_sum_parts = Launcher(_readout_sum_parts_kernel)


def sum_parts(parts: dict[str, Tensor], out: dict[str, Tensor]) -> None:
    """Sum parts[name] [parts, ...] into out[name], for those of "h", "weight" and "bias" that are there."""
    sizes = {name: out[name].numel() if name in out else 0 for name in ("h", "weight", "bias")}
    parts_b = max((len(parts[name]) for name in ("weight", "bias") if name in parts), default=1)
    arguments: dict[str, Any] = {f"d{name}_parts_ptr": parts.get(name) for name in sizes}
    arguments |= {f"d{name}_ptr": out.get(name) for name in sizes}
    arguments |= dict(size_h=sizes["h"], size_weight=sizes["weight"], V=sizes["bias"])
    arguments |= dict(parts_b=parts_b, parts_v=len(parts["h"]) if "h" in parts else 1)
    arguments |= dict(ACC=accumulator(next(iter(out.values())).dtype), BLOCK=_BLOCK, BLOCK_PARTS=_BLOCK_PARTS)
    _sum_parts((sum(cdiv(size, _BLOCK) for size in sizes.values()), 1, 1), _CONFIG, arguments)
