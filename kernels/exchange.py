"""How programs of one launch exchange their state without a barrier, and why it is correct.

The tensor through which they exchange h or dz has an address of its own for every step, and all its bits are set before the
launch. A program stores its slice in words of 32 bits; who needs a word loads it again and again until it is not as it was.
So the data says itself that it is there: nobody counts arrivals, and no fence waits until stores are acknowledged.

Why a reader sees what was stored (PTX memory model):
1. Every word is written by the fill, in an earlier kernel of the same stream, which happens before all of this launch, and
   once in this launch. The accesses to it in this launch are relaxed, at gpu scope, of 32 bits and of the same address: they
   are morally strong, so nothing races, and single-copy atomic, so a load returns all of the fill or all of the value. A
   vector is several such accesses, in no order: each word is looked at by itself. Where two programs store the same word
   (slices of units may overlap), they store the same bits.
2. No value is mistaken for the fill: a word whose bits are all set is stored as 0x7FFFFFFF instead. Both are NaN, of float32
   as well as of the 16-bit types, in both halves.
3. What was loaded is itself what is computed with. No other memory is read because of it, so no order among addresses is
   needed. Threads wait each for their own words; in a program the barriers of the compiler order what passes through shared
   memory.

Why it ends: a word of step s is stored by a program that has read step s - 1 and waits for nothing else, so by induction over
s all are stored, provided all programs run at the same time; what `grid_sync` says of that holds here too. Rows whose state
does not come from another program are read once, whatever bits they hold. Nothing is overwritten: no address is used twice.
"""

import triton
import triton.language as tl

from .grid_sync import MAX_POLLS


@triton.constexpr_function
def _waiting_loads(rows, chunks, stride, left_before, max_polls):
    """PTX that loads of each of `rows` rows `chunks` vectors of four words, `stride` bytes apart, until all are there.

    left_before: elements before the last vector, which is loaded only where more are left; None if it always is.
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
        # The largest word of a row, as an unsigned number, is the fill if any is. In pairs: a chain would take longer.
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
    """Words that other programs store meanwhile: a tuple, for each chunk and each row, of four adjacent ones of 32 bits.

    starts: for each row pointers to the first ones; those of the next chunk lie STRIDE bytes further on. waits: likewise -1
    where another program stores the row, 0 where what is there is right. left: how many elements there are; the last chunk is
    loaded where more than LEFT_BEFORE are, if that is not None. stall_ptr: the word of `stall.word`, None where nobody waits.
    """
    ROWS: tl.constexpr = len(starts)
    addresses = ()
    for row in tl.static_range(ROWS):
        addresses = addresses + (starts[row].to(tl.int64),)  # type: ignore[assignment]
    return tl.inline_asm_elementwise(
        _waiting_loads(ROWS, CHUNKS, STRIDE, LEFT_BEFORE, MAX_POLLS),
        _operands(4 * ROWS * CHUNKS, ROWS),
        addresses + waits + (left, stall_ptr.to(tl.int64) if stall_ptr is not None else tl.cast(0, tl.int64)),
        dtype=types_of_words(4 * ROWS * CHUNKS),
        is_pure=True,  # or the compiler, which gives it another layout, would keep the one it had as well
        pack=1,
    )


@triton.jit
def word_of(a, b):
    """Two tensors of 16 bits as one of 32, a below."""
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
    """Store a tuple of 1, 2 or 4 adjacent words, tensors of int32, at each pointer, for `load_fragments` of other programs."""
    stored = ()
    for k in tl.static_range(len(words)):
        stored = stored + (tl.where(words[k] == -1, 0x7FFFFFFF, words[k]),)  # type: ignore[assignment]
    tl.inline_asm_elementwise(
        _store(len(words)),
        _store_operands(len(words)),
        (pointers.to(tl.int64),) + stored + (mask.to(tl.int32),),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_state(ptr, h, rows, offs_h, mask):
    """Store h [rows, units], rounded, at ptr + rows[:, None] + offs_h[None, :]; of adjacent units either both or none exist."""
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
    """Store i, f, g, o [rows, units], rounded, each unit's in this order from its pointer on: two words or four."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    i, f, g, o = i.to(dtype), f.to(dtype), g.to(dtype), o.to(dtype)
    if dtype.primitive_bitwidth == 16:
        store_words(pointers, (word_of(i, f), word_of(g, o)), mask)
    else:
        i, f = i.to(tl.int32, bitcast=True), f.to(tl.int32, bitcast=True)
        g, o = g.to(tl.int32, bitcast=True), o.to(tl.int32, bitcast=True)
        store_words(pointers, (i, f, g, o), mask)
