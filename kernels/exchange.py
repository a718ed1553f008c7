"""Programs of one launch exchange their state without a barrier; this says how, and why it is correct.

The tensor through which they exchange h or dz has an address of its own for every step. Before the launch it is filled: all
its bits are set. A program stores its slice in words of 32 bits. A program that needs a word loads it until it differs from
the fill. So the data itself shows that it has arrived: no counter counts arrivals, and no fence waits until stores are
acknowledged.

Why a reader sees what was stored (PTX memory model):
1. Every word is written by the fill, an earlier kernel of the same stream, which happens before all of this launch, and once
   in this launch. The accesses to it in this launch are relaxed, at gpu scope, of 32 bits and of the same address. They are
   morally strong, so nothing races, and single-copy atomic, so a load returns all of the fill or all of the value. A vector
   access is several such accesses in no order, so each word is tested by itself. Where two programs store the same word
   (slices of units may overlap), they store the same bits.
2. No value is mistaken for the fill: a word whose bits are all set is stored as 0x7FFFFFFF instead. Both are NaN, as float32
   and, in both halves, as the 16-bit types.
3. A thread computes with the very words that it has tested. It reads no other memory because of them, so no order among
   addresses is needed. Each thread waits for its own words; the compiler's barriers order what passes through shared memory.

Why it ends: a word of step s is stored by a program that has read step s - 1 and waits for nothing else, so by induction over
s all words are stored, provided all programs run at the same time (see `grid_sync`). Batch rows whose state does not come from
another program are read once, whatever bits they hold. Nothing is overwritten: no address is used twice.
"""

import triton
import triton.language as tl

from .grid_sync import max_polls


@triton.constexpr_function
def _waiting_loads(rows, chunks, stride, left_before, max_polls):
    """Return PTX that loads `chunks` vectors of four words, `stride` bytes apart, of each of `rows` rows until all are there.

    left_before: the last vector is loaded only where more elements than these are left; None if it always is.
    """
    words = 4 * rows * chunks
    address, waits, left, stall = words, words + rows, words + 2 * rows, words + 2 * rows + 1
    lines, found = [], []
    for row in range(rows):
        for chunk in range(chunks):
            first = 4 * (chunk * rows + row)
            vector = ", ".join(f"${first + k}" for k in range(4))
            guard = ""
            if left_before is not None and chunk == chunks - 1:
                guard = "@exists "
                lines += [f"mov.b32 ${first + k}, 0;" for k in range(4)]
            lines.append(f"{guard}ld.relaxed.gpu.global.v4.b32 {{{vector}}}, [${address + row} + {chunk * stride}];")
    registers = 0
    for row in range(rows):
        # The largest word of a row, as an unsigned number, is the fill if any word is. Maxima in pairs take less time than a
        # chain.
        names = [f"${4 * (chunk * rows + row) + k}" for chunk in range(chunks) for k in range(4)]
        while len(names) > 1:
            pairs = [(names[k], names[k + 1]) for k in range(0, len(names) - 1, 2)]
            rest = names[2 * len(pairs) :]
            names = []
            for a, b in pairs:
                names.append(f"m{registers}")
                lines.append(f"max.u32 m{registers}, {a}, {b};")
                registers += 1
            names += rest
        lines.append(f"and.b32 w{row}, {names[0]}, ${waits + row};")
        found.append(f"w{row}")
    lines += [f"max.u32 w0, w0, {name};" for name in found[1:]]
    declared = ", ".join([*found, *(f"m{k}" for k in range(registers))])
    return "\n".join(
        [
            f"{{ .reg .pred there, exists, goes_on; .reg .b32 polls, {declared};",
            f"mov.u32 polls, 0; setp.gt.s32 exists, ${left}, {left_before or 0};",
            "again:",
            *lines,
            "setp.ne.u32 there, w0, 0xffffffff; @there bra done;",
            f"add.u32 polls, polls, 1; setp.ne.u32 goes_on, polls, {max_polls}; @goes_on bra again;",
            f"st.volatile.global.u32 [${stall}], polls; membar.sys; trap;",
            "done: }",
        ]
    )


@triton.constexpr_function
def _operands(words, rows):
    return ",".join(["=&r"] * words + ["l"] * rows + ["r"] * (rows + 1) + ["l"])


@triton.constexpr_function
def types_of_words(words):
    return (tl.int32,) * words


@triton.jit
def load_words(starts, waits, left, stall_ptr, STRIDE: tl.constexpr, LEFT_BEFORE: tl.constexpr, CHUNKS: tl.constexpr):
    """Load words that other programs are still storing: a tuple of four adjacent words of 32 bits for each chunk and each row.

    starts: for each row pointers to its first words; those of the next chunk lie STRIDE bytes further on. waits: for each row
    -1 where another program stores it, 0 where it is ready. left: how many elements the row has from there on; the last chunk
    is loaded where these are more than LEFT_BEFORE, if that is not None. stall_ptr: `stall.word`, None where no program waits.
    """
    ROWS: tl.constexpr = len(starts)
    addresses = [start.to(tl.int64) for start in starts]
    return tl.inline_asm_elementwise(
        _waiting_loads(ROWS, CHUNKS, STRIDE, LEFT_BEFORE, max_polls()),
        _operands(4 * ROWS * CHUNKS, ROWS),
        addresses + waits + (left, stall_ptr.to(tl.int64) if stall_ptr is not None else tl.cast(0, tl.int64)),
        dtype=types_of_words(4 * ROWS * CHUNKS),
        is_pure=True,  # else the compiler, when it changes the layout, would keep the loads in the old layout too
        pack=1,
    )


@triton.jit
def word_of(a, b):
    """Pack two tensors of 16 bits into one of 32, a in the lower half."""
    return (a.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (b.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.constexpr_function
def _store(words):
    vector, suffix = ", ".join(f"${2 + k}" for k in range(words)), {1: "", 2: ".v2", 4: ".v4"}[words]
    return (
        f"{{ .reg .pred stores; setp.ne.u32 stores, ${2 + words}, 0;"
        f" @stores st.relaxed.gpu.global{suffix}.b32 [$1], {{{vector}}}; mov.u32 $0, 0; }}"
    )


@triton.constexpr_function
def _store_operands(words):
    return "=r,l" + ",r" * (words + 1)


@triton.jit
def store_words(pointers, words, mask):
    """Store a tuple of 1, 2 or 4 adjacent int32 words at each pointer, for `load_words` of other programs."""
    stored = [tl.where(word == -1, 0x7FFFFFFF, word) for word in words]
    tl.inline_asm_elementwise(
        _store(len(words)),
        _store_operands(len(words)),
        (pointers.to(tl.int64),) + stored + (mask.to(tl.int32),),  # type: ignore[operator]
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_state(ptr, h, rows, offs_h, mask):
    """Store h [rows, units], of ptr's dtype, at ptr + rows[:, None] + offs_h[None, :]. In 16 bits units are masked in pairs."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    pointers = ptr + (rows[:, None] + offs_h[None, :])
    if dtype.primitive_bitwidth == 16:
        PAIRS: tl.constexpr = (h.shape[0], h.shape[1] // 2, 2)
        even, odd = tl.split(tl.reshape(h, PAIRS))
        at, _ = tl.split(tl.reshape(pointers.to(tl.int64), PAIRS))
        exists, _ = tl.split(tl.reshape(mask.to(tl.int32), PAIRS))
        store_words(at, (word_of(even, odd),), exists)
    else:
        store_words(pointers, (h.to(tl.int32, bitcast=True),), mask)


@triton.jit
def store_gates_of_units(pointers, i, f, g, o, mask):
    """Store i, f, g, o [rows, units], rounded, from each unit's pointer on: two words or four."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    i, f, g, o = i.to(dtype), f.to(dtype), g.to(dtype), o.to(dtype)
    if dtype.primitive_bitwidth == 16:
        store_words(pointers, (word_of(i, f), word_of(g, o)), mask)
    else:
        i, f = i.to(tl.int32, bitcast=True), f.to(tl.int32, bitcast=True)
        g, o = g.to(tl.int32, bitcast=True), o.to(tl.int32, bitcast=True)
        store_words(pointers, (i, f, g, o), mask)
