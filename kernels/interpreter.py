"""Repairs that make Triton's CPU interpreter (TRITON_INTERPRET=1) compute what a GPU computes.

Triton 3.6 ... 3.9 keeps bfloat16 in uint16 arrays and mostly computes on the bit patterns, silently. After `install`
* casts to bfloat16 round once, to nearest even, and keep NaN; sums, products, comparisons, reductions and scans of
  bfloat16 compute in float32 and round the result; a bfloat16 may meet a Python number (`x * 2.0`);
* `tl.dot` of float16 and bfloat16 multiplies the values and accumulates in float32;
* `tl.dot` of float32 with input_precision "tf32", the default, drops the 13 low mantissa bits of both operands. It
  truncates: Triton gives the float32 registers to the tensor core without a cvt.rna.tf32, and the tensor core does not
  read those bits. "tf32x3" stays float32, whose error it nearly has;
* inline assembly of one instruction runs if INLINE_ASM has that instruction;
* `range(0, n)` with a runtime n works in Triton 3.6.0 with numpy 2.4;
* numpy does not warn of overflow and NaN inside a kernel, where they are intended;
* a kernel's inner functions get triton.language as the launch has patched it, instead of a search at each call, and results
  that Triton computes at each operation are cached (`interpreter_caches`), which saves a fifth to a third of the time.

float8 stays as Triton has it, and `libdevice` still does not run.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from . import interpreter_caches as caches

try:
    import numpy as np
    from triton.runtime import interpreter as stock

    _StockBuilder: Any = stock.InterpreterBuilder
except ModuleNotFoundError:  # numpy: the interpreter needs it, but a GPU does not
    _StockBuilder = object

_repairs = contextlib.ExitStack()


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
        replace_in(stock.interpreter_builder, "__class__", lambda _: RepairedBuilder)
        replace_in(stock.ReduceOps, "apply_impl", _in_float32)
        replace_in(stock.ScanOps, "apply_impl", _in_float32)
        replace_in(stock.InterpretedFunction, "run", _with_quiet_numpy)
        replace_in(stock, "_patch_lang_tensor", _with_index_of_one_element)
        replace_in(stock, "_patch_lang", _once_a_launch)
        replace_in(stock, "_get_np_dtype", caches.once_a_type)
        replace_in(tl.block_type, "__init__", caches.once_a_shape)
        replace_in(tl.tensor, "__init__", caches.once_a_block)
        replace_in(stock.TritonSemantic, "broadcast_impl_value", caches.unless_alike)
        # Its check of overflow works out every operation three times and then asserts nothing but in debug mode.
        replace_in(stock.interpreter_builder, "options", lambda options: replace(options, sanitize_overflow=False))


def uninstall() -> None:
    """Give the interpreter back as Triton made it."""
    _repairs.close()


def replace_in(owner: Any, name: str, repair: Callable) -> None:
    """Replace owner.name by repair(owner.name) until `uninstall`."""
    original = getattr(owner, name)
    setattr(owner, name, repair(original))
    _repairs.callback(setattr, owner, name, original)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    # To float32 towards zero with a sticky last bit ("to odd"): rounding that again equals rounding once.
    nearest = values.astype(np.float32)
    towards_zero = nearest.view(np.uint32) - (np.abs(nearest) > np.abs(values))
    bits = towards_zero | (nearest != values)
    # Adding just under half a unit of the kept part (exactly half if that is odd) carries where rounding goes up.
    nearest_even = bits + 0x7FFF + (bits >> 16 & 1)
    quiet_nan = bits | 0x400000
    return (np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet_nan, nearest_even) >> 16).astype(np.uint16)


def _truncated_to_tf32(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _rounded_to_11_bits(values: np.ndarray) -> np.ndarray:
    scaled = values * np.float32(2**13 + 1)  # Veltkamp's splitting keeps 24 - 13 significant bits
    return scaled - (scaled - values)


def _flushed(values: np.ndarray) -> np.ndarray:
    """Flush subnormal float32 to zeros of their sign."""
    return np.where(np.abs(values) < np.float32(2**-126), np.copysign(np.float32(0), values), values)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _decode(handle: Any) -> np.ndarray:
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if _is_bfloat16(handle) else handle.data


def _encode(values: np.ndarray, dtype: Any) -> Any:
    is_bfloat16 = dtype.scalar == tl.bfloat16
    data = _to_bfloat16(values) if is_bfloat16 else values.astype(stock._get_np_dtype(dtype.scalar), copy=False)
    return stock.TensorHandle(data, dtype.scalar)


# PTX instruction, less .ftz, which flushes subnormal numbers to zero -> numpy function of its float32 operands as accurate as
# the PTX manual promises: relative error 2^-11 for tanh, which is therefore rounded to 11 bits, and nearly float32's own for
# the others.
INLINE_ASM: dict[str, Callable[..., Any]] = {
    "tanh.approx.f32": lambda x: _rounded_to_11_bits(np.tanh(x)),
    "ex2.approx.f32": lambda x: np.exp2(x),
    "rcp.approx.f32": lambda x: np.reciprocal(x),
}


class RepairedBuilder(_StockBuilder):
    def get_bf16(self, value):
        return _encode(np.array([value], np.float64), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        if _is_bfloat16(src) != (dst_type.scalar == tl.bfloat16):
            return _encode(_decode(src), dst_type)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        # Triton 3.9 casts float16 <-> bfloat16 here; other casts here are of float8 or with an explicit rounding.
        if {src.dtype.scalar, dst_type.scalar} == {tl.float16, tl.bfloat16}:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not _is_bfloat16(lhs):
            result = super().binary_op(lhs, rhs, op)
            # Triton 3.9 gives a comparison the dtype of its operands, and a mask of integers is refused when it is used.
            return stock.TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result
        result = op(_decode(lhs), _decode(rhs))
        return _encode(result, tl.int1 if result.dtype == np.bool_ else tl.bfloat16)

    def unary_op(self, arg, op):
        return _encode(op(_decode(arg)), tl.bfloat16) if _is_bfloat16(arg) else super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        # float64 holds the product of two narrower floats exactly, as a fused multiply-add does.
        if z.data.dtype == np.float64:
            return super().create_fma(x, y, z)
        return _encode(_decode(x).astype(np.float64) * _decode(y) + _decode(z), z.dtype)

    def create_dot(self, a, b, d, input_precision, *rest):
        if a.data.dtype == np.float16 or _is_bfloat16(a):
            product = np.matmul(_decode(a).astype(np.float32), _decode(b).astype(np.float32))
        elif a.data.dtype == np.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            product = np.matmul(_truncated_to_tf32(a.data), _truncated_to_tf32(b.data))
        else:
            return super().create_dot(a, b, d, input_precision, *rest)
        return _encode(product + _decode(d), d.dtype)

    def create_inline_asm(self, asm, constraints, values, result_types, is_pure, pack):
        name = asm.split()[0]
        instruction = name.replace(".ftz", "")
        if instruction not in INLINE_ASM:
            raise NotImplementedError(f"inline assembly {instruction!r} has no function in INLINE_ASM to stand for it")
        flushed = _flushed if name != instruction else np.asarray
        result = flushed(INLINE_ASM[instruction](*(flushed(_decode(value)) for value in values)))
        return types.SimpleNamespace(get_result=[_encode(result, result_types[0])].__getitem__)


def _in_float32(apply_impl):
    """Repair reductions and scans with a numpy function of their own, whose only operand may be bfloat16."""

    def repaired(self, operands):
        if len(operands) > 1 or operands[0].dtype != tl.bfloat16:
            return apply_impl(self, operands)
        cast = stock.interpreter_semantic.cast
        result = apply_impl(self, (cast(operands[0], tl.float32),))
        return (cast(result[0] if isinstance(result, (tuple, list)) else result, tl.bfloat16),)

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
        return patch_lang(fn)

    return repaired


def _with_index_of_one_element(patch_lang_tensor):
    """Repair Triton 3.6.0, which calls int() on an array of one element; numpy 2.4 refuses that."""

    def repaired(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return repaired
