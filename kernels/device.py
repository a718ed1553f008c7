"""What the device is, and in which precision torch multiplies on it. Needs no triton."""

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


_cpu_figures = figures(132, 227 * 1024, (9, 0))  # an H100's; see `launch.cpu_as`


def device_figures(device: torch.device) -> DeviceFigures:
    """Of a GPU, or of its share of one (MIG); on a CPU, of the GPU that it stands for."""
    return _cuda_figures(device.index) if device.type == "cuda" else _cpu_figures


def measured(problem: Any, on: torch.device) -> Any:
    """The configuration of a sequence kernel that was fastest for this problem on this device, or None: nothing is known. To
    be replaced by who has measured."""
    return None


def _free_multiprocessors() -> int:
    name = "LSTM_TRITON_FREE_MULTIPROCESSORS"
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise ValueError(f"{name} must be a number of SMs, got {value!r}")
    return int(value)


# SMs that programs which wait for one another leave to kernels that run at the same time, such as communication.
FREE_MULTIPROCESSORS = _free_multiprocessors()


def multiprocessor_count(device: torch.device) -> int:
    return device_figures(device).sms


def refuse_capture(kernel: str) -> None:
    """RuntimeError while a CUDA graph is captured on the current stream: what a first launch asks of CUDA breaks a capture."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel} is launched with these sizes and dtypes for the first time, which compiles and loads it: that cannot be"
            " captured in a CUDA graph. Make the same call once before the capture."
        )


# What torch.backends.cuda.matmul.fp32_precision and torch.backends.cudnn.rnn.fp32_precision read, through layers of Python
# that cost more than the rest of a call's checks together.
_torch_precision = torch._C._get_fp32_precision_getter


# torch's settings belong to the process, and the threads of torch.nn.DataParallel or of autograd change them at the same time:
# while one has them its own way, the others wait.
_settings = threading.RLock()


@contextlib.contextmanager
def torch_products(dtype: torch.dtype, precision: str) -> Iterator[None]:
    """Inside, torch's own products keep their dtype, and float32 ones on a GPU are in TF32 only where the kernels' are.

    Arguments were cast before, and a backward may be called under autocast.
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


_cudnn_setting = threading.RLock()


@contextlib.contextmanager
def cudnn_precision(precision: str | None) -> Iterator[None]:
    """Inside, cuDNN's recurrent layers on float32 compute in this precision, or for None in what torch's setting says."""
    if precision is None:
        yield
        return
    with _cudnn_setting, fp32_precision(torch.backends.cudnn.rnn, precision):
        yield


@contextlib.contextmanager
def fp32_precision(setting: Any, wanted: str) -> Iterator[None]:
    """`wanted` in one of torch.backends' settings, inside; afterwards it inherits from the others again if it did."""
    before, setting.fp32_precision = setting.fp32_precision, wanted
    try:
        yield
    finally:
        setting.fp32_precision = "none"  # as inherited from other settings, which it would no longer follow
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
