"""`lengths` and `resets` say where the recurrence of a batch row starts, stops and restarts inside a sequence.

The recurrence of direction 0 runs through t = 0 ... T - 1, that of direction 1 through t = T - 1 ... 0. For each step and
batch row:

    active    t < lengths[b]: past its end a batch row has outputs 0 and keeps its state
    begins    the state before this step is the initial one: at the first step, or in direction 1 at the row's own end
    resets    the state before this step is reset: at t where resets[t, b] starts a segment, or in direction 1 at t where
              resets[t + 1, b] does, because direction 1 enters the segment that ends at t there
"""

import triton
import triton.language as tl

# Arguments of the sequence kernels that follow from T, B or the caller's layout. If they were specialised, new values would
# compile anew, and a stride of 1 would be a constant without `.to`.
_STEPS = ["T", "B", "first_step", "last_step", "first_group", "p_hi", "p_lo", "gates_t", "gates_reverse_t"]
_DIMENSIONS = ["t", "b", "dy_t", "dy_b", "resets_t", "resets_b"]
_DIMENSIONS += [f"{state}_{dimension}" for state in ("reset_h", "reset_c") for dimension in "tdb"]
UNSPECIALIZED = [*_STEPS, *(f"stride_{name}" for name in _DIMENSIONS)]


@triton.jit
def row_lengths(lengths_ptr, rows_b, T):
    """Load the steps of each batch row [BLOCK_B]; without lengths return T, for all rows."""
    if lengths_ptr is not None:
        return tl.load(lengths_ptr + rows_b).to(tl.int32)
    else:
        return T


@triton.jit
def rows_before(t, every, initial, direction, T, lengths, ROW: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """Return pointers to the rows of a state before step t, and whether it is the initial one, for each of them or for all.

    every: (pointer, elements of a step, rows within a step), the state after each step. initial: (pointer, rows).
    """
    every_ptr, step_size, rows = every
    initial_ptr, initial_rows = initial
    t_prev = t - 1 + 2 * direction
    every_ptr += t_prev * step_size
    if HAS_LENGTHS:
        # Batch rows that have not begun would read past the end: they load the initial state instead, and do not use it.
        begins = tl.where(direction == 0, t == 0, t == lengths - 1) | (t_prev < 0) | (t_prev >= T)
        return tl.where(begins, initial_ptr + initial_rows * ROW, every_ptr + rows * ROW), begins
    else:
        begins = tl.where(direction == 0, t == 0, t == T - 1)
        return tl.where(begins, initial_ptr, every_ptr) + tl.where(begins, initial_rows, rows) * ROW, begins


@triton.jit
def resets_at(t, flags, rows_b, lengths, direction):
    """Return bools [BLOCK_B]: whether the state before step t is reset. flags: (resets_ptr, its strides)."""
    resets_ptr, stride_resets_t, stride_resets_b = flags
    at = t + direction
    pointers = resets_ptr + at * stride_resets_t.to(tl.int64) + rows_b.to(tl.int64) * stride_resets_b
    in_rows = (at < lengths) & (rows_b >= 0)  # rows_b >= 0 is always true; without lengths it gives the mask its shape
    return tl.load(pointers, mask=in_rows, other=0) != 0


@triton.jit
def reset_state_rows(state, t, direction, rows_b, ROW: tl.constexpr):
    """Return pointers [BLOCK_B] to the rows of a state [T, D, B, ROW]: (pointer, its strides in units of rows)."""
    state_ptr, stride_t, stride_d, stride_b = state
    row = t * stride_t.to(tl.int64) + direction * stride_d.to(tl.int64)
    return state_ptr + (row + rows_b.to(tl.int64) * stride_b) * ROW


@triton.jit
def with_resets(c, resets, rows, offs_c, mask_c):
    """Return c [BLOCK_B, states], or, where resets [BLOCK_B] are True, what memory holds there. rows: `reset_state_rows`."""
    state = tl.load(rows[:, None] + offs_c[None, :], mask=mask_c & resets[:, None], other=0.0)
    return tl.where(resets[:, None], state.to(c.dtype), c)
