"""The repaired interpreter against torch, float64 and the documented accuracy of the hardware's instructions."""

import math
import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.interpreting import assert_identical
from triton.runtime.errors import InterpreterError

from lstm_triton.kernels import interpreter

pytestmark = pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")


@triton.jit
def _copy_kernel(source_ptr, target_ptr, SIZE: tl.constexpr):
    """Casts from the dtype of source to that of target."""
    i = tl.arange(0, SIZE)
    tl.store(target_ptr + i, tl.load(source_ptr + i).to(target_ptr.dtype.element_ty))


def _cast(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    _copy_kernel[(1,)](source, target, source.numel())
    return target


def _all_bfloat16() -> torch.Tensor:
    return torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)


def _random_bfloat16(size: int, seed: int) -> torch.Tensor:
    """Random bits, so every exponent, infinities and NaN."""
    bits = torch.randint(2**16, (size,), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint16).view(torch.bfloat16)


# ---- casts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_bfloat16_is_cast_as_torch_does(dtype):
    assert_identical(_cast(_all_bfloat16(), dtype), _all_bfloat16().to(dtype))


def test_float32_to_bfloat16_rounds_to_nearest_even():
    # Each of the 2^16 upper halves, with lower halves below, at and above the tie, and 0x7FFF + 1 that carries.
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF])
    bits = (torch.arange(2**16)[:, None] * 2**16 + lower).flatten()
    source = (bits - 2**32 * (bits >= 2**31)).to(torch.int32).view(torch.float32)
    assert_identical(_cast(source, torch.bfloat16), source.to(torch.bfloat16))


def test_float16_to_bfloat16():
    source = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    assert_identical(_cast(source, torch.bfloat16), source.to(torch.bfloat16))


def test_float64_to_bfloat16_rounds_once():
    # A tie, missed by less than float32 can tell: rounding to float32 on the way would make it a tie.
    lower = torch.arange(0x7F7F).to(torch.uint16).view(torch.bfloat16)
    upper = torch.arange(1, 0x7F80).to(torch.uint16).view(torch.bfloat16)
    even = torch.where(torch.arange(0x7F7F) % 2 == 0, lower, upper)
    tie = (lower.double() + upper.double()) / 2
    just_above, just_below = tie * (1 + 2.0**-45), tie * (1 - 2.0**-45)
    source = torch.cat([just_below, tie, just_above])
    source = torch.cat([source, -source])
    padded = torch.nn.functional.pad(source, (0, 2**18 - source.numel()))
    expected = torch.cat([lower, even, upper])
    expected = torch.cat([expected, -expected])
    assert_identical(_cast(padded, torch.bfloat16)[: source.numel()], expected)


def test_special_float64_to_bfloat16():
    source = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e300, -1e300, 1e-300, -1e-300, 3.4e38, 1.0, 2.0])
    source = torch.nn.functional.pad(source.double(), (0, 4))
    assert_identical(_cast(source, torch.bfloat16), source.to(torch.bfloat16))


def test_integers_to_bfloat16_and_back():
    source = torch.arange(-(2**16), 2**16, dtype=torch.int32)
    assert_identical(_cast(source, torch.bfloat16), source.to(torch.bfloat16))
    values = torch.randint(-300, 300, (64,)).to(torch.bfloat16)
    assert torch.equal(_cast(values, torch.int32), values.to(torch.int32))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, results_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(results_ptr + 0 * SIZE + i, x + y)
    tl.store(results_ptr + 1 * SIZE + i, x - y)
    tl.store(results_ptr + 2 * SIZE + i, x * y)
    tl.store(results_ptr + 3 * SIZE + i, x * 1.5)
    tl.store(results_ptr + 4 * SIZE + i, tl.abs(x))
    tl.store(results_ptr + 5 * SIZE + i, tl.where(x > 0, x, y))
    tl.store(results_ptr + 6 * SIZE + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(results_ptr + 7 * SIZE + i, -x)


def test_bfloat16_arithmetic_equals_torch():
    size = 2**14
    x, y = _random_bfloat16(size, 1), _random_bfloat16(size, 2)
    x[x == 0] = 1  # some versions of Triton negate 0 to 0 and not to -0
    results = torch.empty(8, size, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, results, size)
    expected = [x + y, x - y, x * y, x * 1.5, x.abs(), torch.where(x > 0, x, y), torch.maximum(x, y), -x]
    assert_identical(results, torch.stack(expected))


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr):
    tl.store(z_ptr, tl.fma(tl.load(x_ptr), tl.load(y_ptr), tl.load(z_ptr)))


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
def test_fma_does_not_round_the_product(dtype, bits):
    epsilon = 2.0 ** (1 - bits)
    x = torch.tensor([1 + epsilon], dtype=dtype)
    z = torch.tensor([-1 - 2 * epsilon], dtype=dtype)
    _fma_kernel[(1,)](x, x, z)
    assert z.item() == epsilon**2


@triton.jit
def _compare_kernel(x_ptr, y_ptr, results_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(results_ptr + 0 * SIZE + i, x < y)
    tl.store(results_ptr + 1 * SIZE + i, x <= y)
    tl.store(results_ptr + 2 * SIZE + i, x > y)
    tl.store(results_ptr + 3 * SIZE + i, x >= y)
    tl.store(results_ptr + 4 * SIZE + i, x == y)
    tl.store(results_ptr + 5 * SIZE + i, x != y)
    tl.store(results_ptr + 6 * SIZE + i, ((x < y) & (x > 0)).to(tl.float32))  # a comparison is a number like any other


def test_bfloat16_comparisons_equal_torch():
    size = 2**14
    x, y = _random_bfloat16(size, 3), _random_bfloat16(size, 4)
    y[: size // 4] = x[: size // 4]
    x[0], y[0] = 0.0, -0.0
    results = torch.empty(7, size)
    _compare_kernel[(1,)](x, y, results, size)
    expected = torch.stack([x < y, x <= y, x > y, x >= y, x == y, x != y, (x < y) & (x > 0)]).float()
    assert torch.equal(results, expected)


@triton.jit
def _reduce_kernel(x_ptr, results_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.arange(0, ROWS)
    x = tl.load(x_ptr + r[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(results_ptr + r, tl.sum(x, 1))
    tl.store(results_ptr + ROWS + r, tl.max(x, 1))
    tl.store(results_ptr + 2 * ROWS + r, tl.min(x, 1))
    tl.store(results_ptr + 3 * ROWS + r, tl.sum(tl.cumsum(x, 1), 1))
    tl.store(results_ptr + 4 * ROWS + r, tl.sum(tl.associative_scan(x, 1, tl.standard._prod_combine), 1))


def test_bfloat16_reductions():
    x = torch.randint(
        -2, 3, (8, 8), generator=torch.Generator().manual_seed(5)
    ).bfloat16()  # small: everything is exact
    results = torch.empty(5, 8, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](x, results, 8, 8)
    exact = x.double()
    expected = [exact.sum(1), exact.amax(1), exact.amin(1), exact.cumsum(1).sum(1), exact.cumprod(1).sum(1)]
    assert torch.equal(results, torch.stack(expected).bfloat16())


# ---- the rest --------------------------------------------------------------------------------------------------------


@triton.jit
def _runtime_range_kernel(x_ptr, start, end, step):
    for k in range(start, end, step):
        tl.store(x_ptr + k, k)


def test_range_of_runtime_integers():
    x = torch.zeros(10, dtype=torch.int32)
    _runtime_range_kernel[(1,)](x, 2, 10, 3)
    assert x.tolist() == [0, 0, 2, 0, 0, 5, 0, 0, 8, 0]


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


@pytest.mark.parametrize(
    "instruction, exact, least, most",
    [
        ("tanh.approx.f32", torch.tanh, 2.0**-12, 2.0**-11),  # as inexact as the hardware, and no more
        ("ex2.approx.ftz.f32", torch.exp2, 0.0, 2.0**-22),
        ("rcp.approx.ftz.f32", torch.reciprocal, 0.0, 2.0**-22),
    ],
)
def test_inline_asm_is_as_accurate_as_the_hardware(instruction, exact, least, most):
    x = torch.linspace(-8, 8, 4096)
    relative_error = (_asm(instruction, x) / exact(x.double()) - 1).abs().max().item()
    assert least <= relative_error <= most


def test_tanh_approx_of_special_values():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 100.0, -100.0, 2.0**-100])
    assert_identical(_asm("tanh.approx.f32", x), torch.tensor([0.0, -0.0, 1, -1, math.nan, 1, -1, 2.0**-100]))


def test_ftz_has_no_subnormal_numbers():
    x = torch.tensor([-126.0, -127.0, 2.0**127, -(2.0**127), math.inf, 2.0**-130, -(2.0**-130), math.nan])
    assert _asm("ex2.approx.ftz.f32", x)[:2].tolist() == [2.0**-126, 0.0]
    flushed = torch.tensor([0.0, -0.0, 0.0, math.inf, -math.inf, math.nan])
    assert_identical(_asm("rcp.approx.ftz.f32", x)[2:], flushed)
    assert_identical(_asm("rcp.approx.f32", x)[2:4], torch.tensor([2.0**-127, -(2.0**-127)]))


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
def _product_kernel(x_ptr, factor, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + i, (i + 1) * factor)


def test_integer_overflow_is_an_error():
    """A GPU wraps around silently: an offset that needs 64 bits would read from somewhere else."""
    x = torch.zeros(4, dtype=torch.int64)
    _product_kernel[(1,)](x, 2**29 - 1, 4)
    assert x.tolist() == [n * (2**29 - 1) for n in (1, 2, 3, 4)]
    _product_kernel[(1,)](x, 2**40, 4)  # that product is of 64 bits
    assert x[3] == 2**42
    with pytest.raises(InterpreterError, match=r"int32 overflow at .*test_interpreter\.py:\d+ in _product_kernel"):
        _product_kernel[(1,)](x, 2**29, 4)
