"""Several values of a unit in one tile [BLOCK_B, N * BLOCK_H], column N * unit + value: its four gates, or its STATES states.

Loads, stores, resets and ends of batch rows treat all states of a unit alike, as one wide state; only a cell's equations split
them. N is a power of two.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def deinterleave(tile, N: tl.constexpr):
    """Split [BLOCK_B, N * BLOCK_H] into a tuple of N tiles [BLOCK_B, BLOCK_H]."""
    parts = (tile,)
    for _ in tl.static_range(log2(N)):
        evens, odds = (), ()
        for k in tl.static_range(len(parts)):
            even, odd = tl.split(tl.reshape(parts[k], (tile.shape[0], parts[k].shape[1] // 2, 2)))
            evens, odds = evens + (even,), odds + (odd,)  # type: ignore[assignment]
        parts = evens + odds  # type: ignore[assignment]
    return parts


@triton.jit
def interleave(parts):
    """Undo `deinterleave`."""
    return tl.reshape(joined(parts), (parts[0].shape[0], len(parts) * parts[0].shape[1]))


@triton.jit
def joined(parts):
    """Join 2^n tensors into one with n more axes; the first of these separates the first half from the second."""
    for _ in tl.static_range(log2(len(parts))):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)  # type: ignore[assignment]
        parts = joined
    return parts[0]
