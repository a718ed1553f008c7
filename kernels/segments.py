"""Where a row's recurrence starts, stops and restarts inside a sequence: `lengths` and `resets`.

The recurrence of direction 0 runs through t = 0 ... T - 1, that of direction 1 through t = T - 1 ... 0. For each step and row:

    active    t < lengths[b]: past its end a row has outputs 0 and keeps its state
    begins    the state before this step is the initial one: the first step, or, backwards in time, the row's own end
    resets    the state before this step is cleared: at t where resets[t, b] starts a segment, or, backwards in time, at t
              where resets[t + 1, b] does, since there the segment that ends at t is entered
"""

import triton
import triton.language as tl

# Arguments of the sequence kernels that follow from T, B or the caller's layout: specialised, they would compile anew, and a
# stride of 1 has no `.to`.
_STEPS = ["T", "B", "first_step", "last_step", "first_group", "p_hi", "p_lo", "gates_t", "gates_reverse_t"]
_DIMENSIONS = ["t", "b", "dy_t", "dy_b", "resets_t", "resets_b"]
_DIMENSIONS += [f"{state}_{dimension}" for state in ("reset_h", "reset_c") for dimension in "tdb"]
UNSPECIALIZED = [*_STEPS, *(f"stride_{name}" for name in _DIMENSIONS)]


@triton.jit
def row_lengths(lengths_ptr, rows_b, T):
    """Steps of each row: [BLOCK_B], or T for all where no lengths are given."""
    if lengths_ptr is not None:
        return tl.load(lengths_ptr + rows_b).to(tl.int32)
    else:
        return T


@triton.jit
def begins_at(t, lengths, T, direction, HAS_LENGTHS: tl.constexpr):
    """Whether step t starts from the initial state: one value for all rows, or [BLOCK_B] where rows have lengths."""
    if HAS_LENGTHS:
        return tl.where(direction == 0, t == 0, t == lengths - 1)
    else:
        return tl.where(direction == 0, t == 0, t == T - 1)


@triton.jit
def resets_at(t, resets_ptr, stride_resets_t, stride_resets_b, rows_b, lengths, direction):
    """[BLOCK_B] whether the state before step t is cleared."""
    at = t + direction
    pointers = resets_ptr + at * stride_resets_t.to(tl.int64) + rows_b.to(tl.int64) * stride_resets_b
    in_rows = (at < lengths) & (rows_b >= 0)  # the latter always: without lengths it gives the mask its shape
    return tl.load(pointers, mask=in_rows, other=0) != 0


@triton.jit
def reset_state_rows(state_ptr, t, direction, rows_b, stride_t, stride_d, stride_b, ROW: tl.constexpr):
    """[BLOCK_B] pointers to the rows of a state [T, D, B, ROW] whose strides count its rows."""
    row = t * stride_t.to(tl.int64) + direction * stride_d.to(tl.int64)
    return state_ptr + (row + rows_b.to(tl.int64) * stride_b) * ROW
