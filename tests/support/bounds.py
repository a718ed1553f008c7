"""Checks in the repaired interpreter: a kernel accesses the tensors of its launch alone, and every integer fits its type."""

from __future__ import annotations

import linecache
import os
import sys
import types
from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter as stock

from lstm_triton.kernels import interpreter

_NOT_KERNEL_CODE = (os.path.dirname(triton.__file__) + os.sep, __file__, interpreter.__file__)
_MAY_OVERFLOW = (np.add, np.subtract, np.multiply)


def install() -> None:
    """Repair the interpreter, and check in it; a second call changes nothing.

    An unmasked lane of a load, store or atomic outside the storages of the tensors given to the launch raises IndexError; a
    sum, difference or product that does not fit in its signed integer type raises OverflowError. Both name the source line.
    """
    interpreter.install()
    if not isinstance(stock.interpreter_builder, _CheckingBuilder):
        stock.interpreter_builder.__class__ = _CheckingBuilder
        interpreter.replace_in(stock.InterpretedFunction, "run", _with_fresh_bounds)
        interpreter.replace_in(stock, "_implicit_cvt", _noting_storages)


class _CheckingBuilder(interpreter.RepairedBuilder):
    # (first byte, byte past the end) of every storage of the launch, sorted; the first entry lies below all addresses.
    storages: list[tuple[int, int]] = [(0, 0)]

    def binary_op(self, lhs, rhs, op):
        if op in _MAY_OVERFLOW and lhs.dtype.scalar.is_int_signed() and lhs.data.dtype.itemsize < 8:
            wide, limits = op(lhs.data, rhs.data, dtype=np.int64), np.iinfo(lhs.data.dtype)
            if wide.min(initial=0) < limits.min or wide.max(initial=0) > limits.max:
                raise OverflowError(f"{lhs.data.dtype} overflow at {_kernel_line()}, program {self.grid_idx}")
        return super().binary_op(lhs, rhs, op)

    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        self._check("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        self._check("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_atomic_rmw(self, op, ptr, val, mask, *args):
        self._check("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *args)

    def create_atomic_cas(self, ptr, *args):
        self._check("atomic", ptr, types.SimpleNamespace(data=True))
        return super().create_atomic_cas(ptr, *args)

    def _check(self, access, pointers, mask):
        addresses = pointers.data[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)]
        starts, ends = np.array(self.storages, np.uint64).T
        end = ends[np.searchsorted(starts, addresses, "right") - 1]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        outside = (addresses >= end) | (end - addresses < size)  # unsigned: address + size might wrap around
        if outside.any():
            first = int(addresses[outside][0])
            start, end = min(self.storages, key=lambda extent: max(extent[0] - first, first - extent[1]))
            raise IndexError(
                f"{access} out of bounds at {_kernel_line()}, program {self.grid_idx}: {outside.sum()} of "
                f"{addresses.size} elements, the first at byte {first - start} of a tensor of {end - start} bytes"
            )


def _kernel_line() -> str:
    """Where the kernel is: the innermost frame outside Triton and the interpreter's repairs."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_NOT_KERNEL_CODE):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line} in {frame.f_code.co_name}: `{linecache.getline(file, line).strip()}`"


def _with_fresh_bounds(run):
    def checked(*args, **kwargs):
        stock.interpreter_builder.storages = [(0, 0)]
        return run(*args, **kwargs)

    return checked


def _noting_storages(implicit_cvt):
    """Every pointer a kernel gets is made here, once the arguments have reached their final place in memory."""

    def noting(arg):
        if hasattr(arg, "data_ptr"):
            storage = stock._unwrap_tensor(arg).untyped_storage()
            extent = (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
            stock.interpreter_builder.storages = sorted({extent, *stock.interpreter_builder.storages})
        return implicit_cvt(arg)

    return noting
