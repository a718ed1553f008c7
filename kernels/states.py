"""Several states of a unit in one tile: [BLOCK_B, STATES * BLOCK_H], column STATES * unit + state; [..., H, STATES] in memory.

Loads, stores, resets and ends of batch rows treat all states alike, as one wide state; only a cell's equations split them.
STATES is a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def split_states(tile, STATES: tl.constexpr):
    """Split [BLOCK_B, STATES * BLOCK_H] into a tuple of STATES tiles [BLOCK_B, BLOCK_H]."""
    if STATES == 1:
        return (tile,)
    if STATES == 2:
        return _split(tile)
    if STATES == 4:
        even, odd = _split(tile)
        s0, s2 = _split(even)
        s1, s3 = _split(odd)
        return s0, s1, s2, s3
    if STATES == 8:
        even, odd = _split(tile)
        s0, s2, s4, s6 = split_states(even, 4)
        s1, s3, s5, s7 = split_states(odd, 4)
        return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def _split(tile):
    """Split into the states of even index and those of odd index."""
    return tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))


@triton.jit
def join_states(states, STATES: tl.constexpr):
    """Undo `split_states`."""
    if STATES == 1:
        return states[0]
    if STATES == 2:
        return _join(states[0], states[1])
    if STATES == 4:
        return _join(_join(states[0], states[2]), _join(states[1], states[3]))
    if STATES == 8:
        s0, s1, s2, s3, s4, s5, s6, s7 = states
        return _join(join_states((s0, s2, s4, s6), 4), join_states((s1, s3, s5, s7), 4))


@triton.jit
def _join(even, odd):
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] * 2))
