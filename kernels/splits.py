"""A product whose inner dimension is split among the warps of a program, for tiles of few rows and columns.

Each warp reads only its own part of both operands, so its chain of sums is SPLIT_K times shorter. At the end the partial sums
of all warps are added up. A chunk is [SPLIT_K, BLOCK_K] of the inner dimension: BLOCK_K for each warp.
"""

import triton
import triton.language as tl

from .fragments import load_fragments, on_cuda_cores
from .interleave import joined, log2


@triton.jit
def chunk_offsets(chunk, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the indices [SPLIT_K, BLOCK_K] of a chunk in the inner dimension."""
    splits = chunk * SPLIT_K + tl.arange(0, SPLIT_K)
    return splits[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def load_rows_chunk(rows, exists, chunk, N: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a chunk [SPLIT_K, rows, BLOCK_K] of rows of N elements; 0 past their end, and where `exists` is False."""
    n = chunk_offsets(chunk, SPLIT_K, BLOCK_K)
    return tl.load(rows[None, :, None] + n[:, None, :], mask=(n < N)[:, None, :] & exists, other=0.0)


@triton.jit
def product_of_rows(
    rows, exists, weights, N: tl.constexpr, IN_FLIGHT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """Return [rows, columns], the product of rows of N elements in memory and weights.

    rows, exists: as for `load_rows_chunk`. weights: a tuple of chunks [SPLIT_K, BLOCK_K, columns].
    """
    CHUNKS: tl.constexpr = len(weights)
    SPLIT_K: tl.constexpr = weights[0].shape[0]
    BLOCK_K: tl.constexpr = weights[0].shape[1]
    BLOCK_B: tl.constexpr = rows.shape[0]
    COLUMNS: tl.constexpr = weights[0].shape[2]
    parts = tl.zeros((SPLIT_K, BLOCK_B, COLUMNS), ACC)
    for first in tl.static_range(0, CHUNKS, IN_FLIGHT):
        # Issue all loads before using the first, so that they share one L2 round trip.
        state = ()
        for k in tl.static_range(IN_FLIGHT):
            if first + k < CHUNKS:
                loaded = load_rows_chunk(rows, exists, first + k, N, SPLIT_K, BLOCK_K)
                state = state + (loaded,)  # type: ignore[assignment]
        for k in tl.static_range(IN_FLIGHT):
            if first + k < CHUNKS:
                parts = tl.dot(state[k], weights[first + k], parts, input_precision=PRECISION, out_dtype=ACC)
    return sum_of_splits(parts, SPLIT_K, BLOCK_B, COLUMNS)


@triton.jit
def product_of_arriving_rows(
    rows,
    waits,
    stall_ptr,
    weights,
    N: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return `product_of_rows` for rows that other programs are still storing (`load_fragments`); weights are in registers."""
    FULL: tl.constexpr = on_cuda_cores(rows[0].dtype.element_ty, PRECISION)
    CHUNKS: tl.constexpr = len(weights)
    SPLIT_K: tl.constexpr = rows[0].shape[0]
    BLOCK_B: tl.constexpr = 8 * len(rows)
    COLUMNS: tl.constexpr = len(weights[0]) // 4 if FULL else weights[0].shape[1]
    parts = () if FULL else tl.zeros((SPLIT_K, COLUMNS, BLOCK_B), ACC)
    for first in tl.static_range(0, CHUNKS, IN_FLIGHT):
        state = load_fragments(
            rows,
            waits,
            first,
            stall_ptr,
            N,
            IN_FLIGHT if first + IN_FLIGHT <= CHUNKS else CHUNKS - first,
            FULL,
        )
        for k in tl.static_range(len(state)):
            if FULL:
                parts = _full_products(parts, weights[first + k], state[k])
            else:
                parts = tl.dot(weights[first + k], state[k], parts, input_precision=PRECISION, out_dtype=ACC)
    if FULL:
        # On CUDA cores each warp has four partial sums of every result, in four threads.
        parts = tl.reshape(joined(parts), (SPLIT_K, 8, 4, COLUMNS, BLOCK_B // 8))
        parts = tl.reshape(tl.permute(parts, (0, 2, 3, 4, 1)), (4 * SPLIT_K, COLUMNS, BLOCK_B))
    return tl.trans(sum_of_splits(parts, parts.shape[0], COLUMNS, BLOCK_B))  # type: ignore[union-attr]


@triton.jit
def _full_products(parts, weights, state):
    """Return parts plus the products of one chunk. parts: a tensor for each column and each eight rows, or () for zeros."""
    for k in tl.static_range(4):
        sums = ()
        for column in tl.static_range(len(weights) // 4):
            for row in tl.static_range(len(state) // 4):
                w, s = weights[4 * column + k], state[4 * row + k]
                sums = sums + (  # type: ignore[assignment]
                    w * s if len(parts) == 0 else tl.fma(w, s, parts[column * (len(state) // 4) + row]),
                )
        parts = sums
    return parts


@triton.jit
def sum_of_splits(parts, SPLIT_K: tl.constexpr, BLOCK_B: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum [SPLIT_K, BLOCK_B, COLUMNS] over the splits: [BLOCK_B, COLUMNS], each entry in one thread.

    The partial sums of an entry, one in each warp, move to one thread, which adds them in pairs. tl.sum would leave the result
    in every warp, and each warp would then compute all units.
    """
    rest = tl.permute(parts, (1, 2, 0))
    for halving in tl.static_range(1, log2(SPLIT_K) + 1):
        a, b = tl.split(tl.reshape(rest, (BLOCK_B, COLUMNS, SPLIT_K >> halving, 2)))
        rest = a + b
    return tl.reshape(rest, (BLOCK_B, COLUMNS))
