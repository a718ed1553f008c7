"""How four gates share a tile: both orders, their inverses, and that nothing outside the masks is touched."""

import pytest
import torch
import triton
import triton.language as tl

from lstm_triton.kernels.gates import gate_rows, join_gates, load_gates, split_gates, store_gates


@triton.jit
def _split_weight_kernel(w_ptr, out_ptr, H, first_unit, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """A row of z is w[rows] in fragment order; store its four gates to [4, BLOCK_B, BLOCK_H]."""
    rows, mask = gate_rows(first_unit, H, BLOCK_H)
    z = tl.load(w_ptr + rows, mask=mask, other=-1.0)
    b = tl.arange(0, BLOCK_B)
    i, f, g, o = split_gates(z[None, :] + 1000.0 * b[:, None], BLOCK_B, BLOCK_H)
    offsets = b[:, None] * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    size = BLOCK_B * BLOCK_H
    tl.store(out_ptr + offsets, i)
    tl.store(out_ptr + size + offsets, f)
    tl.store(out_ptr + 2 * size + offsets, g)
    tl.store(out_ptr + 3 * size + offsets, o)


@triton.jit
def _split_join_kernel(x_ptr, out_ptr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    offsets = tl.arange(0, BLOCK_B)[:, None] * (4 * BLOCK_H) + tl.arange(0, 4 * BLOCK_H)[None, :]
    i, f, g, o = split_gates(tl.load(x_ptr + offsets), BLOCK_B, BLOCK_H)
    tl.store(out_ptr + offsets, join_gates(i, f, g, o, BLOCK_B, BLOCK_H))


@triton.jit
def _copy_kernel(in_ptr, out_ptr, B, H, first_row, first_unit, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Through load_gates and store_gates, the gates multiplied by 1, 2, 3 and 4 on the way."""
    rows = first_row + tl.arange(0, BLOCK_B)
    mask = rows < B
    rows = rows.to(tl.int64)
    i, f, g, o = load_gates(in_ptr, rows, mask, first_unit, H, BLOCK_B, BLOCK_H)
    store_gates(out_ptr, i, f * 2, g * 3, o * 4, rows, mask, first_unit, H, BLOCK_B, BLOCK_H)


@pytest.mark.parametrize("block_h", [4, 8, 16, 32])
@pytest.mark.parametrize("first_unit", [0, 16])
def test_rows_and_split_agree(first_unit, block_h, device):
    """Weight row gate * H + unit comes out as that gate and unit, for every unit that exists."""
    H, block_b = 27, 4
    w = torch.arange(4 * H, dtype=torch.float32, device=device)
    out = torch.full((4, block_b, block_h), torch.nan, device=device)
    _split_weight_kernel[(1,)](w, out, H, first_unit, block_b, block_h)
    for gate in range(4):
        for j in range(block_h):
            unit = first_unit + j
            expected = gate * H + unit if unit < H else -1
            assert out[gate, :, j].tolist() == [expected + 1000 * b for b in range(block_b)]


@pytest.mark.parametrize("block_h", [4, 8, 16])
def test_join_is_the_inverse_of_split(block_h, device):
    x = torch.randn(16, 4 * block_h, device=device)
    out = torch.full_like(x, torch.nan)
    _split_join_kernel[(1,)](x, out, 16, block_h)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, H", [(3, 5), (16, 4), (17, 19), (1, 1)])
def test_memory_order(B, H, dtype, device):
    """[B, H, 4], gates innermost, for rows and units that exist; the rest of the memory is left alone."""
    block_b, block_h = 16, 8
    x = torch.randint(1, 32, (B, H, 4), device=device).to(dtype)
    storage = torch.full((x.numel() + 64,), -1, dtype=dtype, device=device)
    for first_row in range(0, B, block_b):
        for first_unit in range(0, H, block_h):
            _copy_kernel[(1,)](x, storage[32:-32], B, H, first_row, first_unit, block_b, block_h)
    assert torch.equal(storage[32:-32].view(B, H, 4), x * torch.tensor([1, 2, 3, 4], dtype=dtype, device=device))
    assert (storage[:32] == -1).all() and (storage[-32:] == -1).all()


def test_missing_rows_and_units_load_as_zero(device):
    """Adding what lies outside must not change a sum: NaN there does not get in."""
    B, H = 3, 5
    storage = torch.full((16 * 32,), torch.nan, device=device)
    storage[: B * H * 4] = 1
    out = torch.full((16, 8, 4), torch.nan, device=device)
    _zero_fill_kernel[(1,)](storage, out, B, H, 16, 8)
    expected = torch.zeros(16, 8, 4, device=device)
    expected[:B, :H] = 1
    assert torch.equal(out, expected)


@triton.jit
def _zero_fill_kernel(in_ptr, out_ptr, B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    rows = tl.arange(0, BLOCK_B)
    i, f, g, o = load_gates(in_ptr, rows.to(tl.int64), rows < B, 0, H, BLOCK_B, BLOCK_H)
    everything = rows < BLOCK_B
    store_gates(out_ptr, i, f, g, o, rows.to(tl.int64), everything, 0, BLOCK_H, BLOCK_B, BLOCK_H)
