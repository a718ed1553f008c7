"""Tiles of matrices in memory, of any strides: loading and storing one, and multiplying a row of them with a column of them."""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, rows, mask_rows, columns, mask_columns, stride_row, stride_column):
    """The entries at rows x columns of a matrix, 0 where a mask is False. Offsets are of 64 bits."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + offsets, mask=mask_rows[:, None] & mask_columns[None, :], other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, mask_rows, columns, mask_columns, stride_row):
    """Store at rows x columns of a matrix, whose columns are adjacent, in its dtype. Offsets are of 64 bits."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask_rows[:, None] & mask_columns[None, :])


@triton.jit
def add_projection(
    acc,  # [BLOCK_B, n]
    a_ptr,  # [B, K]
    w_ptr,  # [N, K]
    offs_b,
    mask_b,
    rows,
    mask_rows,
    K,
    stride_a_b,
    stride_a_k,
    stride_w_row,
    stride_w_k,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + a W^T for one tile of rows of a and one of rows of W."""
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_b.to(tl.int64)[:, None] * stride_a_b + offs_k.to(tl.int64)[None, :] * stride_a_k
    w_ptrs = w_ptr + rows.to(tl.int64)[None, :] * stride_w_row + offs_k.to(tl.int64)[:, None] * stride_w_k
    # A stride of 1 is a Python number here, for which there is tl.cast.
    a_step, w_step = tl.cast(stride_a_k, tl.int64) * BLOCK_K, tl.cast(stride_w_k, tl.int64) * BLOCK_K
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        a = tl.load(a_ptrs, mask=mask_b[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_rows[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        a_ptrs += a_step
        w_ptrs += w_step
    return acc
