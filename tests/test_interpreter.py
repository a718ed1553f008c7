"""The repaired interpreter against torch, float64 and the documented accuracy of the hardware's instructions; and its checks,
which name an access out of bounds and an integer overflow, and let anything else pass."""

import inspect
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


# ---- what it computes ------------------------------------------------------------------------------------------------


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


def test_bfloat16_is_cast_as_torch_does():
    for source, dtype in (
        *((_every(torch.bfloat16), dtype) for dtype in (torch.float16, torch.float32, torch.float64)),
        *((source, torch.bfloat16) for source in (_every(torch.float16), _around_every_tie(), torch.arange(2**16))),
        (torch.arange(-288, 288, 9).bfloat16(), torch.int32),
    ):
        target = torch.empty(source.shape, dtype=dtype)
        _copy_kernel[(1,)](source, target, source.numel())
        _assert_identical(target, source.to(dtype))


@triton.jit
def _operation_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    if OPERATION == "product":
        x = x * x
    elif OPERATION == "constant":
        x = x + 1.0
    elif OPERATION == "comparison":
        x = x < x
    elif OPERATION == "negation":
        x = -x
    elif OPERATION == "fma":
        x = tl.fma(x, x, tl.load(y_ptr + tl.arange(0, SIZE)))
    elif OPERATION == "reduction":
        x = tl.sum(x, 0)
    elif OPERATION == "scan":
        x = tl.associative_scan(x, 0, tl.standard._sum_combine)
    elif OPERATION == "overflow":
        x = tl.exp(x)
        x = x / x + tl.max(x - x, 0)
    else:
        asm: tl.constexpr = OPERATION + " $0, $1;"
        x = tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(y_ptr + tl.arange(0, SIZE), x)


def _computed(operation: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.zeros_like(x) if y is None else y
    _operation_kernel[(1,)](x, y, operation, x.numel())
    return y


@pytest.mark.parametrize("operation", ["product", "constant", "comparison", "negation", "fma", "reduction", "scan"])
def test_other_operations_on_bfloat16_are_refused(operation):
    """Triton computes on the bit patterns."""
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        _computed(operation, torch.zeros(4, dtype=torch.bfloat16))
    _computed(operation, torch.zeros(4))


def test_arithmetic_of_the_hardware():
    """An fma rounds once; approximations are as accurate as documented, and have no subnormal numbers."""
    fused = _computed("fma", torch.tensor([1 + 2.0**-23]), torch.tensor([-1 - 2.0**-22]))
    assert fused.item() == 2.0**-46
    x = torch.linspace(-8, 8, 4096)
    for instruction, exact in (("ex2.approx.ftz.f32", torch.exp2), ("rcp.approx.ftz.f32", torch.reciprocal)):
        assert (_computed(instruction, x) / exact(x.double()) - 1).abs().max() <= 2.0**-22
    assert _computed("ex2.approx.ftz.f32", torch.tensor([-126.0, -127.0])).tolist() == [2.0**-126, 0.0]
    x = torch.tensor([2.0**127, -(2.0**127), math.inf, 2.0**-130, -(2.0**-130), math.nan, 1.0, 2.0])
    flushed = torch.tensor([0.0, -0.0, 0.0, math.inf, -math.inf, math.nan, 1.0, 0.5])
    _assert_identical(_computed("rcp.approx.ftz.f32", x), flushed)
    with pytest.raises(InterpreterError, match=r"sin\.approx\.f32.*INLINE_ASM"):
        _computed("sin.approx.f32", torch.zeros(4))


def test_numpy_is_silent_inside_kernels_only():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _computed("overflow", torch.full((4,), 1000.0)).isnan().all()
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


# ---- what it checks --------------------------------------------------------------------------------------------------


@triton.jit
def _access_kernel(x_ptr, first, limit, ACCESS: tl.constexpr):
    i = first + tl.arange(0, 4)
    if ACCESS == "load":
        tl.load(x_ptr + i, mask=i < limit)
    elif ACCESS == "store":
        tl.store(x_ptr + i, 1.0, mask=i < limit)
    elif ACCESS == "atomic":
        tl.atomic_add(x_ptr + i, 1.0, mask=i < limit)
    elif ACCESS == "compare and swap":
        tl.atomic_cas(x_ptr + first, 0, 1)
    elif ACCESS == "wide":
        tl.load((x_ptr + first).to(tl.pointer_type(tl.int64)))


@pytest.mark.parametrize("access, line", [("load", 3), ("store", 5), ("atomic", 7)])
def test_access_out_of_bounds_is_named(access, line):
    lines, start = inspect.getsourcelines(_access_kernel.fn)
    lines = lines[1:]  # without the decorator
    place = f"{__file__}:{start + 1 + line} in _access_kernel: `{lines[line].strip()}`"
    for first, outside, byte in ((6, "2 of 4", 32), (-1, "1 of 4", -4), (1000, "4 of 4", 4000)):
        with pytest.raises(InterpreterError) as error:
            _access_kernel[(1,)](torch.zeros(8), first, 10_000, access)
        message = str(error.value.__cause__)
        assert message.startswith(f"{access} out of bounds at {place}, program (0, 0, 0): ")
        assert f"{outside} elements, the first at byte {byte} of a tensor of 32 bytes" in message
    for first in (6, 1000):  # masked lanes may point anywhere
        _access_kernel[(1,)](torch.zeros(8), first, 8, access)


@pytest.mark.parametrize("access, last, named", [("compare and swap", 7, "atomic"), ("wide", 6, "load")])
def test_an_element_must_end_inside(access, last, named):
    _access_kernel[(1,)](torch.zeros(8, dtype=torch.int32), last, 0, access)
    with pytest.raises(InterpreterError, match=rf"{named} out of bounds at .*: `tl\.(atomic_cas|load)\("):
        _access_kernel[(1,)](torch.zeros(8, dtype=torch.int32), last + 1, 0, access)


def test_bounds_are_those_of_the_storages_of_this_launch():
    x, other = torch.zeros(8), torch.zeros(8)
    _access_kernel[(1,)](x[4:], -4, 4, "store")
    assert x.tolist() == [1.0] * 4 + [0.0] * 4, "a view may reach the rest of its storage"
    _access_kernel[(1,)](other, 0, 8, "store")
    elements_apart = (other.data_ptr() - x.data_ptr()) // 4
    with pytest.raises(InterpreterError, match="out of bounds"):
        _access_kernel[(1,)](x, elements_apart, elements_apart + 8, "store")


@triton.jit
def _product_kernel(x_ptr, factor, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + i, (i + 1) * factor)


def test_integer_overflow_is_an_error():
    """A GPU wraps around silently: an offset that needs 64 bits would read from somewhere else."""
    x = torch.zeros(4, dtype=torch.int64)
    for factor in (2**29 - 1, 2**40):  # the second makes a product of 64 bits
        _product_kernel[(1,)](x, factor, 4)
        assert x.tolist() == [n * factor for n in (1, 2, 3, 4)]
    with pytest.raises(InterpreterError, match=r"int32 overflow at .*test_interpreter\.py:\d+ in _product_kernel"):
        _product_kernel[(1,)](x, 2**29, 4)
