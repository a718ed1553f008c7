"""The operands of the product without a barrier (exchange.py), loaded straight into the registers that multiply them.

The exchanged batch rows are columns of the right operand of the product. For every eight rows, thread `lane` of a warp holds
row lane // 4, and of each 64 bytes of that row the elements with these indices in the inner dimension:

    k = 8 * LO * hi + 2 * LO * (lane % 4) + LO * register + lo    hi, register: 0, 1; LO elements to a word, two of 16 bits

up to Triton 3.8, and 8 * LO * register + 4 * LO * hi + LO * (lane % 4) + lo after it (`adjacent_words`). A product may take the
inner dimension in any order that both operands share. So a thread loads 16 adjacent bytes of each row, and the order is such
that these are the elements it has to hold. It loads W_hh, which stays in registers, in the same order. No data moves between
threads.

CUDA cores multiply full float32. There each thread multiplies the words of a row that it has loaded by the same columns of
every row of W_hh. It holds these weights too, as do the seven threads that load the same columns of other rows.
"""

import triton
import triton.language as tl

from .exchange import load_words, types_of_words
from .interleave import joined

_ADJACENT_WORDS = 2 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 1


@triton.constexpr_function
def adjacent_words():
    """Return how many of the words that a thread holds of a row have adjacent columns.

    Triton chooses this for operands that are joined from parts, and it shows only in the compiled code; any other order costs a
    move for each element.
    """
    return _ADJACENT_WORDS


@triton.constexpr_function
def on_cuda_cores(dtype, precision):
    """Return whether CUDA cores compute the product, and not tensor cores."""
    return dtype == tl.float32 and precision == "ieee"


@triton.jit
def fragment_rows(first_row, SPLIT_K: tl.constexpr, ROWS: tl.constexpr = 8):
    """Return [SPLIT_K, 8, 4], for every thread: its row of the eight from first_row on, or first_row where ROWS is 1."""
    return tl.broadcast_to(first_row + tl.arange(0, ROWS)[None, :, None], (SPLIT_K, 8, 4))


@triton.jit
def rows_of_block(flags, block: tl.constexpr, SPLIT_K: tl.constexpr):
    """Return the flags of eight-row block `block` in the order of `fragment_rows`. flags: one for each batch row."""
    BLOCKS: tl.constexpr = flags.shape[0] // 8
    here = (tl.arange(0, BLOCKS) == block)[:, None]
    eight = tl.sum(tl.where(here, tl.reshape(flags.to(tl.int32), (BLOCKS, 8)), 0), axis=0)
    return tl.broadcast_to(eight[None, :, None], (SPLIT_K, 8, 4)) != 0


@triton.jit
def load_fragments(rows, waits, first, stall_ptr, N: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr):
    """Load CHUNKS right operands [SPLIT_K, BLOCK_K, rows] from chunk `first` on, of rows of N elements that arrive meanwhile.

    rows: for each eight rows, pointers to their beginnings in the order of `fragment_rows`. waits: in the same order, -1 where
    another program stores the row, 0 where it is ready. stall_ptr: `stall.word`, None where no program waits. FULL: for CUDA
    cores, each chunk is a tuple of the four elements of each eight rows that a thread multiplies.
    """
    ROWS: tl.constexpr = len(rows)
    SPLIT_K: tl.constexpr = rows[0].shape[0]
    dtype: tl.constexpr = rows[0].dtype.element_ty
    LO: tl.constexpr = 32 // dtype.primitive_bitwidth
    BLOCK_K: tl.constexpr = 16 * LO
    STRIDE: tl.constexpr = SPLIT_K * BLOCK_K
    columns = tl.arange(0, SPLIT_K)[:, None, None] * BLOCK_K + tl.arange(0, 4)[None, None, :] * (4 * LO)
    columns = tl.broadcast_to(columns, (SPLIT_K, 8, 4)) + first * STRIDE
    starts = [row + columns for row in rows]
    LEFT_BEFORE: tl.constexpr = None if (first + CHUNKS) * STRIDE <= N else (CHUNKS - 1) * STRIDE
    words = load_words(starts, waits, N - columns, stall_ptr, STRIDE * (4 // LO), LEFT_BEFORE, CHUNKS)
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        chunks = (
            chunks
            + (  # type: ignore[assignment]
                [word.to(tl.float32, bitcast=True) for word in words[4 * ROWS * chunk : 4 * ROWS * (chunk + 1)]]
                if FULL
                else _right_operand(words, 4 * ROWS * chunk, ROWS, BLOCK_K, dtype),
            )
        )
    return chunks


@triton.jit
def _right_operand(words, first: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr):
    tile = _tile(words, first, ROWS, dtype)
    tile = tl.permute(tile, (0, 5, 2, 4, 6, 3, 1) if adjacent_words() == 2 else (0, 4, 5, 2, 6, 3, 1))
    return tl.reshape(tile, (words[0].shape[0], BLOCK_K, 8 * ROWS))


@triton.constexpr_function
def _weight_loads(itemsize, unit_bytes, gate_bytes):
    """Return PTX that loads four words of weights: adjacent elements, or all gates of one unit or two at these distances."""
    if gate_bytes == itemsize:
        loads = "@exists ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    else:
        places = [unit * unit_bytes + gate * gate_bytes for unit in range(4 // itemsize) for gate in range(4)]
        if itemsize == 4:
            loads = " ".join(f"@exists ld.global.b32 ${k}, [$4 + {at}];" for k, at in enumerate(places))
        else:
            halves = [f"h{k}" for k in range(8)]
            loads = f".reg .b16 {', '.join(halves)}; "
            loads += " ".join(
                f"mov.b16 h{k}, 0; @exists ld.global.b16 h{k}, [$4 + {at}];" for k, at in enumerate(places)
            )
            loads += " ".join(f" mov.b32 ${k}, {{h{2 * k}, h{2 * k + 1}}};" for k in range(4))
    zeros = " ".join(f"mov.b32 ${k}, 0;" for k in range(4))
    return f"{{ .reg .pred exists; setp.gt.s32 exists, $5, 0; {zeros} {loads} }}"


@triton.jit
def load_weight_fragments(
    rows,
    N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    unit: tl.constexpr = 4,
    gate: tl.constexpr = 1,
):
    """Load CHUNKS left operands [SPLIT_K, rows, BLOCK_K] into registers, of rows of N elements.

    rows: for each eight rows, pointers to their beginnings in the order of `fragment_rows`. The elements are adjacent, or
    element 4 * u + g lies unit * u + gate * g further on. FULL: for CUDA cores, rows has one pointer for each row, and each
    chunk is a tuple of the four elements of each row that a thread multiplies.
    """
    LO: tl.constexpr = BLOCK_K // 16
    dtype: tl.constexpr = rows[0].dtype.element_ty
    ITEMSIZE: tl.constexpr = 4 // LO
    columns = tl.arange(0, SPLIT_K)[:, None, None] * BLOCK_K + tl.arange(0, 4)[None, None, :] * (4 * LO)
    columns = tl.broadcast_to(columns, (SPLIT_K, 8, 4))
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        n = columns + chunk * SPLIT_K * BLOCK_K
        at = n if gate == 1 else n // 4 * unit
        words = ()
        for row in tl.static_range(len(rows)):
            if FULL:
                # tl.load fixes a layout. For inline assembly, which has none, the compiler would choose one for each sum.
                for k in tl.static_range(4):
                    word = tl.load(rows[row] + at + k * gate, mask=n < N, other=0.0)
                    words = words + (word,)  # type: ignore[assignment]
            else:
                words = words + tl.inline_asm_elementwise(
                    _weight_loads(ITEMSIZE, unit * ITEMSIZE, gate * ITEMSIZE),
                    "=&r,=&r,=&r,=&r,l,r",
                    ((rows[row] + at).to(tl.int64), N - n),
                    dtype=types_of_words(4),
                    is_pure=True,
                    pack=1,
                )
        chunks = chunks + (  # type: ignore[assignment]
            words if FULL else _left_operand(words, len(rows), BLOCK_K, dtype),
        )
    return chunks


@triton.jit
def _left_operand(words, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr):
    tile = _tile(words, 0, ROWS, dtype)
    tile = tl.permute(tile, (0, 3, 1, 5, 2, 4, 6) if adjacent_words() == 2 else (0, 3, 1, 4, 5, 2, 6))
    return tl.reshape(tile, (words[0].shape[0], 8 * ROWS, BLOCK_K))


@triton.jit
def _tile(words, first: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr):
    """Return elements [SPLIT_K, 8, 4, ROWS, register, hi, lo] from four words for each eight rows."""
    parts = ()
    for k in tl.static_range(4 * ROWS):
        parts = parts + _elements(words[first + k], dtype)
    return tl.reshape(joined(parts), (words[0].shape[0], 8, 4, ROWS, 2, 2, 32 // dtype.primitive_bitwidth))


@triton.jit
def _elements(word, dtype: tl.constexpr):
    if dtype.primitive_bitwidth == 16:
        return word.to(tl.int16).to(dtype, bitcast=True), (word >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        return (word.to(dtype, bitcast=True),)
