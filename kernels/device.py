"""Figures of the device, and the precision of torch's products on it. This module needs no triton."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .figures import DeviceFigures, figures


@functools.cache
def _cuda_figures(index: int) -> DeviceFigures:
    gpu: Any = torch.cuda.get_device_properties(index)
    return figures(gpu.multi_processor_count, gpu.shared_memory_per_block_optin, (gpu.major, gpu.minor))


_cpu_figures = figures(132, 227 * 1024, (9, 0))  # those of an H100


def device_figures(device: torch.device) -> DeviceFigures:
    """Return the figures of a GPU or MIG instance; for a CPU, those of the GPU that it stands for."""
    return _cuda_figures(device.index) if device.type == "cuda" else _cpu_figures


def measured(problem: Any, on: torch.device) -> Any:
    """Return the configuration that was measured fastest for this problem of a sequence kernel, or None.

    `lstm_triton.measurements` replaces this function, because this package does not read its files.
    """
    return None


def _free_multiprocessors() -> int:
    name = "LSTM_TRITON_FREE_MULTIPROCESSORS"
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise ValueError(f"{name} must be a number of SMs, got {value!r}")
    return int(value)


# SMs that are left to kernels which run at the same time, such as NCCL's. Programs that wait for one another use the others.
FREE_MULTIPROCESSORS = _free_multiprocessors()


def multiprocessor_count(device: torch.device) -> int:
    return device_figures(device).sms


def refuse_capture(kernel: str) -> None:
    """Raise RuntimeError while the current stream is captured in a CUDA graph: loading a kernel would break the capture."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel} is launched with these sizes and dtypes for the first time, which compiles and loads it: that cannot be"
            " captured in a CUDA graph. Make the same call once before the capture."
        )


# torch.backends.cuda.matmul.fp32_precision and torch.backends.cudnn.rnn.fp32_precision read this through layers of Python that
# take longer than the rest of a call's checks together.
_torch_precision = torch._C._get_fp32_precision_getter


# torch's settings are global, and threads of torch.nn.DataParallel or of autograd may change them at the same time. A thread
# that changes them holds this lock, and the others wait.
_settings = threading.RLock()


@contextlib.contextmanager
def torch_products(dtype: torch.dtype, precision: str) -> Iterator[None]:
    """Let torch's products keep their dtype, and use TF32 for float32 on a GPU exactly where the kernels do.

    Autocast is off, because the arguments have been cast, and a backward may be called under autocast.
    """
    outside_autocast = torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else contextlib.nullcontext()
    with outside_autocast:
        if dtype != torch.float32:
            yield
            return
        matmul: Any = torch.backends.cuda.matmul
        wanted = "tf32" if precision == "tf32" else "ieee"
        with _settings:
            if matmul.fp32_precision == wanted:
                yield
            else:
                with fp32_precision(matmul, wanted):
                    yield


@contextlib.contextmanager
def fp32_precision(setting: Any, wanted: str) -> Iterator[None]:
    """Set one of torch.backends' settings to `wanted`, and restore it afterwards, inheritance from other settings included."""
    before, setting.fp32_precision = setting.fp32_precision, wanted
    try:
        yield
    finally:
        setting.fp32_precision = "none"  # inherit from other settings, which an explicit value would not follow
        if setting.fp32_precision != before:
            setting.fp32_precision = before


def matmul_precision(dtype: torch.dtype, precision: str | None, *, recurrent: bool = False) -> str:
    """Return the input precision of tl.dot: for float32 `precision`, or for None torch's setting; "ieee" for other dtypes.

    torch's setting is that of torch.backends.cudnn.rnn if `recurrent`, else that of torch.backends.cuda.matmul.
    """
    if dtype != torch.float32:
        return "ieee"
    if precision is None:
        return "tf32" if _torch_precision("cuda", "rnn" if recurrent else "matmul") == "tf32" else "ieee"
    return precision
