"""Load and store tiles of matrices of any strides, multiply a row of tiles by a column, number the tiles of two products."""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, rows, mask_rows, columns, mask_columns, stride_row, stride_column):
    """Load the entries at rows x columns of a matrix, 0 where a mask is False. Offsets have 64 bits."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + offsets, mask=mask_rows[:, None] & mask_columns[None, :], other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, mask_rows, columns, mask_columns, stride_row):
    """Store a tile at rows x columns of a matrix with adjacent columns, rounded to its dtype. Offsets have 64 bits."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask_rows[:, None] & mask_columns[None, :])


@triton.jit
def add_projections(
    acc,  # [BLOCK_B, n]
    offs_b,
    mask_b,
    rows,
    mask_rows,
    first,  # (a [B, K], W [N, K], K, strides of a, strides of W)
    second,  # the same for another a, W and K, or None
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return acc + a W^T of the first and of the second product, for a tile of rows of a and a tile of rows of W.

    One loop computes both, so that the loads of the second product begin during the first.
    """
    steps_of_first = tl.cdiv(first[2], BLOCK_K)
    steps = steps_of_first
    if second is not None:
        steps += tl.cdiv(second[2], BLOCK_K)
    offs_k = tl.arange(0, BLOCK_K)
    for step in range(steps):
        a_ptr, w_ptr, K, stride_a_b, stride_a_k, stride_w_row, stride_w_k = first
        if second is not None:
            turned = step >= steps_of_first
            a_ptr_2, w_ptr_2, K_2, stride_a_b_2, stride_a_k_2, stride_w_row_2, stride_w_k_2 = second
            a_ptr, w_ptr = tl.where(turned, a_ptr_2, a_ptr), tl.where(turned, w_ptr_2, w_ptr)
            K = tl.where(turned, K_2, K)
            stride_a_b = tl.where(turned, stride_a_b_2, stride_a_b)
            stride_a_k = tl.where(turned, stride_a_k_2, stride_a_k)
            stride_w_row = tl.where(turned, stride_w_row_2, stride_w_row)
            stride_w_k = tl.where(turned, stride_w_k_2, stride_w_k)
            step -= tl.where(turned, steps_of_first, 0)
        k = step * BLOCK_K
        mask_k = offs_k < K - k
        a_ptr += tl.cast(k, tl.int64) * stride_a_k
        w_ptr += tl.cast(k, tl.int64) * stride_w_k
        a = load_tile(a_ptr, offs_b, mask_b, offs_k, mask_k, stride_a_b, stride_a_k)
        w = load_tile(w_ptr, offs_k, mask_k, rows, mask_rows, stride_w_k, stride_w_row)
        acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def count_tiles(first, second, BLOCK_N: tl.constexpr):
    """Return how many tiles of columns two products side by side have; each is (out or None, factor, N, factor's strides)."""
    tiles = 0
    if first[0] is not None:
        tiles += tl.cdiv(first[2], BLOCK_N)
    if second[0] is not None:
        tiles += tl.cdiv(second[2], BLOCK_N)
    return tiles


@triton.jit
def choose_tile(tile, first, second, BLOCK_N: tl.constexpr):
    """Return which of the two a tile of columns belongs to, and its first column there.

    tl.where selects it, because code for each of the two would take twice as long to compile.
    """
    if first[0] is None:
        chosen = second
    elif second[0] is None:
        chosen = first
    else:
        out_1, factor_1, N_1, stride_row_1, stride_n_1 = first
        out_2, factor_2, N_2, stride_row_2, stride_n_2 = second
        is_1 = tile < tl.cdiv(N_1, BLOCK_N)
        out, factor, N = tl.where(is_1, out_1, out_2), tl.where(is_1, factor_1, factor_2), tl.where(is_1, N_1, N_2)
        stride_row, stride_n = tl.where(is_1, stride_row_1, stride_row_2), tl.where(is_1, stride_n_1, stride_n_2)
        chosen = out, factor, N, stride_row, stride_n
        tile = tl.where(is_1, tile, tile - tl.cdiv(N_1, BLOCK_N))
    return chosen, tile * BLOCK_N
