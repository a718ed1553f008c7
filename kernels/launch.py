"""Launch a compiled kernel with a configuration, doing nothing per call that can be done once."""

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import JITFunction, driver

from .config import LaunchConfig
from .device import refuse_capture

_MAX_KEPT = 4096  # references to compiled kernels, for each kernel; when there are more, all are dropped


class Launcher:
    """Launches one @triton.jit kernel, whose parameters are pointers, named ..._ptr, then integers, then meta-parameters.

    Triton's own launch works out on every call which specialisation the arguments need. That depends at most on dtypes,
    16-byte alignment, meta-parameters and the integers that the kernel specialises. A launcher keeps the compiled kernel under
    these and later calls it directly.
    """

    _all: weakref.WeakSet["Launcher"] = weakref.WeakSet()

    def __init__(self, kernel) -> None:
        self._all.add(self)
        self.kernel = kernel
        self._compiled: dict[tuple, Any] = {}
        self._is_compiled = isinstance(kernel, JITFunction)  # False in Triton's interpreter
        names = list(kernel.arg_names)
        pointers = [name for name in names if name.endswith("_ptr")]
        strides = [name for name in names if name.startswith("stride_")]
        owners = [_owner(name, pointers) for name in strides]
        if None in owners:  # the caller passes them
            strides, owners = [], []
        first = names.index(strides[0]) if strides else len(names)
        self._before, self._after = _values_of(names[:first]), _values_of(names[first + len(strides) :])
        self._strided = [(pointers.index(name), (0,) * owners.count(name)) for name in dict.fromkeys(owners)]
        self._n_pointers, self._n_given = len(pointers), len(names) - len(strides)
        if self._is_compiled:
            kinds = [0 if name in pointers else 2 if p.is_constexpr else 1 for name, p in zip(names, kernel.params)]
            assert kinds == sorted(kinds), f"{kernel.__name__}: order of parameters"
            indices = range(len(pointers), len(names))
            self._unspecialized = _values_of([i for i in indices if kernel.params[i].do_not_specialize])
            self._specialized = _values_of([i for i in indices if not kernel.params[i].do_not_specialize])

    def __call__(
        self,
        grid: tuple[int, int, int],
        config: LaunchConfig,
        arguments: dict[str, Any],
        *,
        launch_cooperative_grid: bool = False,
    ) -> None:
        """Launch with the kernel's arguments by name, on the device of the first tensor.

        arguments: one dict, since a call with as many keywords takes Python twice as long. The launcher adds the
            meta-parameters of the configuration and, where each stride_<name>_<dimension> belongs to a <name>_ptr, all strides
            in the order of their dimensions; 0 for None.
        launch_cooperative_grid: let the driver refuse a grid whose programs cannot all run at once. The arguments that select
            the compiled kernel must determine it.

        Raises:
            TypeError: a wrong number of arguments. RuntimeError: the first launch of its kind during the capture of a CUDA
            graph.
        """
        options = {"launch_cooperative_grid": True} if launch_cooperative_grid else {}
        arguments = arguments | config.constants
        if len(arguments) != self._n_given:
            raise TypeError(f"{self.kernel.__name__} takes {self._n_given} arguments, got {len(arguments)}")
        values = self._before(arguments)
        strides: tuple[int, ...] = ()
        for index, zeros in self._strided:
            strides += zeros if values[index] is None else values[index].stride()
        values += strides + self._after(arguments)
        if not self._is_compiled:
            self.kernel[grid](*values, **options)
            return
        for tensor in values:
            if tensor is not None:
                break
        device = tensor.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(device, grid, config, values, options)
        return self._launch(device, grid, config, values, options)

    def _launch(self, device, grid, config, values, options) -> None:
        unaligned = 0  # a bit for each tensor
        dtypes: list[torch.dtype | None] = []
        for t in values[: self._n_pointers]:
            if t is None:
                dtypes.append(None)
            else:
                unaligned = unaligned << 1 | (t.data_ptr() & 15 != 0)
                dtypes.append(t.dtype)
        key = (device.index, *self._specialized(values), config.num_warps, config.num_stages, unaligned, *dtypes)
        # An integer that is not specialised still has a type, of 32 bits, or of 64 from 2^31 on.
        unspecialized = self._unspecialized(values)
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
    """Run compiled[grid](*values), without preparing what Triton passes to launch hooks if there are none."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if any(hook is not None and getattr(hook, "calls", True) for hook in hooks):
        compiled[grid](*values)
        return
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def _owner(stride: str, pointers: Sequence[str]) -> str | None:
    """Return the pointer whose stride this is, by their names."""
    return max((p for p in pointers if f"{stride}_".startswith(f"stride_{p[:-4]}_")), key=len, default=None)


def _values_of(keys: Sequence[Any]) -> Callable[[Any], tuple]:
    """Return a function that gives the values under these names or indices, in this order."""
    if len(keys) == 1:
        (key,) = keys
        return lambda values: (values[key],)
    return operator.itemgetter(*keys) if keys else lambda values: ()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which products are summed and c is carried."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return torch's dtype for `accumulator`, in which state is kept between launches."""
    return torch.float64 if dtype == torch.float64 else torch.float32
