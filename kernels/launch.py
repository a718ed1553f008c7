"""From a launch configuration to a running kernel, with nothing done per call that can be done once."""

import functools

import torch
import triton.language as tl

from . import interpreter
from .config import LaunchConfig

_MAX_KEPT = 4096  # compiled-kernel references kept per kernel; a workload with more distinct shapes starts over


class Launcher:
    """Calls one @triton.jit kernel.

    Triton's own launch works out, on every call, which specialization the arguments need. That depends only on sizes, strides,
    dtypes, meta-parameters and 16-byte alignment, so the compiled kernel is kept under those and later called directly.
    """

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple, object] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor | None, ...],
        integers: tuple[int, ...],
        constants: tuple,
        config: LaunchConfig,
        **options,
    ) -> None:
        """Launch on the device of the first tensor that is not None. The kernel's parameters are tensors, integers, constants."""
        if interpreter.is_interpreting():
            self.kernel[grid](*tensors, *integers, *constants)
            return
        device = next(t for t in tensors if t is not None).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(device, grid, tensors, integers, constants, config, options)
        return self._launch(device, grid, tensors, integers, constants, config, options)

    def _launch(self, device, grid, tensors, integers, constants, config, options) -> None:
        alignment = 0
        dtypes = []
        for t in tensors:
            if t is None:
                dtypes.append(None)
            else:
                alignment |= t.data_ptr()
                dtypes.append(t.dtype)
        # Only when every pointer is aligned do equal keys imply equal specializations; other calls take Triton's own path.
        aligned = alignment % 16 == 0
        key = (device.index, integers, constants, config.num_warps, config.num_stages, *dtypes)
        compiled = self._compiled.get(key) if aligned else None
        if compiled is not None:
            compiled[grid](*tensors, *integers, *constants)
            return
        compiled = self.kernel[grid](
            *tensors, *integers, *constants, num_warps=config.num_warps, num_stages=config.num_stages, **options
        )
        if aligned:
            if len(self._compiled) >= _MAX_KEPT:
                self._compiled.clear()
            self._compiled[key] = compiled


@functools.lru_cache(maxsize=None)
def _cuda_multiprocessor_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessor_count(device: torch.device) -> int:
    """Streaming multiprocessors that the device has (a MIG slice: its share); on a CPU, those of an H100 / H200."""
    return _cuda_multiprocessor_count(device.index) if device.type == "cuda" else 132


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which products are summed and c is carried."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def matmul_precision(dtype: torch.dtype, precision: str | None) -> str:
    """The tl.dot input precision: the given one, or for None what torch.mm would use, i.e. torch.backends.cuda.matmul."""
    if dtype != torch.float32:
        return "ieee"
    if precision is None:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return precision
