"""The backward of a whole sequence in one launch: from the gradients of y, h_n and c_n to the gate gradients dz of all steps.

A program owns BLOCK_H hidden units for BLOCK_B batch rows of one direction, and keeps the columns of W_hh of these units on
chip. It computes dh_t = dy_t + dz_{t+1} W_hh for its units from the dz_{t+1} of its whole group; the programs exchange dz
through the output dz itself. dc stays in registers. Nothing is summed across programs, so two runs agree bit for bit. The
gradients of weights, biases and inputs are then products and sums over all steps (`layer_backward`).
"""

import triton
import triton.language as tl

from .dropout import begin, drop
from .exchange import store_gates_of_units
from .fragments import fragment_rows, load_weight_fragments, on_cuda_cores
from .gates import load_gates, store_gates
from .grid_sync import COUNTER_STRIDE, arrive, wait
from .segments import UNSPECIALIZED, reset_state_rows, resets_at, row_lengths, rows_before, with_resets
from .splits import chunk_offsets, load_rows_chunk, product_of_arriving_rows, product_of_rows, sum_of_splits


@triton.jit
def _load_weight_chunk(w_ptr, chunk, offs_h, mask_h, H: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a chunk [SPLIT_K, BLOCK_K, BLOCK_H] of W_hh, with rows in the order of dz in memory, 4 * unit + gate."""
    n = chunk_offsets(chunk, SPLIT_K, BLOCK_K)
    rows = (n % 4) * H + n // 4
    offsets = rows.to(tl.int64)[:, :, None] * H + offs_h[None, None, :]
    return tl.load(w_ptr + offsets, mask=(n < 4 * H)[:, :, None] & mask_h[None, None, :], other=0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["dy_ptr", "resets_ptr", "seed_ptr"])
def _lstm_sequence_backward_kernel(
    # pointers
    dy_ptr,  # [T, B, D, H] or None; with dropout the gradient of y after dropout
    seed_ptr,  # [1] seed of dropout and of the cell's masks, or None
    dc_states_ptr,  # [T, B, D, STATES * H] or None: the gradient of every c_t
    dh_n_ptr,  # [D, B, H] or None
    dc_in_ptr,  # [D, B, STATES * H] or None: the gradient of c after the last step of this launch
    gates_ptr,  # [.., B, D, H, 4] gates (ACTIVATED) or pre-activations, from t = gates_t on
    c_ptr,  # [T, B, D, STATES * H]
    c0_ptr,  # [D, B, STATES * H]
    w_ptr,  # [4H, H] W_hh of direction 0, contiguous
    w_reverse_ptr,  # [4H, H] W_hh of direction 1, or None when D = 1
    resets_ptr,  # [T, B] integers, or None
    reset_c_ptr,  # [T, D, B, STATES * H] broadcast, or None without resets
    lengths_ptr,  # [B] or None
    dz_ptr,  # [T, B, D, H, 4] out, and the buffer through which programs exchange dz
    dc_out_ptr,  # [D, B, STATES * H] out: the gradient of c before the first step of this launch
    dreset_c_ptr,  # [T, B, D, STATES * H] out, zeros before the launch, or None
    counters_ptr,  # [groups, 32] zeros, and zeros again after the launch; None where no program waits for another, or IN_BAND
    stall_ptr,  # [1] `stall.word`, or None where no program waits for another
    # sizes; steps count backward: step 0 is the last one of the forward recurrence
    T, B, first_step, last_step,
    first_group,  # the first group of this launch, which has as many groups as its programs make up
    p_hi, p_lo,  # probability of dropout: `dropout.probability`
    gates_t, gates_reverse_t,
    # strides; all [T, B, D, ...] tensors but dy have the same, in units of D rows; reset states in units of one row
    stride_t, stride_b, stride_dy_t, stride_dy_b, stride_dy_h, stride_resets_t, stride_resets_b,
    stride_reset_c_t, stride_reset_c_d, stride_reset_c_b,
    # meta-parameters; STATES: states per unit in c (interleave.py); INDEX: integer type of offsets within one timestep;
    # IN_BAND: dz is exchanged without a barrier (exchange.py), and all bits of dz are set before the launch
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, STATES: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, ACTIVATED: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr, IN_FLIGHT: tl.constexpr,
    IN_BAND: tl.constexpr,
):  # fmt: skip
    """Compute dz of steps first_step ... last_step - 1, backward in time, for D directions."""
    PROGRAMS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H  # of one barrier group
    group = tl.program_id(0) // PROGRAMS + first_group
    direction = group % D
    offs_b = (group // D) * BLOCK_B + tl.arange(0, BLOCK_B)
    # Rows past the batch load its last row again, because masks would take registers; only stores are masked.
    rows_b = tl.minimum(offs_b, B - 1)
    mask_b = offs_b < B
    # For the same reason, where the units do not fill the last program, it computes some units of the one before too, and both
    # store the same bits. Where each step is a launch of its own this is not possible, because it updates dc in place.
    ALL_UNITS: tl.constexpr = H % BLOCK_H == 0 or (RESIDENT and H > BLOCK_H)
    first_unit = (tl.program_id(0) % PROGRAMS) * BLOCK_H
    if ALL_UNITS:
        first_unit = tl.minimum(first_unit, H - BLOCK_H)
    offs_h = first_unit + tl.arange(0, BLOCK_H)
    mask_h = tl.full((BLOCK_H,), True, tl.int1) if ALL_UNITS else offs_h < H
    mask_loads = tl.broadcast_to(mask_h[None, :], (BLOCK_B, BLOCK_H))
    offs_c = first_unit * STATES + tl.arange(0, STATES * BLOCK_H)
    mask_c = tl.full((STATES * BLOCK_H,), True, tl.int1) if ALL_UNITS else offs_c < STATES * H
    mask_c_loads = tl.broadcast_to(mask_c[None, :], (BLOCK_B, STATES * BLOCK_H))
    mask_c_stores = mask_b[:, None] & mask_c[None, :]

    CHUNKS: tl.constexpr = (4 * H + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K)
    weights = ()
    if D == 2:
        w_ptr = tl.where(direction == 0, w_ptr, w_reverse_ptr)
    if IN_BAND:
        FULL: tl.constexpr = on_cuda_cores(w_ptr.dtype.element_ty, PRECISION)
        EACH: tl.constexpr = 1 if FULL else 8
        unit_blocks, blocks = (), ()
        for first in tl.static_range(0, BLOCK_H, EACH):
            units = w_ptr + fragment_rows(first_unit + first, SPLIT_K, EACH)
            unit_blocks = unit_blocks + (units,)  # type: ignore[assignment]
        for block in tl.static_range(BLOCK_B // 8):
            block_rows = tl.minimum(fragment_rows((group // D) * BLOCK_B + 8 * block, SPLIT_K), B - 1)
            blocks = blocks + ((block_rows.to(INDEX) * stride_b * D + direction) * (4 * H),)  # type: ignore[assignment]
        weights = load_weight_fragments(unit_blocks, 4 * H, SPLIT_K, BLOCK_K, CHUNKS, FULL, H, H * H)
    elif RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            weights = weights + (  # type: ignore[assignment]
                _load_weight_chunk(w_ptr, chunk, offs_h, mask_h, H, SPLIT_K, BLOCK_K),
            )

    step_size = stride_t.to(tl.int64) * (D * H)
    output_rows = rows_b.to(INDEX) * stride_b * D + direction
    c_offsets = output_rows[:, None] * (STATES * H) + offs_c[None, :]
    state_rows = direction.to(INDEX) * B + rows_b
    state_offsets = state_rows[:, None] * H + offs_h[None, :]
    c_state_offsets = state_rows[:, None] * (STATES * H) + offs_c[None, :]
    dy_units = (direction * H + offs_h).to(INDEX)
    dy_offsets = rows_b.to(INDEX)[:, None] * stride_dy_b + dy_units[None, :] * stride_dy_h
    lengths = row_lengths(lengths_ptr, rows_b, T)
    gates_t = tl.where(direction == 0, gates_t, gates_reverse_t)
    last_arrival = (last_step - first_step) * PROGRAMS - 1

    flags = (resets_ptr, stride_resets_t, stride_resets_b)
    reset_c = (reset_c_ptr, stride_reset_c_t, stride_reset_c_d, stride_reset_c_b)
    dc = tl.zeros((BLOCK_B, STATES * BLOCK_H), ACC)
    if dc_in_ptr is not None:
        dc = tl.load(dc_in_ptr + c_state_offsets, mask=mask_c_loads, other=0.0).to(ACC)
    t = T - 1 - first_step + direction * (2 * first_step - T + 1)
    c = tl.load(c_ptr + t * step_size * STATES + c_offsets, mask=mask_c_loads, other=0.0)
    if resets_ptr is not None:
        resets_next = resets_at(t + 1 - 2 * direction, flags, rows_b, lengths, direction)

    # num_stages and disable_licm: as in the forward.
    for step in tl.range(first_step, last_step, num_stages=1, disable_licm=True):
        t = T - 1 - step + direction * (2 * step - T + 1)
        t_next = t + 1 - 2 * direction  # next in the recurrence, computed just before

        # Load everything that does not depend on other programs before the wait.
        i, f, g, o = load_gates(
            gates_ptr + (t - gates_t) * step_size * 4, output_rows, None, first_unit, H, BLOCK_H, ALL_UNITS
        )
        every_c, initial_c = (c_ptr, step_size * STATES, output_rows), (c0_ptr, state_rows)
        c_rows, _ = rows_before(t, every_c, initial_c, direction, T, lengths, STATES * H, lengths_ptr is not None)
        c_previous = tl.load(c_rows[:, None] + offs_c[None, :], mask=mask_c_loads, other=0.0)
        c_prev = c_previous.to(ACC)
        if resets_ptr is not None:
            resets = resets_at(t, flags, rows_b, lengths, direction)
            reset_c_rows = reset_state_rows(reset_c, t, direction, rows_b, STATES * H)
            c_prev = with_resets(c_prev, resets, reset_c_rows, offs_c, mask_c_loads)

        dh = tl.zeros((BLOCK_B, BLOCK_H), ACC)
        at = None
        if seed_ptr is not None:
            # Inside the loop, because values derived from the seed would otherwise stay in registers.
            seed, p, kept_scale = begin(seed_ptr, p_hi, p_lo, ACC)
            at = (seed, t, rows_b, direction * H + offs_h)
        if dy_ptr is not None:
            dy = tl.load(dy_ptr + t * stride_dy_t.to(tl.int64) + dy_offsets, mask=mask_loads, other=0.0).to(ACC)
            if seed_ptr is not None:
                dy = drop(dy, at, p, kept_scale)
            dh += dy
        if dh_n_ptr is not None:
            if lengths_ptr is not None:
                ends = tl.where(direction == 0, t == lengths - 1, t == 0)
                dh += tl.load(dh_n_ptr + state_offsets, mask=mask_loads & ends[:, None], other=0.0).to(ACC)
            elif step == 0:
                dh += tl.load(dh_n_ptr + state_offsets, mask=mask_loads, other=0.0).to(ACC)

        if counters_ptr is not None:
            wait(counters_ptr + group * COUNTER_STRIDE, (step - first_step) * PROGRAMS, stall_ptr)

        next_rows = dz_ptr + t_next * step_size * 4 + output_rows * (4 * H)
        if IN_BAND:
            # In the first step there is no dz to read: what is loaded is not used.
            source = dz_ptr + tl.where(step > 0, t_next, t) * step_size * 4
            sources = [source + eight for eight in blocks]  # type: ignore[var-annotated]
            awaits = [tl.broadcast_to(tl.where(step > 0, -1, 0), eight.shape) for eight in blocks]  # type: ignore[var-annotated]
            dh_next = product_of_arriving_rows(sources, awaits, stall_ptr, weights, 4 * H, IN_FLIGHT, PRECISION, ACC)
            dh_next = tl.where(step > 0, dh_next, 0.0)
        elif RESIDENT:
            dh_next = product_of_rows(next_rows, step > 0, weights, 4 * H, IN_FLIGHT, PRECISION, ACC)
        else:
            parts = tl.zeros((SPLIT_K, BLOCK_B, BLOCK_H), ACC)
            for chunk in range(CHUNKS):
                w = _load_weight_chunk(w_ptr, chunk, offs_h, mask_h, H, SPLIT_K, BLOCK_K)
                dz = load_rows_chunk(next_rows, step > 0, chunk, 4 * H, SPLIT_K, BLOCK_K)
                parts = tl.dot(dz, w, parts, input_precision=PRECISION, out_dtype=ACC)
            dh_next = sum_of_splits(parts, SPLIT_K, BLOCK_B, BLOCK_H)
        if resets_ptr is not None:
            # Where the state was reset before step t_next, no gradient passes back to step t.
            dh_next = tl.where(resets_next[:, None], 0.0, dh_next)
            resets_next = resets
        dh += dh_next

        dc_step = dc
        if dc_states_ptr is not None:
            dc_states = tl.load(dc_states_ptr + t * step_size * STATES + c_offsets, mask=mask_c_loads, other=0.0)
            dc_step += dc_states.to(ACC)
        i, f, g, o = i.to(ACC), f.to(ACC), g.to(ACC), o.to(ACC)
        if not ACTIVATED:
            i, f, g, o, _, _ = FORWARD(i, f, g, o, c_prev, at)
        dz_i, dz_f, dz_g, dz_o, dc_prev = BACKWARD(i, f, g, o, c_prev, c.to(ACC), dh, dc_step, at)
        if lengths_ptr is not None:
            active = (t < lengths)[:, None]
            dz_i = tl.where(active, dz_i, 0.0)
            dz_f = tl.where(active, dz_f, 0.0)
            dz_g = tl.where(active, dz_g, 0.0)
            dz_o = tl.where(active, dz_o, 0.0)
            dc_prev = tl.where(active, dc_prev, dc)
        dz_t = dz_ptr + t * step_size * 4
        if IN_BAND:
            dz_units = dz_t + (output_rows[:, None] * (4 * H) + 4 * offs_h[None, :])
            store_gates_of_units(dz_units, dz_i, dz_f, dz_g, dz_o, mask_b[:, None] & mask_h[None, :])
        else:
            store_gates(dz_t, dz_i, dz_f, dz_g, dz_o, output_rows, mask_b, first_unit, H, BLOCK_H, ALL_UNITS)
        if counters_ptr is not None:
            arrive(counters_ptr + group * COUNTER_STRIDE, last_arrival)
        elif not IN_BAND:
            tl.debug_barrier()  # the only program of a group reads its own dz in the next step

        if resets_ptr is not None:
            if dreset_c_ptr is not None:
                dreset_c_t = dreset_c_ptr + t * step_size * STATES + c_offsets
                tl.store(dreset_c_t, dc_prev.to(dreset_c_ptr.dtype.element_ty), mask=mask_c_stores & resets[:, None])
            dc_prev = tl.where(resets[:, None], 0.0, dc_prev)
        dc = dc_prev
        c = c_previous

    tl.store(dc_out_ptr + c_state_offsets, dc.to(dc_out_ptr.dtype.element_ty), mask=mask_c_stores)
