"""The forward of a whole sequence in one launch: the recurrence, given the pre-activations x W_ih^T + b of all steps.

A program owns BLOCK_H hidden units with all four gates, for BLOCK_B batch rows of one direction. Its slice of W_hh stays on
chip for the whole launch (RESIDENT); c stays in registers. The programs of a group, which own the units of the same batch rows
and direction, exchange h through y, which has an address of its own for every step. They wait for one another once a step
(`exchange`, `grid_sync`); groups never do. Where the programs cannot all run at once, or W_hh does not fit, the same kernel is
launched once per step.
"""

import triton
import triton.language as tl

from .dropout import begin, drop
from .exchange import store_state
from .fragments import fragment_rows, load_weight_fragments, on_cuda_cores, rows_of_block
from .gates import gate_rows, load_gates, split_gates, store_gates
from .grid_sync import COUNTER_STRIDE, arrive, wait
from .interleave import deinterleave
from .segments import UNSPECIALIZED, reset_state_rows, resets_at, row_lengths, rows_before, with_resets
from .splits import product_of_arriving_rows


@triton.jit
def _load_weight_chunk(w_ptr, rows, mask_rows, k, ROW: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_k = k + tl.arange(0, BLOCK_K)
    offsets = rows.to(tl.int64)[:, None] * ROW + offs_k[None, :]
    return tl.load(w_ptr + offsets, mask=mask_rows[:, None] & (offs_k < ROW)[None, :], other=0.0)


@triton.jit
def _load_state_chunk(rows, k, ROW: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load [BLOCK_K, rows] of a state whose units are contiguous: the right operand of W h^T, transposed."""
    offs_k = k + tl.arange(0, BLOCK_K)
    pointers = rows[None, :] + offs_k[:, None]
    if ROW % BLOCK_K != 0:
        return tl.load(pointers, mask=(offs_k < ROW)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["resets_ptr", "seed_ptr"])
def _lstm_sequence_forward_kernel(
    # pointers
    pre_ptr,  # [T, B, D, H, 4] pre-activations from the input
    w_ptr,  # [4H, ROW] W_hh of direction 0, contiguous
    w_reverse_ptr,  # [4H, ROW] W_hh of direction 1, or None when D = 1
    h0_ptr,  # [D, B, ROW]
    c_in_ptr,  # [D, B, STATES * H] c before first_step
    resets_ptr,  # [T, B] integers, or None
    reset_h_ptr,  # [T, D, B, ROW] broadcast, or None without resets
    reset_c_ptr,  # [T, D, B, STATES * H] broadcast, or None without resets
    lengths_ptr,  # [B] or None
    y_ptr,  # [T, B, D, ROW] out, and the buffer through which programs exchange h
    h_n_ptr,  # [D, B, H] out; batch rows of length 0 are not written
    c_out_ptr,  # [D, B, STATES * H] out: c after last_step
    c_ptr,  # [T, B, D, STATES * H] out, or None
    gates_ptr,  # [T, B, D, H, 4] out, or None
    seed_ptr,  # [1] seed of dropout and of the cell's masks, or None
    dropped_ptr,  # [T, B, D, H] out: y after dropout, or None
    counters_ptr,  # [groups, 32] zeros, and zeros again after the launch; None where no program waits for another, or IN_BAND
    stall_ptr,  # [1] `stall.word`, or None where no program waits for another
    # sizes
    T, B, first_step, last_step,
    first_group,  # the first group of this launch, which has as many groups as its programs make up
    p_hi, p_lo,  # probability of dropout: `dropout.probability`
    # strides; all [T, B, D, ...] tensors have the same, in units of D rows; those of reset states are in units of one row
    stride_t, stride_b, stride_resets_t, stride_resets_b,
    stride_reset_h_t, stride_reset_h_d, stride_reset_h_b, stride_reset_c_t, stride_reset_c_d, stride_reset_c_b,
    # meta-parameters; ROW: length of a row of h or W_hh, H to PROGRAMS * BLOCK_H, zero past H;
    # STATES: states per unit in c (interleave.py); INDEX: integer type of offsets within one timestep; IN_BAND: h is exchanged
    # without a barrier (exchange.py), and all bits of y are set before the launch
    FORWARD: tl.constexpr, STATES: tl.constexpr, H: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr, IN_FLIGHT: tl.constexpr, IN_BAND: tl.constexpr,
):  # fmt: skip
    """Compute steps first_step ... last_step - 1 of h_t, c_t = LSTM(pre_t, h_{t-1}, c_{t-1}) for D directions."""
    PROGRAMS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H  # of one barrier group
    CHUNKS: tl.constexpr = (H + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K)
    ALL_UNITS: tl.constexpr = H % BLOCK_H == 0
    group = tl.program_id(0) // PROGRAMS + first_group
    direction = group % D
    first_unit = (tl.program_id(0) % PROGRAMS) * BLOCK_H
    offs_b = (group // D) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = first_unit + tl.arange(0, BLOCK_H)
    mask_b = offs_b < B
    mask = mask_b[:, None] & (offs_h < H)[None, :]
    offs_c = first_unit * STATES + tl.arange(0, STATES * BLOCK_H)
    mask_c = mask_b[:, None] & (offs_c < STATES * H)[None, :]

    if D == 2:
        w_ptr = tl.where(direction == 0, w_ptr, w_reverse_ptr)
    rows, mask_rows = gate_rows(first_unit, H, BLOCK_H)
    weights = ()
    if IN_BAND:
        FULL: tl.constexpr = on_cuda_cores(w_ptr.dtype.element_ty, PRECISION)
        EACH: tl.constexpr = 1 if FULL else 8
        gate_blocks = ()
        for first in tl.static_range(0, 4 * BLOCK_H, EACH):
            n = fragment_rows(4 * first_unit + first, SPLIT_K, EACH)
            n = tl.minimum((n % 4) * H + n // 4, 4 * H - 1)
            gate_blocks = gate_blocks + (w_ptr + n.to(tl.int64) * ROW,)  # type: ignore[assignment]
        weights = load_weight_fragments(gate_blocks, ROW, SPLIT_K, BLOCK_K, CHUNKS, FULL)
    elif RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            weights = weights + (  # type: ignore[assignment]
                _load_weight_chunk(w_ptr, rows, mask_rows, chunk * BLOCK_K, ROW, BLOCK_K),
            )

    # Rows past the batch load its last row again, because masks would take registers; only stores are masked.
    rows_b = tl.minimum(offs_b, B - 1)
    step_size = stride_t.to(tl.int64) * (D * H)
    h_step_size = stride_t.to(tl.int64) * (D * ROW)
    output_rows = rows_b.to(INDEX) * stride_b * D + direction
    output_offsets = output_rows[:, None] * H + offs_h[None, :]
    c_offsets = output_rows[:, None] * (STATES * H) + offs_c[None, :]
    h_offsets = output_rows[:, None] * ROW + offs_h[None, :]
    state_rows = direction.to(INDEX) * B + rows_b
    state_offsets = state_rows[:, None] * H + offs_h[None, :]
    c_state_offsets = state_rows[:, None] * (STATES * H) + offs_c[None, :]
    lengths = row_lengths(lengths_ptr, rows_b, T)
    last_arrival = (last_step - first_step) * PROGRAMS - 1
    # Batch rows whose h is loaded: IN_BAND this thread's row of each eight, else all rows of the program.
    gathered, row_ends = (rows_b,), (lengths,)
    if IN_BAND:
        gathered, row_ends = (), ()  # type: ignore[assignment]
        for block in tl.static_range(BLOCK_B // 8):
            block_rows = tl.minimum(fragment_rows((group // D) * BLOCK_B + 8 * block, SPLIT_K), B - 1)
            gathered = gathered + (block_rows,)  # type: ignore[assignment]
            row_ends = row_ends + (row_lengths(lengths_ptr, block_rows, T),)  # type: ignore[assignment]

    flags = (resets_ptr, stride_resets_t, stride_resets_b)
    reset_h = (reset_h_ptr, stride_reset_h_t, stride_reset_h_d, stride_reset_h_b)
    reset_c = (reset_c_ptr, stride_reset_c_t, stride_reset_c_d, stride_reset_c_b)
    c = tl.load(c_in_ptr + c_state_offsets, mask=mask_c, other=0.0).to(ACC)
    t = first_step + direction * (T - 1 - 2 * first_step)
    x_i, x_f, x_g, x_o = load_gates(pre_ptr + t * step_size * 4, output_rows, None, first_unit, H, BLOCK_H, ALL_UNITS)
    if resets_ptr is not None:
        resets = resets_at(t, flags, rows_b, lengths, direction)

    # num_stages=1, because the software pipeliner would move the loads of h above the wait. disable_licm, because outside of
    # the loop each address of W_hh in shared memory would take a register.
    for step in tl.range(first_step, last_step, num_stages=1, disable_licm=True):
        t = step + direction * (T - 1 - 2 * step)
        h_rows, awaits = (), ()
        for k in tl.static_range(len(gathered)):
            of_y, of_h0 = gathered[k].to(INDEX) * stride_b * D + direction, direction.to(INDEX) * B + gathered[k]
            every_h, initial_h = (y_ptr, h_step_size, of_y), (h0_ptr, of_h0)
            pointers, from_outside = rows_before(
                t, every_h, initial_h, direction, T, row_ends[k], ROW, lengths_ptr is not None
            )
            if resets_ptr is not None:
                cleared = rows_of_block(resets, k, SPLIT_K) if IN_BAND else resets
                pointers = tl.where(cleared, reset_state_rows(reset_h, t, direction, gathered[k], ROW), pointers)
                from_outside = from_outside | cleared
            h_rows = h_rows + (pointers,)  # type: ignore[assignment]
            awaits = awaits + (tl.broadcast_to(tl.where(from_outside, 0, -1), pointers.shape),)  # type: ignore[assignment]
        if resets_ptr is not None:
            reset_c_rows = reset_state_rows(reset_c, t, direction, rows_b, STATES * H)
            c = with_resets(c, resets, reset_c_rows, offs_c, mask_c)

        # The next step's input does not depend on h, so load it before the wait. The last step loads its own again.
        n_i, n_f, n_g, n_o = x_i, x_f, x_g, x_o
        t_next = tl.minimum(tl.maximum(t + 1 - 2 * direction, 0), T - 1)
        if resets_ptr is not None:
            # If these bytes were loaded in the step that uses them, the compiler would choose the operands' layout by them.
            resets = resets_at(t_next, flags, rows_b, lengths, direction)
        at = None
        if seed_ptr is not None:
            # Inside the loop, because values derived from the seed would otherwise stay in registers.
            seed, p, kept_scale = begin(seed_ptr, p_hi, p_lo, ACC)
            at = (seed, t, rows_b, direction * H + offs_h)
        if RESIDENT:
            n_i, n_f, n_g, n_o = load_gates(
                pre_ptr + t_next * step_size * 4, output_rows, None, first_unit, H, BLOCK_H, ALL_UNITS
            )
        if counters_ptr is not None:
            wait(counters_ptr + group * COUNTER_STRIDE, (step - first_step) * PROGRAMS, stall_ptr)

        if IN_BAND:
            z = product_of_arriving_rows(h_rows, awaits, stall_ptr, weights, ROW, IN_FLIGHT, PRECISION, ACC)
            z_i, z_f, z_g, z_o = deinterleave(z, 4)
        else:
            z = tl.zeros((4 * BLOCK_H, BLOCK_B), ACC)
            if RESIDENT:
                for first in tl.static_range(0, CHUNKS, IN_FLIGHT):
                    # Issue all loads before using the first, so that they share one L2 round trip.
                    state = ()
                    for k in tl.static_range(IN_FLIGHT):
                        if first + k < CHUNKS:
                            loaded = _load_state_chunk(h_rows[0], (first + k) * BLOCK_K, ROW, BLOCK_K)  # type: ignore[misc]
                            state = state + (loaded,)  # type: ignore[assignment]
                    for k in tl.static_range(IN_FLIGHT):
                        if first + k < CHUNKS:
                            z = tl.dot(weights[first + k], state[k], z, input_precision=PRECISION, out_dtype=ACC)
            else:
                for k in range(0, H, BLOCK_K):
                    w = _load_weight_chunk(w_ptr, rows, mask_rows, k, ROW, BLOCK_K)
                    h_prev = _load_state_chunk(h_rows[0], k, ROW, BLOCK_K)  # type: ignore[misc]
                    z = tl.dot(w, h_prev, z, input_precision=PRECISION, out_dtype=ACC)

            z_i, z_f, z_g, z_o = split_gates(tl.trans(z), BLOCK_B, BLOCK_H)
        i, f, g, o, c_new, h = FORWARD(
            z_i + x_i.to(ACC), z_f + x_f.to(ACC), z_g + x_g.to(ACC), z_o + x_o.to(ACC), c, at
        )
        x_i, x_f, x_g, x_o = n_i, n_f, n_g, n_o
        c_t = c_new
        if lengths_ptr is not None:
            active = (t < lengths)[:, None]
            h = tl.where(active, h, 0.0)
            c_t = tl.where(active, c_new, 0.0)
            c_new = tl.where(active, c_new, c)
        c = c_new

        h = h.to(y_ptr.dtype.element_ty)
        if ROW != H:
            h = tl.where((offs_h < H)[None, :], h, 0.0)  # an infinite state times zeros of W_hh is NaN
        mask_h = mask_b[:, None] & (offs_h < ROW)[None, :]
        if IN_BAND:
            store_state(y_ptr + t * h_step_size, h, output_rows * ROW, offs_h, mask_h)
        else:
            tl.store(y_ptr + t * h_step_size + h_offsets, h, mask=mask_h)
        if counters_ptr is not None:
            arrive(counters_ptr + group * COUNTER_STRIDE, last_arrival)  # before the stores that no program waits for
        elif not IN_BAND:
            tl.debug_barrier()  # the only program of a group reads its own h in the next step

        if c_ptr is not None:
            tl.store(c_ptr + t * step_size * STATES + c_offsets, c_t.to(c_ptr.dtype.element_ty), mask=mask_c)
        if gates_ptr is not None:
            gates_t = gates_ptr + t * step_size * 4
            store_gates(gates_t, i, f, g, o, output_rows, mask_b, first_unit, H, BLOCK_H)
        if dropped_ptr is not None:
            dropped = drop(h.to(ACC), at, p, kept_scale)
            tl.store(dropped_ptr + t * step_size + output_offsets, dropped.to(dropped_ptr.dtype.element_ty), mask=mask)
        if lengths_ptr is not None:
            ends = tl.where(direction == 0, t == lengths - 1, (t == 0) & (lengths > 0))
            tl.store(h_n_ptr + state_offsets, h, mask=mask & ends[:, None])
        elif step == T - 1:
            tl.store(h_n_ptr + state_offsets, h, mask=mask)

    tl.store(c_out_ptr + c_state_offsets, c.to(c_out_ptr.dtype.element_ty), mask=mask_c)
