"""Checks in the interpreter: an access outside the bounds and an integer overflow are named, anything else passes."""

import inspect

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from lstm_triton.kernels import interpreter

pytestmark = pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")


@triton.jit
def _load_kernel(x_ptr, first, limit, SIZE: tl.constexpr):
    i = first + tl.arange(0, SIZE)
    tl.load(x_ptr + i, mask=i < limit)


@triton.jit
def _store_kernel(x_ptr, first, limit, SIZE: tl.constexpr):
    i = first + tl.arange(0, SIZE)
    tl.store(x_ptr + i, 1.0, mask=i < limit)


@triton.jit
def _atomic_kernel(x_ptr, first, limit, SIZE: tl.constexpr):
    i = first + tl.arange(0, SIZE)
    tl.atomic_add(x_ptr + i, 1.0, mask=i < limit)


@pytest.mark.parametrize("kernel", [_load_kernel, _store_kernel, _atomic_kernel])
@pytest.mark.parametrize("first, outside, byte", [(6, "2 of 4", 32), (-1, "1 of 4", -4), (1000, "4 of 4", 4000)])
def test_access_out_of_bounds_is_named(kernel, first, outside, byte):
    name = kernel.fn.__name__
    lines, start = inspect.getsourcelines(kernel.fn)
    place = f"{__file__}:{start + len(lines) - 1} in {name}: `{lines[-1].strip()}`"
    with pytest.raises(InterpreterError) as error:
        kernel[(1,)](torch.zeros(8), first, 10_000, 4)
    message = str(error.value.__cause__)
    assert message.startswith(f"{name.split('_')[1]} out of bounds at {place}, program (0, 0, 0): ")
    assert f"{outside} elements, the first at byte {byte} of a tensor of 32 bytes" in message
    for first in (6, 1000):  # masked lanes may point anywhere
        kernel[(1,)](torch.zeros(8), first, 8, 4)


@triton.jit
def _compare_and_swap_kernel(x_ptr, first):
    tl.atomic_cas(x_ptr + first, 0, 1)


def test_compare_and_swap_out_of_bounds_is_named():
    with pytest.raises(InterpreterError, match=r"atomic out of bounds at .*: `tl\.atomic_cas\("):
        _compare_and_swap_kernel[(1,)](torch.zeros(8, dtype=torch.int32), 8)
    _compare_and_swap_kernel[(1,)](torch.zeros(8, dtype=torch.int32), 7)


@triton.jit
def _wide_load_kernel(x_ptr):
    tl.load(x_ptr.to(tl.pointer_type(tl.int32)))


def test_an_element_that_begins_inside_must_end_inside():
    _wide_load_kernel[(1,)](torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(InterpreterError, match="out of bounds"):
        _wide_load_kernel[(1,)](torch.zeros(1, dtype=torch.bfloat16))


def test_bounds_are_those_of_this_launch():
    other = torch.zeros(8)
    _store_kernel[(1,)](other, 0, 8, 8)
    x = torch.zeros(8)
    elements_apart = (other.data_ptr() - x.data_ptr()) // 4
    with pytest.raises(InterpreterError, match="out of bounds"):
        _store_kernel[(1,)](x, elements_apart, elements_apart + 8, 8)


def test_a_view_may_reach_the_rest_of_its_storage():
    x = torch.zeros(8)
    _store_kernel[(1,)](x[4:], -4, 4, 8)
    assert x.eq(1).all()


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
    with pytest.raises(
        InterpreterError, match=r"int32 overflow at .*test_interpreter_bounds\.py:\d+ in _product_kernel"
    ):
        _product_kernel[(1,)](x, 2**29, 4)
