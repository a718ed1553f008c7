"""From a launch configuration to a running kernel, with nothing done per call that can be done once."""

import contextlib
import functools
import itertools
import os
import threading
import weakref
from typing import Any

import torch
import triton.language as tl
from triton.runtime import JITFunction

from .config import LaunchConfig

_MAX_KEPT = 4096  # compiled-kernel references kept per kernel; a workload with more distinct shapes starts over


class Launcher:
    """Calls one @triton.jit kernel.

    Triton's own launch works out, on every call, which specialization the arguments need. It depends on dtypes, 16-byte
    alignment, meta-parameters and the integers that the kernel specialises, at most: the compiled kernel is kept under those,
    and later called directly. Names of pointers end in _ptr.
    """

    _all: weakref.WeakSet["Launcher"] = weakref.WeakSet()

    def __init__(self, kernel) -> None:
        self._all.add(self)
        self.kernel = kernel
        self._compiled: dict[tuple, Any] = {}
        self._is_compiled = isinstance(kernel, JITFunction)  # else Triton's interpreter runs it
        integers = (p for p in getattr(kernel, "params", ()) if not (p.is_constexpr or p.name.endswith("_ptr")))
        self._is_specialized = [not p.do_not_specialize for p in integers]

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor | None, ...],
        integers: tuple[int, ...],
        constants: tuple,
        config: LaunchConfig,
        **options,
    ) -> None:
        """Launch on the device of the first tensor that is not None.

        The kernel's parameters are tensors, integers, constants, in this order. options go to Triton's compiler; they must
        follow from the other arguments.
        """
        if not self._is_compiled:
            self.kernel[grid](*tensors, *integers, *constants, **options)
            return
        device = next(t for t in tensors if t is not None).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(device, grid, tensors, integers, constants, config, options)
        return self._launch(device, grid, tensors, integers, constants, config, options)

    def _launch(self, device, grid, tensors, integers, constants, config, options) -> None:
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
            compiled[grid](*tensors, *integers, *constants)
            return
        if device.type == "cuda":
            refuse_capture(self.kernel.__name__)
        compiled = self.kernel[grid](*tensors, *integers, *constants, **config.options, **options)
        if len(self._compiled) >= _MAX_KEPT:
            self._compiled.clear()
        self._compiled[key] = compiled


def refuse_capture(kernel: str) -> None:
    """RuntimeError while a CUDA graph is captured on the current stream: what a first launch asks of CUDA breaks a capture."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel} is launched with these sizes and dtypes for the first time, which compiles and loads it: that cannot be"
            " captured in a CUDA graph. Make the same call once before the capture."
        )


@functools.cache
def _cuda_limits(index: int) -> tuple[int, int, int]:
    properties: Any = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major


_cpu_limits = 132, 227 * 1024, 9  # an H100's


def device_limits(device: torch.device) -> tuple[int, int, int]:
    """Multiprocessors (a MIG slice: its share), bytes of shared memory a program may have, and the first number of the compute
    capability; on a CPU, those of the GPU that it stands for."""
    return _cuda_limits(device.index) if device.type == "cuda" else _cpu_limits


@contextlib.contextmanager
def cpu_as(limits: tuple[int, int, int]):
    """Inside, the CPU stands for a GPU with these `device_limits`: for a driver of Triton that takes CPU tensors."""
    global _cpu_limits
    before, _cpu_limits = _cpu_limits, limits
    for launcher in Launcher._all:
        launcher._compiled.clear()
    try:
        yield
    finally:
        _cpu_limits = before
        for launcher in Launcher._all:
            launcher._compiled.clear()


def _free_multiprocessors() -> int:
    name = "LSTM_TRITON_FREE_MULTIPROCESSORS"
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise ValueError(f"{name} must be a number of multiprocessors, got {value!r}")
    return int(value)


# Multiprocessors that programs which wait for one another leave to kernels that run at the same time, such as communication.
FREE_MULTIPROCESSORS = _free_multiprocessors()


def multiprocessor_count(device: torch.device) -> int:
    """The first of `device_limits`."""
    return device_limits(device)[0]


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which products are summed and c is carried."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# What torch.backends.cuda.matmul.fp32_precision and torch.backends.cudnn.rnn.fp32_precision read, through layers of Python
# that cost more than the rest of a call's checks together.
_torch_precision = torch._C._get_fp32_precision_getter


# torch's settings belong to the process, and the threads of torch.nn.DataParallel or of autograd change them at the same time:
# while one has them its own way, the others wait.
_settings = threading.RLock()


@contextlib.contextmanager
def torch_matmul_precision(dtype: torch.dtype, precision: str):
    """torch's own float32 products on a GPU, inside: in TF32 where the kernels' are, else in full precision."""
    wanted = "tf32" if precision == "tf32" else "ieee"
    if dtype != torch.float32:
        yield
        return
    with _settings:
        if torch.backends.cuda.matmul.fp32_precision == wanted:
            yield
        else:
            with fp32_precision(torch.backends.cuda.matmul, wanted):
                yield


@contextlib.contextmanager
def fp32_precision(setting: Any, wanted: str):
    """`wanted` in one of torch.backends' settings, inside; afterwards it inherits from the others again if it did."""
    before, setting.fp32_precision = setting.fp32_precision, wanted
    try:
        yield
    finally:
        setting.fp32_precision = "none"
        if setting.fp32_precision != before:
            setting.fp32_precision = before


def matmul_precision(dtype: torch.dtype, precision: str | None, *, recurrent: bool = False) -> str:
    """The tl.dot input precision: the given one, or for None what torch would use.

    That is the setting of torch.backends.cuda.matmul for a cell, of torch.backends.cudnn.rnn for a recurrent layer.
    """
    if dtype != torch.float32:
        return "ieee"
    if precision is None:
        return "tf32" if _torch_precision("cuda", "rnn" if recurrent else "matmul") == "tf32" else "ieee"
    return precision
