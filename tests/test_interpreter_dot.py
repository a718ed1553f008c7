"""tl.dot in the repaired interpreter against float64: what it accumulates in, and what it drops of its operands."""

import math

import pytest
import torch
import triton
import triton.language as tl
from support.interpreting import assert_identical

from lstm_triton.kernels import interpreter

pytestmark = pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")

SIZE = 64


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, d_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    offsets = i[:, None] * SIZE + i[None, :]
    a = tl.load(a_ptr + offsets)
    b = tl.load(b_ptr + offsets)
    c = tl.load(c_ptr + offsets)
    tl.store(d_ptr + offsets, tl.dot(a, b, c, input_precision=PRECISION))


def _dot(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, precision: str | None = None) -> torch.Tensor:
    d = torch.empty(SIZE, SIZE)
    _dot_kernel[(1,)](a, b, c, d, SIZE, precision)
    return d


def _operands(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    a, b, c = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(3))
    return [a.to(dtype), b.to(dtype), c]


def _relative_error(d: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> float:
    """Largest error against float64, in units of what the products add up to without their signs."""
    a, b, c = a.double(), b.double(), c.double()
    return ((d - (a @ b + c)).abs() / (a.abs() @ b.abs() + c.abs())).max().item()


FLOAT32_BOUND = SIZE * 2.0**-24  # of a sum of SIZE products in any order; one bfloat16 rounding would be 2^-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_of_16_bits_accumulates_in_float32(dtype):
    a, b, c = _operands(dtype)
    assert _relative_error(_dot(a, b, c), a, b, c) < FLOAT32_BOUND


def test_dot_of_extreme_bfloat16():
    a, b, c = torch.eye(SIZE).bfloat16(), torch.full((SIZE, SIZE), 3e38).bfloat16(), torch.zeros(SIZE, SIZE)
    b[0, 0], b[1, 0], a[2, 0] = math.inf, 1e-30, math.nan
    assert_identical(_dot(a, b, c), a.float() @ b.float())


@pytest.mark.parametrize("precision", ["tf32", None])
def test_dot_of_tf32_truncates_its_operands(precision):
    a, b, c = _operands(torch.float32)
    d = _dot(a, b, c, precision)

    def truncated(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    assert _relative_error(d, truncated(a), truncated(b), c) < FLOAT32_BOUND
    assert 2.0**-14 < _relative_error(d, a, b, c) < 2.0**-9


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_dot_of_full_float32(precision):
    a, b, c = _operands(torch.float32)
    assert _relative_error(_dot(a, b, c, precision), a, b, c) < FLOAT32_BOUND
