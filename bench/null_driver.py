"""A driver for Triton that launches nothing: the host's part of a launch, measured where there is no GPU.

Kernels are specialised, compiled and cached by Triton's real JIT, for one imaginary GPU whose tensors are CPU tensors.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

LABEL = "no GPU: kernels compiled for sm_90, launched by a driver that launches nothing"


def serves(provider: str) -> bool:
    """Whether a provider's time without a GPU is taken with this driver: its kernels are asked for by name."""
    return provider.startswith("lstm_triton triton")


class _NullDriver:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.utils = self
        self._target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 4711  # Triton caches kernels by device: none that exists

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return _launch_nothing


def _launch_nothing(*args: Any) -> None:
    pass


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Within, Triton compiles for and launches on nothing, and this package takes CPU tensors for a GPU's.

    Raises RuntimeError in a process with TRITON_INTERPRET, which has no JIT.
    """
    import triton
    from triton.runtime import driver as drivers

    from lstm_triton import dispatch

    if triton.knobs.runtime.interpret:
        raise RuntimeError("a process with TRITON_INTERPRET=1 has no JIT")
    previous = drivers._active
    drivers.set_active(_NullDriver())
    dispatch._remembered.cache_clear()
    try:
        with mock.patch.object(dispatch, "_why_no_kernels", lambda *arguments: None):
            yield
    finally:
        dispatch._remembered.cache_clear()
        drivers.set_active(previous)
