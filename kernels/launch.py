"""From a launch configuration to a running kernel, with nothing done per call that can be done once."""

import contextlib
import itertools
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from triton.runtime import JITFunction

from . import device as device_module
from .config import LaunchConfig
from .device import refuse_capture

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
        pointers = [p for p in kernel.params if p.name.endswith("_ptr")]
        integers = [p for p in kernel.params if not (p.is_constexpr or p.name.endswith("_ptr"))]
        constants = [p for p in kernel.params if p.is_constexpr]
        names = [p.name for p in kernel.params]
        assert names == [p.name for p in (*pointers, *integers, *constants)], f"{kernel.__name__}: order of parameters"
        self._n_parameters = len(names)
        self._pointers, self._integers = slice(len(pointers)), slice(len(pointers), len(pointers) + len(integers))
        self._constants = slice(len(pointers) + len(integers), None)
        self._in_order = operator.itemgetter(*names)
        self._is_specialized = [not p.do_not_specialize for p in integers]

    def __call__(
        self,
        grid: tuple[int, int, int],
        config: LaunchConfig,
        *,
        launch_cooperative_grid: bool = False,
        **arguments: Any,
    ) -> None:
        """Launch with the kernel's arguments, each by name, on the device of the first tensor.

        launch_cooperative_grid: refuse a grid whose programs cannot all run at once. It must follow from the arguments.
        """
        if not self._is_compiled:
            self.kernel[grid](**arguments)
            return
        if len(arguments) != self._n_parameters:
            raise TypeError(f"{self.kernel.__name__} takes {self._n_parameters} arguments, got {len(arguments)}")
        values = self._in_order(arguments)
        device = next(t for t in values if t is not None).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(device, grid, config, values, launch_cooperative_grid)
        return self._launch(device, grid, config, values, launch_cooperative_grid)

    def _launch(self, device, grid, config, values, cooperative) -> None:
        tensors, integers, constants = values[self._pointers], values[self._integers], values[self._constants]
        unaligned = 0  # a bit for each tensor
        dtypes: list[torch.dtype | None] = []
        for t in tensors:
            if t is None:
                dtypes.append(None)
            else:
                unaligned = unaligned << 1 | (t.data_ptr() & 15 != 0)
                dtypes.append(t.dtype)
        # An integer that is not specialised still has a type: of 32 bits, or where it needs them of 64.
        is_long = max(integers, default=0) >= 2**31
        specialized = integers if is_long else tuple(itertools.compress(integers, self._is_specialized))
        key = (device.index, specialized, constants, config.num_warps, config.num_stages, unaligned, *dtypes)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*values)
            return
        if device.type == "cuda":
            refuse_capture(self.kernel.__name__)
        options = {"launch_cooperative_grid": True} if cooperative else {}
        compiled = self.kernel[grid](*values, **config.options, **options)
        if len(self._compiled) >= _MAX_KEPT:
            self._compiled.clear()
        self._compiled[key] = compiled


@contextlib.contextmanager
def cpu_as(limits: tuple[int, int, int]) -> Iterator[None]:
    """Inside, the CPU stands for a GPU with these `device_limits`: for a driver of Triton that takes CPU tensors."""
    before, device_module._cpu_limits = device_module._cpu_limits, limits
    for launcher in Launcher._all:
        launcher._compiled.clear()
    try:
        yield
    finally:
        device_module._cpu_limits = before
        for launcher in Launcher._all:
            launcher._compiled.clear()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which products are summed and c is carried."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The same, of torch: of what is kept unrounded between launches."""
    return torch.float64 if dtype == torch.float64 else torch.float32
