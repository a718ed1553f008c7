"""Four gates in one tile: the order in which BLOCK_H hidden units with four gates each are 4 * BLOCK_H rows or columns.

There are two orders of the 4 * BLOCK_H entries n of a tile:

*Fragment order*, for operands and results of matrix products: n = 16 * block + 8 * hi + 2 * lane + lo is unit 4 * block + lane,
gate 2 * hi + lo. In a tensor-core accumulator one thread holds columns 2 * lane and 2 * lane + 1 of each group of eight, hence
all four gates of a unit, and `split_gates` moves no data between threads.

*Memory order*, for pre-activations and saved gates, [..., H, 4] in memory: n = 4 * unit + gate. One access of 8 or 16 bytes
takes all four gates of a unit.
"""

import triton
import triton.language as tl

from .interleave import deinterleave, interleave


@triton.jit
def gate_rows(first_unit, H, BLOCK_H: tl.constexpr):
    """Return the rows of a [4H, ...] weight for the units first_unit ... first_unit + BLOCK_H - 1, in fragment order.

    Returns rows [4 * BLOCK_H] and their mask (False for units past H). BLOCK_H is a multiple of 4.
    """
    n = tl.arange(0, 4 * BLOCK_H)
    unit = first_unit + (n // 16) * 4 + (n // 2) % 4
    gate = ((n // 8) % 2) * 2 + n % 2
    return gate * H + unit, unit < H


@triton.jit
def split_gates(tile, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Split [BLOCK_B, 4 * BLOCK_H] in fragment order into four [BLOCK_B, BLOCK_H] tiles i, f, g, o."""
    tile = tl.reshape(tile, (BLOCK_B, BLOCK_H // 4, 2, 4, 2))
    tile = tl.permute(tile, (0, 1, 3, 2, 4))
    return deinterleave(tl.reshape(tile, (BLOCK_B, 4 * BLOCK_H)), 4)


@triton.jit
def join_gates(i, f, g, o, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Join four [BLOCK_B, BLOCK_H] tiles into [BLOCK_B, 4 * BLOCK_H] in fragment order."""
    tile = tl.reshape(interleave((i, f, g, o)), (BLOCK_B, BLOCK_H // 4, 4, 2, 2))
    tile = tl.permute(tile, (0, 1, 3, 2, 4))
    return tl.reshape(tile, (BLOCK_B, 4 * BLOCK_H))


@triton.jit
def load_gates(ptr, rows, mask_rows, first_unit, H, BLOCK_H: tl.constexpr, ALL_UNITS: tl.constexpr = False):
    """Load i, f, g, o of these batch rows from [rows, H, 4] in memory order; entries outside the masks are 0.

    mask_rows None promises that all rows exist. ALL_UNITS, used only without mask_rows, promises that all units do.
    """
    n = first_unit * 4 + tl.arange(0, 4 * BLOCK_H)
    offsets = rows[:, None] * (4 * H) + n[None, :]
    if mask_rows is not None:
        tile = tl.load(ptr + offsets, mask=mask_rows[:, None] & (n < 4 * H)[None, :], other=0.0)
    elif ALL_UNITS:
        tile = tl.load(ptr + offsets)
    else:
        tile = tl.load(ptr + offsets, mask=(n < 4 * H)[None, :], other=0.0)
    return deinterleave(tile, 4)


@triton.jit
def store_gates(
    ptr,
    i,
    f,
    g,
    o,
    rows,
    mask_rows,
    first_unit,
    H,
    BLOCK_H: tl.constexpr,
    ALL_UNITS: tl.constexpr = False,
):
    """Store i, f, g, o of these batch rows to [rows, H, 4] in memory order, rounded to the dtype there.

    ALL_UNITS promises that all units exist.
    """
    n = first_unit * 4 + tl.arange(0, 4 * BLOCK_H)
    tile = interleave((i, f, g, o)).to(ptr.dtype.element_ty)
    if ALL_UNITS:
        tl.store(ptr + rows[:, None] * (4 * H) + n[None, :], tile, mask=mask_rows[:, None])
    else:
        tl.store(ptr + rows[:, None] * (4 * H) + n[None, :], tile, mask=mask_rows[:, None] & (n < 4 * H)[None, :])
