"""The repaired interpreter against torch, float64 and the documented accuracy of the hardware's instructions."""

import math
import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from lstm_triton.kernels import interpreter

pytestmark = pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")


def _assert_identical(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, except that one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(actual[number].view(integer), expected[number].view(integer))


@triton.jit
def _copy_kernel(source_ptr, target_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(target_ptr + i, tl.load(source_ptr + i).to(target_ptr.dtype.element_ty))


def _every(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(2**16).to(torch.uint16).view(dtype)


def _around_every_tie() -> torch.Tensor:
    """float32: each of the 2^16 upper halves, with lower halves below, at and above the tie, and 0x7FFF + 1 that carries."""
    bits = torch.arange(2**16)[:, None] * 2**16 + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF])
    return (bits - 2**32 * (bits >= 2**31)).to(torch.int32).view(torch.float32).flatten()


@pytest.mark.parametrize(
    "source, dtype",
    [
        *((_every(torch.bfloat16), dtype) for dtype in (torch.float16, torch.float32, torch.float64)),
        *((source, torch.bfloat16) for source in (_every(torch.float16), _around_every_tie(), torch.arange(2**16))),
        (torch.arange(-288, 288, 9).bfloat16(), torch.int32),
    ],
    ids=lambda value: str(value if isinstance(value, torch.dtype) else value.dtype),  # workers have to name them alike
)
def test_bfloat16_is_cast_as_torch_does(source, dtype):
    target = torch.empty(source.shape, dtype=dtype)
    _copy_kernel[(1,)](source, target, source.numel())
    _assert_identical(target, source.to(dtype))


@triton.jit
def _bfloat16_kernel(x_ptr, OPERATION: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    if OPERATION == "product":
        x = x * x
    elif OPERATION == "constant":
        x = x + 1.0
    elif OPERATION == "comparison":
        x = x < x
    elif OPERATION == "negation":
        x = -x
    elif OPERATION == "fma":
        x = tl.fma(x, x, x)
    elif OPERATION == "reduction":
        x = tl.sum(x, 0)
    elif OPERATION == "scan":
        x = tl.associative_scan(x, 0, tl.standard._sum_combine)


@pytest.mark.parametrize("operation", ["product", "constant", "comparison", "negation", "fma", "reduction", "scan"])
def test_other_operations_on_bfloat16_are_refused(operation):
    """Triton computes on the bit patterns."""
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        _bfloat16_kernel[(1,)](torch.zeros(4, dtype=torch.bfloat16), operation)


@triton.jit
def _fma_kernel(x_ptr, z_ptr):
    tl.store(z_ptr, tl.fma(tl.load(x_ptr), tl.load(x_ptr), tl.load(z_ptr)))


def test_fma_does_not_round_the_product():
    x, z = torch.tensor([1 + 2.0**-23]), torch.tensor([-1 - 2.0**-22])
    _fma_kernel[(1,)](x, z)
    assert z.item() == 2.0**-46


@triton.jit
def _asm_kernel(x_ptr, y_ptr, INSTRUCTION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    asm: tl.constexpr = INSTRUCTION + " $0, $1;"
    y = tl.inline_asm_elementwise(asm, "=f,f", [tl.load(x_ptr + i)], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(y_ptr + i, y)


def _asm(instruction: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _asm_kernel[(1,)](x, y, instruction, x.numel())
    return y


@pytest.mark.parametrize("instruction, exact", [("ex2", torch.exp2), ("rcp", torch.reciprocal)])
def test_inline_asm_is_as_accurate_as_the_hardware(instruction, exact):
    x = torch.linspace(-8, 8, 4096)
    assert (_asm(f"{instruction}.approx.ftz.f32", x) / exact(x.double()) - 1).abs().max() <= 2.0**-22


def test_ftz_has_no_subnormal_numbers():
    assert _asm("ex2.approx.ftz.f32", torch.tensor([-126.0, -127.0])).tolist() == [2.0**-126, 0.0]
    x = torch.tensor([2.0**127, -(2.0**127), math.inf, 2.0**-130, -(2.0**-130), math.nan, 1.0, 2.0])
    flushed = torch.tensor([0.0, -0.0, 0.0, math.inf, -math.inf, math.nan, 1.0, 0.5])
    _assert_identical(_asm("rcp.approx.ftz.f32", x), flushed)


def test_unknown_inline_asm_is_refused_by_name():
    with pytest.raises(InterpreterError, match=r"sin\.approx\.f32.*INLINE_ASM"):
        _asm("sin.approx.f32", torch.zeros(4))


@triton.jit
def _overflow_kernel(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.exp(tl.load(x_ptr + i))
    tl.store(x_ptr + i, x / x + tl.max(x - x, 0))


def test_numpy_is_silent_inside_kernels_only():
    x = torch.full((4,), 1000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _overflow_kernel[(1,)](x, 4)
    assert x.isnan().all()
    with pytest.warns(RuntimeWarning, match="overflow"):
        np.exp(np.full(1, 1000, np.float32))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, d_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    offsets = i[:, None] * SIZE + i[None, :]
    a, b, c = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), tl.load(c_ptr + offsets)
    tl.store(d_ptr + offsets, tl.dot(a, b, c, input_precision=PRECISION))


@pytest.mark.parametrize(
    "dtype, precision, truncates",
    [
        (torch.bfloat16, None, False),
        (torch.float16, None, False),
        (torch.float32, None, True),
        (torch.float32, "tf32", True),
        (torch.float32, "tf32x3", False),
        (torch.float32, "ieee", False),
    ],
    ids=str,
)
def test_dot_accumulates_in_float32(dtype, precision, truncates):
    size = 64
    a, b, c, d = (torch.randn(size, size) for _ in range(4))
    a, b = a.to(dtype), b.to(dtype)
    _dot_kernel[(1,)](a, b, c, d, size, precision)
    if truncates:
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    a, b, c = a.double(), b.double(), c.double()
    error = (d - (a @ b + c)).abs() / (a.abs() @ b.abs() + c.abs())
    # The bound of a sum of `size` products in any order. A rounding to bfloat16 would be 2^-9, one to TF32 2^-11.
    assert error.max() < size * 2.0**-24
