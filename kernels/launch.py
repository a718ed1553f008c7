"""From a launch configuration to a running kernel, with nothing done per call that can be done once."""

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import JITFunction, driver

from . import device as device_module
from .config import LaunchConfig
from .device import refuse_capture
from .figures import DeviceFigures

_MAX_KEPT = 4096  # compiled-kernel references kept per kernel; a workload with more distinct shapes starts over


class Launcher:
    """Calls one @triton.jit kernel, whose parameters are pointers, named ..._ptr, then integers, then meta-parameters.

    Triton's own launch works out, on every call, which specialization the arguments need. It depends on dtypes, 16-byte
    alignment, meta-parameters and the integers that the kernel specialises, at most: the compiled kernel is kept under those,
    and later called directly.
    """

    _all: weakref.WeakSet["Launcher"] = weakref.WeakSet()

    def __init__(self, kernel) -> None:
        self._all.add(self)
        self.kernel = kernel
        self._compiled: dict[tuple, Any] = {}
        self._is_compiled = isinstance(kernel, JITFunction)  # else Triton's interpreter runs it
        if not self._is_compiled:
            return
        names = [p.name for p in kernel.params]
        pointers = [name for name in names if name.endswith("_ptr")]
        integers = [p for p in kernel.params if not (p.is_constexpr or p.name.endswith("_ptr"))]
        constants = [p.name for p in kernel.params if p.is_constexpr]
        assert names == [*pointers, *(p.name for p in integers), *constants], f"{kernel.__name__}: order of parameters"
        self._n_parameters, self._n_pointers = len(names), len(pointers)
        self._in_order = _values_of(names)
        self._specialized = _values_of([p.name for p in integers if not p.do_not_specialize] + constants)
        self._unspecialized = _values_of([p.name for p in integers if p.do_not_specialize])

    def __call__(
        self,
        grid: tuple[int, int, int],
        config: LaunchConfig,
        arguments: dict[str, Any],
        *,
        launch_cooperative_grid: bool = False,
    ) -> None:
        """Launch with the kernel's arguments by name, on the device of the first tensor.

        arguments: one dict, since a call with so many keywords costs Python twice as much.
        launch_cooperative_grid: refuse a grid whose programs cannot all run at once. It must follow from the arguments.
        """
        options = {"launch_cooperative_grid": True} if launch_cooperative_grid else {}
        if not self._is_compiled:
            self.kernel[grid](**arguments, **options)
            return
        if len(arguments) != self._n_parameters:
            raise TypeError(f"{self.kernel.__name__} takes {self._n_parameters} arguments, got {len(arguments)}")
        values = self._in_order(arguments)
        for tensor in values:
            if tensor is not None:
                break
        device = tensor.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(device, grid, config, values, arguments, options)
        return self._launch(device, grid, config, values, arguments, options)

    def _launch(self, device, grid, config, values, arguments, options) -> None:
        unaligned = 0  # a bit for each tensor
        dtypes: list[torch.dtype | None] = []
        for t in values[: self._n_pointers]:
            if t is None:
                dtypes.append(None)
            else:
                unaligned = unaligned << 1 | (t.data_ptr() & 15 != 0)
                dtypes.append(t.dtype)
        key = (device.index, *self._specialized(arguments), config.num_warps, config.num_stages, unaligned, *dtypes)
        # An integer that is not specialised still has a type: of 32 bits, or where it needs them of 64.
        unspecialized = self._unspecialized(arguments)
        if max(unspecialized, default=0) >= 2**31:
            key += unspecialized
        compiled = self._compiled.get(key)
        if compiled is not None:
            _launch_again(compiled, grid, values)
            return
        if device.type == "cuda":
            refuse_capture(self.kernel.__name__)
        compiled = self.kernel[grid](*values, **config.options, **options)
        if len(self._compiled) >= _MAX_KEPT:
            self._compiled.clear()
        self._compiled[key] = compiled


def _launch_again(compiled: Any, grid: tuple[int, int, int], values: tuple) -> None:
    """compiled[grid](*values), without what Triton prepares for hooks where there are none."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if any(hook is not None and getattr(hook, "calls", True) for hook in hooks):
        compiled[grid](*values)
        return
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def _values_of(names: Sequence[str]) -> Callable[[dict[str, Any]], tuple]:
    """A function that gives the values under these names, in this order."""
    if len(names) == 1:
        (name,) = names
        return lambda arguments: (arguments[name],)
    return operator.itemgetter(*names) if names else lambda arguments: ()


@contextlib.contextmanager
def cpu_as(figures: DeviceFigures) -> Iterator[None]:
    """Inside, the CPU stands for a GPU with these figures: for a driver of Triton that takes CPU tensors."""
    before, device_module._cpu_figures = device_module._cpu_figures, figures
    for launcher in Launcher._all:
        launcher._compiled.clear()
    try:
        yield
    finally:
        device_module._cpu_figures = before
        for launcher in Launcher._all:
            launcher._compiled.clear()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which products are summed and c is carried."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The same, of torch: of what is kept unrounded between launches."""
    return torch.float64 if dtype == torch.float64 else torch.float32
