"""Repairs that make Triton's CPU interpreter (TRITON_INTERPRET=1) compute what a GPU computes.

Triton 3.6 ... 3.9 keeps bfloat16 in uint16 arrays and computes on the bit patterns, silently. After `install`
* casts to and from bfloat16 round to nearest even and keep NaN, and `tl.dot` multiplies the values; any other operation on
  bfloat16 raises NotImplementedError, since kernels compute in float32;
* `tl.dot` of float32 with input_precision "tf32", the default, drops the 13 low mantissa bits of both operands. It
  truncates: Triton gives the float32 registers to the tensor core without a cvt.rna.tf32, and the tensor core does not
  read those bits. "tf32x3" stays float32, whose error it nearly has;
* `tl.fma` of float32 rounds once;
* inline assembly of one instruction runs if INLINE_ASM has that instruction;
* `range(0, n)` with a runtime n works in Triton 3.6.0 with numpy 2.4;
* numpy does not warn of overflow and NaN inside a kernel, where they are intended;
* triton.language is patched once a launch and not at each call of an inner function, and what follows from the type of a
  block is computed once. Kernels of this package take a quarter of the time.

float8 stays as Triton has it, and `libdevice` still does not run.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

try:
    import numpy as np
    from triton.runtime import interpreter as stock

    _StockBuilder: Any = stock.InterpreterBuilder
except ModuleNotFoundError:  # numpy: the interpreter needs it, but a GPU does not
    _StockBuilder = object


_INTERPRETING = bool(triton.knobs.runtime.interpret)  # read once, before this package decorates a kernel


def is_interpreting() -> bool:
    """Return whether this package's kernels run in the interpreter (TRITON_INTERPRET=1)."""
    return _INTERPRETING


def programs_can_wait() -> bool:
    """Return whether programs of one launch run at the same time and may wait for each other; False in the interpreter."""
    return not is_interpreting()


def install() -> None:
    """Repair the interpreter for every kernel of this process; a second call changes nothing."""
    import triton.runtime.interpreter  # noqa: F401  without numpy this says so

    if not isinstance(stock.interpreter_builder, RepairedBuilder):
        stock.interpreter_builder.__class__ = RepairedBuilder
        # Its overflow check computes every operation three times, but asserts in debug mode only.
        stock.interpreter_builder.options = replace(stock.interpreter_builder.options, sanitize_overflow=False)
        replace_in(stock.ReduceScanOpInterface, "check_tensor", _refusing_bfloat16)
        replace_in(stock.InterpretedFunction, "run", _with_quiet_numpy)
        replace_in(stock, "_patch_lang", _once_a_launch)
        replace_in(stock, "_get_np_dtype", _once_a_type)
        replace_in(tl.block_type, "__init__", _once_a_shape)
        replace_in(tl.tensor, "__init__", _once_a_block)
        replace_in(stock.TritonSemantic, "broadcast_impl_value", _unless_alike)


def replace_in(owner: Any, name: str, repair: Callable) -> None:
    """Replace owner.name by repair(owner.name)."""
    setattr(owner, name, repair(getattr(owner, name)))


# PTX instruction -> numpy function as accurate as the PTX manual promises. ".ftz" flushes subnormal numbers to zero.
INLINE_ASM: dict[str, Callable[..., Any]] = {
    "ex2.approx.ftz.f32": lambda x: np.exp2(x),
    "rcp.approx.ftz.f32": lambda x: np.reciprocal(x),
}


class RepairedBuilder(_StockBuilder):
    def get_bf16(self, value):  # Triton up to 3.8 has none
        return self.cast_impl(stock.TensorHandle(np.array([value], np.float32), tl.float32), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        if _is_bfloat16(src) == (dst_type.scalar == tl.bfloat16):
            return super().cast_impl(src, dst_type)
        if _is_bfloat16(src):
            values = (src.data.astype(np.uint32) << 16).view(np.float32)
            return stock.TensorHandle(values.astype(stock._get_np_dtype(dst_type), copy=False), dst_type.scalar)
        values = torch.from_numpy(np.array(src.data, np.float32)).bfloat16()
        return stock.TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    def binary_op(self, lhs, rhs, op):
        _refuse_bfloat16(lhs)
        result = super().binary_op(lhs, rhs, op)
        # Triton 3.9 gives a comparison the dtype of its operands, and a mask of integers is refused when it is used.
        return stock.TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    def unary_op(self, arg, op):
        _refuse_bfloat16(arg)
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        _refuse_bfloat16(z)
        if z.data.dtype != np.float32:
            return super().create_fma(x, y, z)
        exact_product = x.data.astype(np.float64) * y.data
        return stock.TensorHandle((exact_product + z.data).astype(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, *rest):
        if a.data.itemsize == 2:
            a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
        elif a.data.dtype == np.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            a, b = map(_truncated_to_tf32, (a, b))
        return super().create_dot(a, b, d, input_precision, *rest)

    def create_inline_asm(self, asm, constraints, values, result_types, is_pure, pack):
        instruction = asm.split()[0]
        if instruction not in INLINE_ASM:
            raise NotImplementedError(f"inline assembly {instruction!r} has no function in INLINE_ASM to stand for it")
        result = _flushed(INLINE_ASM[instruction](*(_flushed(value.data) for value in values)))
        return types.SimpleNamespace(get_result=[stock.TensorHandle(result, tl.float32)].__getitem__)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _refuse_bfloat16(operand: Any) -> None:
    if _is_bfloat16(operand):
        raise NotImplementedError("the interpreter does not compute in bfloat16: cast to float32 first")


def _truncated_to_tf32(operand: Any) -> Any:
    return stock.TensorHandle((operand.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), tl.float32)


def _flushed(values: np.ndarray) -> np.ndarray:
    """Flush subnormal float32 to zeros of their sign."""
    return np.where(np.abs(values) < np.float32(2**-126), np.copysign(np.float32(0), values), values)


def _refusing_bfloat16(check_tensor):
    """Refuse bfloat16 in reductions and scans, which have numpy functions of their own."""

    def repaired(self, operands):
        for operand in operands:
            _refuse_bfloat16(operand)
        check_tensor(self, operands)

    return repaired


def _with_quiet_numpy(run):
    def repaired(*args, **kwargs):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # tl.max of nothing but NaN
            return run(*args, **kwargs)

    return repaired


def _once_a_launch(patch_lang):
    def repaired(fn):
        languages = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return stock._LangPatchScope()
        scope = patch_lang(fn)
        # Triton 3.6.0 calls int() on an array of one element, which numpy 2.4 refuses.
        scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        return scope

    return repaired


def _once_a_type(get_np_dtype):
    """Cache numpy's dtype for Triton's, for which Triton builds a table at each use."""
    known: dict[str, Any] = {}

    def repaired(dtype):
        name = dtype.scalar.name
        if (found := known.get(name)) is None:
            found = known[name] = get_np_dtype(dtype)
        return found

    return repaired


def _once_a_shape(init):
    """Cache the attributes of block types by elements and shape."""
    known: dict[tuple, dict[str, Any]] = {}

    def repaired(self, element_ty, shape):
        key = element_ty.name, *shape
        if (found := known.get(key)) is None:
            init(self, element_ty, shape)
            found = known[key] = dict(vars(self))
        vars(self).update(found)

    return repaired


def _once_a_block(init):
    """Cache the attributes of tensors, which except for the handle follow from the type."""
    known: dict[str, dict[str, Any]] = {}

    def repaired(self, handle, type):
        if (found := known.get(type.name)) is None:
            init(self, handle, type)
            found = known[type.name] = {**vars(self), "handle": None}
        vars(self).update(found, handle=handle, type=type)

    return repaired


def _unless_alike(broadcast):
    """Skip the broadcast of blocks of the same shape."""

    def repaired(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        return (lhs, rhs) if a.is_block() and b.is_block() and a.shape == b.shape else broadcast(self, lhs, rhs)

    return repaired
