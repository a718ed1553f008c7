"""Record one call of a cell's function: what it reads by name, and whether a kernel could compute it."""

import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import operations
from .operations import aten


class CellError(TypeError):
    """A function cannot be a cell. The message names the operation and the line."""


class Named:
    """Tensors as attributes. AttributeError for a missing one names those that exist."""

    def __init__(self, kind: str, tensors: Mapping[str, Any]) -> None:
        self._kind, self._tensors = kind, tensors

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._tensors:
            raise AttributeError(f"{self._kind} are {', '.join(self._tensors) or 'none'}, not {name!r}")
        return self._tensors[name]


class Recorded(Mapping):
    """A mapping that records which keys are read."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors, self.used = tensors, dict[str, None]()

    def __getitem__(self, name: str) -> Any:
        self.used[name] = None
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class PreActivations(Named):
    """The pre-activations of all gates: their sums, and their two parts."""

    def __init__(self, sums: Mapping[str, Tensor], input: Named, recurrent: Named) -> None:
        super().__init__("gates", sums)
        self.input, self.recurrent = input, recurrent


class PointwiseOnly(TorchDispatchMode):
    """A mode in which an operation that a kernel could not compute raises CellError with its name and line."""

    def __init__(self, fail: Callable[[str], Exception]) -> None:
        super().__init__()
        self._fail = fail
        self.refusal: Exception | None = None

    def _refuse(self, what: str) -> None:
        self.refusal = self._fail(what)
        raise self.refusal

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":  # asks for a device or a size
            return func(*args, **(kwargs or {}))
        where = _line()
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self._refuse(f"{where}: a branch, or a number, that depends on values")
        from_outside = any(isinstance(t, Tensor) and not isinstance(t, FakeTensor) for t in args)
        if from_outside and func not in (aten.lift_fresh.default, aten.lift_fresh_copy.default):
            self._refuse(f"{where}: {func} of a tensor from outside the function, which may be a parameter of the cell")
        if func is operations.POWER and args[1] not in operations.EXPONENTS:
            self._refuse(f"{where}: {func} with the exponent {args[1]}, whose size is no multiple of 1/2 up to 4")
        if func in (aten.empty_like.default, aten.lift_fresh.default):  # it is known by what fills or takes it
            return func(*args, **(kwargs or {}))
        if func not in operations.ALLOWED:
            self._refuse(f"{where}: {func} is not a pointwise operation that the kernels have")
        found = func(*args, **(kwargs or {}))
        shapes = {tuple(t.shape) for t in (found if isinstance(found, tuple) else (found,))}
        if not shapes <= {(2, 3), (), (0,)}:
            self._refuse(f"{where}: {func} gives a tensor of another size than a gate's")
        return found


def _line() -> str:
    """Return file and line of the innermost call outside of torch and this package."""
    frame: Any = sys._getframe(2)
    while frame is not None and _is_library(frame):
        frame = frame.f_back
    if frame is None:
        return "somewhere"
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def line_of(error: BaseException, function: Callable) -> str:
    """Return file and line, as `_line`, of what raised the error in this function, or of the function."""
    places = [place for place in traceback.walk_tb(error.__traceback__) if not _is_library(place[0])]
    code, line = (
        (places[-1][0].f_code, places[-1][1]) if places else (function.__code__, function.__code__.co_firstlineno)
    )
    return f"{code.co_filename}, line {line}"


def _is_library(frame: Any) -> bool:
    return frame.f_globals.get("__name__", "").startswith((__name__.rpartition(".")[0], "torch"))
