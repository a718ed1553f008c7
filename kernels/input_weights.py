"""Copy W_ih and the biases of a layer, of both directions in one launch, into the order of its pre-activations."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LaunchConfig, cdiv
from .inputs import Direction
from .launch import Launcher, accumulator

_BLOCK_H, _BLOCK_I = 8, 128


@triton.jit(
    do_not_specialize=["H"],  # alignment follows from I alone
    do_not_specialize_on_alignment=["b_ih_ptr", "b_hh_ptr", "b_ih_reverse_ptr", "b_hh_reverse_ptr"],
)
def _lstm_input_weights_kernel(
    # pointers; those of direction 1 are None when D = 1
    w_ptr,  # [4H, I] W_ih of direction 0
    w_reverse_ptr,  # likewise of direction 1
    b_ih_ptr,  # [4H] or None
    b_hh_ptr,  # [4H] or None
    b_ih_reverse_ptr,
    b_hh_reverse_ptr,
    w_out_ptr,  # [D, H, 4, I] out
    b_out_ptr,  # [D, H, 4] out: the sum of both, or None
    # sizes
    H, I,
    # meta-parameters
    ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Copy rows gate * H + unit to rows 4 * unit + gate, for BLOCK_H units of one direction and BLOCK_I columns."""
    blocks = tl.cdiv(H, BLOCK_H)
    direction = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * (4 * BLOCK_H) + tl.arange(0, 4 * BLOCK_H)
    mask_n = n < 4 * H
    rows, rows_out = n % 4 * H + n // 4, direction * (4 * H) + n
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = mask_n[:, None] & (offs_i < I)[None, :]
    if w_reverse_ptr is not None:
        w_ptr = tl.where(direction == 0, w_ptr, w_reverse_ptr)
    w = tl.load(w_ptr + rows.to(tl.int64)[:, None] * I + offs_i[None, :], mask=mask)
    tl.store(w_out_ptr + rows_out.to(tl.int64)[:, None] * I + offs_i[None, :], w, mask=mask)
    if b_out_ptr is not None:
        if w_reverse_ptr is not None:
            b_ih_ptr = tl.where(direction == 0, b_ih_ptr, b_ih_reverse_ptr)
            b_hh_ptr = tl.where(direction == 0, b_hh_ptr, b_hh_reverse_ptr)
        # The programs of all columns store the same bits.
        b = tl.load(b_ih_ptr + rows, mask=mask_n).to(ACC) + tl.load(b_hh_ptr + rows, mask=mask_n).to(ACC)
        tl.store(b_out_ptr + rows_out, b.to(b_out_ptr.dtype.element_ty), mask=mask_n)


_launch = Launcher(_lstm_input_weights_kernel)


def input_weights(directions: Sequence[Direction], biases: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return W_ih of all directions [D * 4H, I] in the order d, unit, gate, and b_ih + b_hh [D * 4H] likewise, or None."""
    D, (rows, I), like = len(directions), directions[0].w_ih.shape, directions[0].w_ih
    w = torch.empty((D * rows, I), dtype=like.dtype, device=like.device)
    has_biases = biases and directions[0].b_ih is not None
    b = torch.empty(D * rows, dtype=like.dtype, device=like.device) if has_biases else None

    def arguments(direction: Direction | None, suffix: str) -> dict[str, Tensor | None]:
        w, _, *biases, _ = (None,) * 5 if direction is None else direction
        given = zip(("w", "b_ih", "b_hh"), (w, *(biases if has_biases else (None, None))))
        return {f"{name}{suffix}_ptr": None if t is None else t.contiguous() for name, t in given}

    grid = (D * cdiv(rows // 4, _BLOCK_H), max(cdiv(I, _BLOCK_I), 1), 1)
    outputs = dict(w_out_ptr=w, b_out_ptr=b, H=rows // 4, I=I)
    options = dict(ACC=accumulator(like.dtype), BLOCK_H=_BLOCK_H, BLOCK_I=_BLOCK_I)
    second = directions[1] if D == 2 else None
    _launch(grid, LaunchConfig(4, 1), arguments(directions[0], "") | arguments(second, "_reverse") | outputs | options)
    return w, b
