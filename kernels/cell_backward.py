"""The backward of one timestep, in one launch.

Programs of three kinds share the grid and do not depend on one another: for tiles of the weight gradients, for tiles of the
input gradients, and for slices of (dc_prev, db). Each recomputes the dz that it needs from the saved gates (elementwise, cheap
beside the products), so dz is never in memory. Nothing is summed across programs, so two runs agree bit for bit.
"""

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell_equations import states_of
from .cells import backward_of
from .config import cdiv, cell_backward_config
from .device import matmul_precision
from .gates import gate_rows, join_gates, load_gates
from .inputs import CellGradients, CellInputs, CellOptions, CellSaved
from .interleave import interleave
from .launch import Launcher, accumulator
from .tiles import choose_tile, count_tiles, load_tile, store_tile


@triton.jit
def _load(matrix, offs_b, mask_b, offs_h, mask_h, ACC: tl.constexpr):
    """Load a tile of matrix, (pointer, its strides); zeros where the pointer is None."""
    ptr, stride_b, stride_h = matrix
    tile = tl.zeros((offs_b.shape[0], offs_h.shape[0]), ACC)
    if ptr is not None:
        tile = load_tile(ptr, offs_b, mask_b, offs_h, mask_h, stride_b, stride_h).to(ACC)
    return tile


@triton.jit
def _gate_gradients(
    step,  # (gates, c, c_prev, dh, dc, seed, B, H); c_prev, dh and dc with their strides
    first_row,
    first_unit,
    BACKWARD: tl.constexpr,
    STATES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Return dz_i, dz_f, dz_g, dz_o [BLOCK_B, BLOCK_H] and dc_prev [BLOCK_B, STATES * BLOCK_H]; all are 0 past B and H."""
    gates_ptr, c_ptr, c_prev, dh, dc, seed_ptr, B, H = step
    offs_b = first_row + tl.arange(0, BLOCK_B)
    offs_h = first_unit + tl.arange(0, BLOCK_H)
    offs_c = first_unit * STATES + tl.arange(0, STATES * BLOCK_H)
    mask_b = offs_b < B
    mask_h = offs_h < H
    mask_c = offs_c < STATES * H
    i, f, g, o = load_gates(gates_ptr, offs_b.to(tl.int64), mask_b, first_unit, H, BLOCK_H)
    c_prev = _load(c_prev, offs_b, mask_b, offs_c, mask_c, ACC)
    c = _load((c_ptr, STATES * H, 1), offs_b, mask_b, offs_c, mask_c, ACC)
    dh = _load(dh, offs_b, mask_b, offs_h, mask_h, ACC)
    dc = _load(dc, offs_b, mask_b, offs_c, mask_c, ACC)
    at = None
    if seed_ptr is not None:
        at = (tl.load(seed_ptr), 0, offs_b, offs_h)
    return BACKWARD(i.to(ACC), f.to(ACC), g.to(ACC), o.to(ACC), c_prev, c, dh, dc, at)


@triton.jit
def _weight_gradient_tile(
    chosen,  # (out, a, N, strides of a)
    first_n,
    first_unit,
    step,
    BACKWARD: tl.constexpr,
    STATES: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one [4 * BLOCK_H, BLOCK_N] tile of dz^T a: of dW_hh (a = h_prev, N = H) or of dW_ih (a = x, N = I)."""
    out_ptr, a_ptr, N, stride_a_b, stride_a_n = chosen
    B, H = step[-2], step[-1]
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros((4 * BLOCK_H, BLOCK_N), ACC)
    for first_row in range(0, B, BLOCK_B):
        dz_i, dz_f, dz_g, dz_o, _ = _gate_gradients(
            step, first_row, first_unit, BACKWARD, STATES, ACC, BLOCK_B, BLOCK_H
        )
        dz = join_gates(dz_i, dz_f, dz_g, dz_o, BLOCK_B, BLOCK_H)
        offs_b = first_row + tl.arange(0, BLOCK_B)
        # dz is 0 there already, but Triton 3.6 and 3.7 cannot compile a reshape that feeds the product directly for sm_100.
        dz = tl.where((offs_b < B)[:, None], dz, 0.0)
        a = load_tile(a_ptr, offs_b, offs_b < B, offs_n, mask_n, stride_a_b, stride_a_n)
        acc = tl.dot(tl.trans(dz).to(a.dtype), a, acc, input_precision=PRECISION, out_dtype=ACC)
    rows, mask_rows = gate_rows(first_unit, H, BLOCK_H)
    store_tile(out_ptr, acc, rows, mask_rows, offs_n, mask_n, N)


@triton.jit
def _input_gradient_tile(
    chosen,  # (out, W, N, strides of W)
    first_n,
    first_row,
    step,
    BACKWARD: tl.constexpr,
    STATES: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one [BLOCK_B, BLOCK_N] tile of dz W: of dh_prev (W = W_hh, N = H) or of dx (W = W_ih, N = I)."""
    out_ptr, w_ptr, N, stride_w_row, stride_w_k = chosen
    B, H = step[-2], step[-1]
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_B, BLOCK_N), ACC)
    for first_unit in range(0, H, BLOCK_H):
        dz_i, dz_f, dz_g, dz_o, _ = _gate_gradients(
            step, first_row, first_unit, BACKWARD, STATES, ACC, BLOCK_B, BLOCK_H
        )
        dz = join_gates(dz_i, dz_f, dz_g, dz_o, BLOCK_B, BLOCK_H)
        rows, mask_rows = gate_rows(first_unit, H, BLOCK_H)
        w = load_tile(w_ptr, rows, mask_rows, offs_n, mask_n, stride_w_row, stride_w_k)
        acc = tl.dot(dz.to(w.dtype), w, acc, input_precision=PRECISION, out_dtype=ACC)
    offs_b = first_row + tl.arange(0, BLOCK_B)
    store_tile(out_ptr, acc, offs_b, offs_b < B, offs_n, mask_n, N)


@triton.jit
def _state_gradient_tile(
    tile,
    dc_prev_ptr,
    db_ih_ptr,
    db_hh_ptr,
    step,
    B,
    H,
    BACKWARD: tl.constexpr,
    STATES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute dc_prev of BLOCK_H units for the whole batch, and their four slices of db."""
    first_unit = tile * BLOCK_H
    offs_c = first_unit * STATES + tl.arange(0, STATES * BLOCK_H)
    db = tl.zeros((4 * BLOCK_H,), ACC)
    for first_row in range(0, B, BLOCK_B):
        dz_i, dz_f, dz_g, dz_o, dc_prev = _gate_gradients(
            step, first_row, first_unit, BACKWARD, STATES, ACC, BLOCK_B, BLOCK_H
        )
        if dc_prev_ptr is not None:
            offs_b = first_row + tl.arange(0, BLOCK_B)
            store_tile(dc_prev_ptr, dc_prev, offs_b, offs_b < B, offs_c, offs_c < STATES * H, STATES * H)
        db += tl.sum(interleave((dz_i, dz_f, dz_g, dz_o)), axis=0)
    n = tl.arange(0, 4 * BLOCK_H)
    units = first_unit + n // 4
    rows = n % 4 * H + units
    # Each bias has a gradient of its own, because a caller may change one in place.
    if db_ih_ptr is not None:
        tl.store(db_ih_ptr + rows, db.to(db_ih_ptr.dtype.element_ty), mask=units < H)
    if db_hh_ptr is not None:
        tl.store(db_hh_ptr + rows, db.to(db_hh_ptr.dtype.element_ty), mask=units < H)


@triton.jit(do_not_specialize=["B"])
def _lstm_cell_backward_kernel(
    # pointers: incoming gradients, inputs and saved tensors
    dh_ptr,  # [B, H] or None
    dc_ptr,  # [B, STATES * H] or None
    gates_ptr,  # [B, H, 4]
    x_ptr,  # [B, I]
    h_prev_ptr,  # [B, H]
    c_prev_ptr,  # [B, STATES * H]
    c_ptr,  # [B, STATES * H], contiguous
    w_ih_ptr,  # [4H, I]
    w_hh_ptr,  # [4H, H]
    seed_ptr,  # [1] seed of the cell's masks, or None
    # pointers: gradients out, each contiguous, or None where not needed
    dx_ptr,  # [B, I]
    dh_prev_ptr,  # [B, H]
    dc_prev_ptr,  # [B, STATES * H]
    dw_ih_ptr,  # [4H, I]
    dw_hh_ptr,  # [4H, H]
    db_ih_ptr,  # [4H]
    db_hh_ptr,  # [4H]
    # sizes
    B, I, H,
    # strides
    stride_dh_b, stride_dh_h, stride_dc_b, stride_dc_h, stride_x_b, stride_x_i, stride_h_prev_b, stride_h_prev_h,
    stride_c_prev_b, stride_c_prev_h, stride_w_ih_row, stride_w_ih_k, stride_w_hh_row, stride_w_hh_k,
    # meta-parameters; STATES: states per unit in c (interleave.py)
    BACKWARD: tl.constexpr, STATES: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of one timestep. The grid holds tiles of dW_hh | dW_ih, of dh_prev | dx, and of (dc_prev, db)."""
    c_prev = (c_prev_ptr, stride_c_prev_b, stride_c_prev_h)
    dh, dc = (dh_ptr, stride_dh_b, stride_dh_h), (dc_ptr, stride_dc_b, stride_dc_h)
    step = (gates_ptr, c_ptr, c_prev, dh, dc, seed_ptr, B, H)
    dw_hh = (dw_hh_ptr, h_prev_ptr, H, stride_h_prev_b, stride_h_prev_h)
    dw_ih = (dw_ih_ptr, x_ptr, I, stride_x_b, stride_x_i)
    dh_prev = (dh_prev_ptr, w_hh_ptr, H, stride_w_hh_row, stride_w_hh_k)
    dx = (dx_ptr, w_ih_ptr, I, stride_w_ih_row, stride_w_ih_k)
    tile = tl.program_id(0)
    if dw_hh_ptr is not None or dw_ih_ptr is not None:
        tiles_n = count_tiles(dw_hh, dw_ih, BLOCK_N)
        tiles = tl.cdiv(H, BLOCK_H) * tiles_n
        if tile < tiles:
            chosen, first_n = choose_tile(tile % tiles_n, dw_hh, dw_ih, BLOCK_N)
            first_unit = tile // tiles_n * BLOCK_H
            _weight_gradient_tile(
                chosen, first_n, first_unit, step, BACKWARD, STATES, ACC, PRECISION, BLOCK_B, BLOCK_H, BLOCK_N
            )
        tile -= tiles
    if dh_prev_ptr is not None or dx_ptr is not None:
        tiles_n = count_tiles(dh_prev, dx, BLOCK_N)
        tiles = tl.cdiv(B, BLOCK_B) * tiles_n
        if (tile >= 0) & (tile < tiles):
            chosen, first_n = choose_tile(tile % tiles_n, dh_prev, dx, BLOCK_N)
            first_row = tile // tiles_n * BLOCK_B
            _input_gradient_tile(
                chosen, first_n, first_row, step, BACKWARD, STATES, ACC, PRECISION, BLOCK_B, BLOCK_H, BLOCK_N
            )
        tile -= tiles
    if dc_prev_ptr is not None or db_ih_ptr is not None or db_hh_ptr is not None:
        if (tile >= 0) & (tile < tl.cdiv(H, BLOCK_H)):
            _state_gradient_tile(
                tile, dc_prev_ptr, db_ih_ptr, db_hh_ptr, step, B, H, BACKWARD, STATES, ACC, BLOCK_B, BLOCK_H
            )


_backward = Launcher(_lstm_cell_backward_kernel)


def lstm_cell_backward(
    grads: CellGradients,
    inputs: CellInputs,
    saved: CellSaved,
    needs: Collection[str],
    options: CellOptions = CellOptions(),
) -> dict[str, Tensor]:
    """Launch the backward kernel once.

    Args:
        grads: dh [B, H] and dc [B, STATES * H], of any strides, or None.
        inputs, options: those of `lstm_cell_forward`. saved: from its outputs.
        needs: the names of the inputs whose gradients are computed.

    Returns:
        These gradients by name, contiguous, each with memory of its own.
    """
    (dh, dc), (x, h_prev, c_prev, w_ih, w_hh, *_) = grads, inputs
    # A hook on saved tensors may return any strides.
    c, gates = saved.c.contiguous(), saved.gates.contiguous()
    (B, I), H = x.shape, h_prev.shape[1]
    # With B = 0 the weight and bias tiles still run and write their empty sums; with H = 0 there is no tile at all.
    allocate = torch.empty if H else torch.zeros
    dtype, device = x.dtype, x.device
    found = {
        name: allocate(t.shape, dtype=dtype, device=device)
        for name, t in zip(CellInputs._fields, inputs)
        if name in needs and t is not None
    }
    precision = matmul_precision(dtype, options.precision)
    config = cell_backward_config(B, dtype, precision)
    tiles_b, tiles_h = cdiv(B, config.block_b), cdiv(H, config.block_h)
    tiles_i_n, tiles_h_n = cdiv(I, config.block_n), cdiv(H, config.block_n)
    grid = (
        ("w_hh" in found) * tiles_h * tiles_h_n
        + ("w_ih" in found) * tiles_h * tiles_i_n
        + ("h" in found) * tiles_b * tiles_h_n
        + ("x" in found) * tiles_b * tiles_i_n
        + ("c" in found or "b_ih" in found or "b_hh" in found) * tiles_h
    )
    if grid == 0:
        return found
    arguments: dict[str, Any] = dict(dh_ptr=dh, dc_ptr=dc, gates_ptr=gates, c_ptr=c, B=B, I=I, H=H)
    arguments |= dict(x_ptr=x, h_prev_ptr=h_prev, c_prev_ptr=c_prev, w_ih_ptr=w_ih, w_hh_ptr=w_hh, seed_ptr=inputs.seed)
    outputs = dict(dx_ptr=found.get("x"), dh_prev_ptr=found.get("h"), dc_prev_ptr=found.get("c"))
    outputs |= dict(dw_ih_ptr=found.get("w_ih"), dw_hh_ptr=found.get("w_hh"))
    outputs |= dict(db_ih_ptr=found.get("b_ih"), db_hh_ptr=found.get("b_hh"))
    cell = dict(BACKWARD=backward_of(options.cell), STATES=states_of(options.cell))
    _backward((grid, 1, 1), config, arguments | outputs | cell | dict(ACC=accumulator(dtype), PRECISION=precision))
    return found
