"""One timestep of the LSTM forward, in a single launch.

Every program owns a tile of BLOCK_B batch rows and BLOCK_H hidden units with all four gates of each, so the projections
x W_ih^T and h W_hh^T, the bias, the activations and the update of c and h never leave registers.
"""

import torch
import triton
import triton.language as tl

from .cell_equations import states_of
from .cells import forward_of
from .config import cdiv, cell_forward_config
from .device import matmul_precision, multiprocessor_count
from .gates import gate_rows, split_gates, store_gates
from .inputs import CellInputs, CellOptions, CellOutputs
from .launch import Launcher, accumulator
from .tiles import add_projections


@triton.jit(do_not_specialize=["B"])
def _lstm_cell_forward_kernel(
    # pointers
    x_ptr,  # [B, I]
    h_prev_ptr,  # [B, H]
    c_prev_ptr,  # [B, STATES * H]
    w_ih_ptr,  # [4H, I]
    w_hh_ptr,  # [4H, H]
    b_ih_ptr,  # [4H] or None
    b_hh_ptr,  # [4H] or None
    seed_ptr,  # [1] of the cell's masks, or None
    h_ptr,  # [B, H] out
    c_ptr,  # [B, STATES * H] out
    gates_ptr,  # [B, H, 4] out, or None when no gradient will be asked for
    # sizes
    B, I, H,
    # strides
    stride_x_b, stride_x_i, stride_h_prev_b, stride_h_prev_h, stride_c_prev_b, stride_c_prev_h,
    stride_w_ih_row, stride_w_ih_k, stride_w_hh_row, stride_w_hh_k, stride_b_ih, stride_b_hh,
    # meta-parameters; STATES: those of a unit in c (states.py)
    FORWARD: tl.constexpr, STATES: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h, c = LSTM cell of x, h_prev, c_prev; one program owns BLOCK_B rows and BLOCK_H units with their four gates."""
    # One axis: the others end at 65,535 programs.
    tiles_h = tl.cdiv(H, BLOCK_H)
    first_unit = (tl.program_id(0) % tiles_h) * BLOCK_H
    offs_b = (tl.program_id(0) // tiles_h) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    rows, mask_rows = gate_rows(first_unit, H, BLOCK_H)

    z = tl.zeros((BLOCK_B, 4 * BLOCK_H), ACC)
    of_x = (x_ptr, w_ih_ptr, I, stride_x_b, stride_x_i, stride_w_ih_row, stride_w_ih_k)
    of_h = (h_prev_ptr, w_hh_ptr, H, stride_h_prev_b, stride_h_prev_h, stride_w_hh_row, stride_w_hh_k)
    z = add_projections(z, offs_b, mask_b, rows, mask_rows, of_x, of_h, BLOCK_K, PRECISION)
    if b_ih_ptr is not None:
        z += tl.load(b_ih_ptr + rows.to(tl.int64) * stride_b_ih, mask=mask_rows, other=0.0).to(ACC)[None, :]
    if b_hh_ptr is not None:
        z += tl.load(b_hh_ptr + rows.to(tl.int64) * stride_b_hh, mask=mask_rows, other=0.0).to(ACC)[None, :]

    offs_h = first_unit + tl.arange(0, BLOCK_H)
    mask = mask_b[:, None] & (offs_h < H)[None, :]
    offs_c = first_unit * STATES + tl.arange(0, STATES * BLOCK_H)
    mask_c = mask_b[:, None] & (offs_c < STATES * H)[None, :]
    offs_b = offs_b.to(tl.int64)
    c_prev_offsets = offs_b[:, None] * stride_c_prev_b + offs_c.to(tl.int64)[None, :] * stride_c_prev_h
    c_prev = tl.load(c_prev_ptr + c_prev_offsets, mask=mask_c, other=0.0).to(ACC)
    z_i, z_f, z_g, z_o = split_gates(z, BLOCK_B, BLOCK_H)
    at = None
    if seed_ptr is not None:
        at = (tl.load(seed_ptr), 0, offs_b, offs_h)
    i, f, g, o, c, h = FORWARD(z_i, z_f, z_g, z_o, c_prev, at)

    tl.store(h_ptr + offs_b[:, None] * H + offs_h[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)
    c_offsets = offs_b[:, None] * (STATES * H) + offs_c[None, :]
    tl.store(c_ptr + c_offsets, c.to(c_ptr.dtype.element_ty), mask=mask_c)
    if gates_ptr is not None:
        store_gates(gates_ptr, i, f, g, o, offs_b, mask_b, first_unit, H, BLOCK_B, BLOCK_H)


_forward = Launcher(_lstm_cell_forward_kernel)


def lstm_cell_forward(inputs: CellInputs, options: CellOptions = CellOptions(), save: bool = False) -> CellOutputs:
    """Launch the forward kernel once.

    Args:
        inputs: of one floating-point dtype and device, any strides; shapes are the caller's responsibility.
        save: also return the activated gates, which `lstm_cell_backward` needs.

    Returns:
        All contiguous, in the dtype of x.
    """
    x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, seed = inputs
    (B, I), H, dtype, device = x.shape, h_prev.shape[1], x.dtype, x.device
    h = torch.empty((B, H), dtype=dtype, device=device)
    c = torch.empty(c_prev.shape, dtype=dtype, device=device)
    gates = torch.empty((B, H, 4), dtype=dtype, device=device) if save else None
    if h.numel() == 0:
        return CellOutputs(h, c, gates)
    precision = matmul_precision(dtype, options.precision)
    config = cell_forward_config(B, H, dtype, precision, multiprocessor_count(device))
    weights = dict(w_ih_ptr=w_ih, w_hh_ptr=w_hh, b_ih_ptr=b_ih, b_hh_ptr=b_hh)
    arguments = dict(x_ptr=x, h_prev_ptr=h_prev, c_prev_ptr=c_prev, seed_ptr=seed, B=B, I=I, H=H, **weights)
    outputs = dict(h_ptr=h, c_ptr=c, gates_ptr=gates)
    cell = dict(FORWARD=forward_of(options.cell), STATES=states_of(options.cell))
    grid = (cdiv(H, config.block_h) * cdiv(B, config.block_b), 1, 1)
    _forward(grid, config, arguments | outputs | cell | dict(ACC=accumulator(dtype), PRECISION=precision))
    return CellOutputs(h, c, gates)
