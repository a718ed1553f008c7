"""The forward of one timestep, in one launch.

Every program owns BLOCK_B batch rows and BLOCK_H hidden units with all four gates, so the products x W_ih^T and h W_hh^T, the
biases, the activations and the update of c and h stay in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell_equations import states_of
from .cells import forward_of
from .config import cdiv, cell_forward_config
from .device import matmul_precision, multiprocessor_count
from .gates import gate_rows, split_gates, store_gates
from .inputs import CellInputs, CellOptions, CellOutputs
from .launch import Launcher, accumulator
from .tiles import add_projections, load_tile, store_tile


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
    seed_ptr,  # [1] seed of the cell's masks, or None
    h_ptr,  # [B, H] out
    c_ptr,  # [B, STATES * H] out
    y_ptr,  # [B, D, H] out: h once more, or None
    cells_ptr,  # [B, D, STATES * H] out: c once more, or None
    gates_ptr,  # [B, D, H, 4] out, or None when no gradient is recorded
    # sizes; D: directions of a layer, one of which this is, else 1
    B, I, H, D,
    # strides
    stride_x_b, stride_x_i, stride_h_prev_b, stride_h_prev_h, stride_c_prev_b, stride_c_prev_h,
    stride_w_ih_row, stride_w_ih_k, stride_w_hh_row, stride_w_hh_k, stride_b_ih, stride_b_hh,
    # meta-parameters; STATES: states per unit in c (interleave.py)
    FORWARD: tl.constexpr, STATES: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute h and c from x, h_prev and c_prev. One program owns BLOCK_B batch rows and BLOCK_H units with four gates."""
    # The grid has one axis, because CUDA limits the others to 65,535 programs.
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
    offs_c = first_unit * STATES + tl.arange(0, STATES * BLOCK_H)
    mask_h, mask_c = offs_h < H, offs_c < STATES * H
    offs_b = offs_b.to(tl.int64)
    c_prev = load_tile(c_prev_ptr, offs_b, mask_b, offs_c, mask_c, stride_c_prev_b, stride_c_prev_h).to(ACC)
    z_i, z_f, z_g, z_o = split_gates(z, BLOCK_B, BLOCK_H)
    at = None
    if seed_ptr is not None:
        at = (tl.load(seed_ptr), 0, offs_b, offs_h)
    i, f, g, o, c, h = FORWARD(z_i, z_f, z_g, z_o, c_prev, at)

    store_tile(h_ptr, h, offs_b, mask_b, offs_h, mask_h, H)
    store_tile(c_ptr, c, offs_b, mask_b, offs_c, mask_c, STATES * H)
    if y_ptr is not None:
        store_tile(y_ptr, h, offs_b, mask_b, offs_h, mask_h, D * H)
    if cells_ptr is not None:
        store_tile(cells_ptr, c, offs_b, mask_b, offs_c, mask_c, D * (STATES * H))
    if gates_ptr is not None:
        store_gates(gates_ptr, i, f, g, o, offs_b * D, mask_b, first_unit, H, BLOCK_H)


_forward = Launcher(_lstm_cell_forward_kernel)


def lstm_cell_forward(inputs: CellInputs, options: CellOptions = CellOptions(), save: bool = False) -> CellOutputs:
    """Launch the forward kernel once.

    Args:
        inputs: tensors of one floating-point dtype and device, of any strides. The caller checks them.
        save: also return the activated gates, which `lstm_cell_backward` needs.

    Returns:
        h [B, H], c [B, STATES * H] and gates [B, H, 4] or None, contiguous, in the dtype of x.
    """
    x, shape = inputs.x, inputs.h.shape
    h = torch.empty(shape, dtype=x.dtype, device=x.device)
    c = torch.empty(inputs.c.shape, dtype=x.dtype, device=x.device)
    gates = torch.empty((*shape, 4), dtype=x.dtype, device=x.device) if save else None
    outputs = CellOutputs(h, c, gates)
    if h.numel():
        launch_step(inputs, options, outputs)
    return outputs


def launch_step(
    inputs: CellInputs,
    options: CellOptions,
    outputs: CellOutputs,
    y: Tensor | None = None,
    cells: Tensor | None = None,
    D: int = 1,
) -> None:
    """Launch the forward kernel once, into the memory of outputs.

    Args:
        y, cells: [B, H] and [B, STATES * H], h and c once more, or None. D: rows of y, cells and gates are D times as long.
    """
    x, h_prev, c_prev, w_ih, w_hh, b_ih, b_hh, seed = inputs
    (B, I), H, dtype = x.shape, h_prev.shape[1], x.dtype
    precision = matmul_precision(dtype, options.precision)
    config = cell_forward_config(B, H, dtype, precision, multiprocessor_count(x.device))
    weights = dict(w_ih_ptr=w_ih, w_hh_ptr=w_hh, b_ih_ptr=b_ih, b_hh_ptr=b_hh)
    arguments = dict(x_ptr=x, h_prev_ptr=h_prev, c_prev_ptr=c_prev, seed_ptr=seed, B=B, I=I, H=H, D=D, **weights)
    results = dict(h_ptr=outputs.h, c_ptr=outputs.c, y_ptr=y, cells_ptr=cells, gates_ptr=outputs.gates)
    cell = dict(FORWARD=forward_of(options.cell), STATES=states_of(options.cell))
    grid = (cdiv(H, config.block_h) * cdiv(B, config.block_b), 1, 1)
    _forward(grid, config, arguments | results | cell | dict(ACC=accumulator(dtype), PRECISION=precision))
