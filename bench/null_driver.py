"""A driver for Triton that launches nothing: the host's part of a launch, measured where there is no GPU.

    with active(NullDriver()):
        ...

Kernels are specialised, compiled and cached by Triton's real JIT, for one imaginary GPU whose tensors are CPU tensors.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import torch

LABEL = "no GPU: kernels compiled for sm_90, launched by a driver that launches nothing"


def serves(provider: str) -> bool:
    """Whether a provider's time without a GPU is taken with this driver: its kernels are asked for by name."""
    return provider.startswith("lstm_triton triton")


class NullDriver:
    """What Triton asks of a driver, for one imaginary GPU.

    device: its number, under which Triton keeps compiled kernels: none that exists.
    """

    def __init__(
        self, arch: int = 90, multiprocessors: int = 132, shared_memory: int = 227 << 10, device: int = 4711
    ) -> None:
        from triton.backends.compiler import GPUTarget

        from lstm_triton.kernels.figures import figures

        self.utils = self
        self.figures = figures(multiprocessors, shared_memory, divmod(arch, 10))
        self._target = GPUTarget("cuda", arch, 32)
        self._device = device

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.figures.shared_memory,
            "max_num_regs": 65536,
            "multiprocessor_count": self.figures.sms,
            "warpSize": 32,
        }

    def load_binary(self, *args: Any) -> tuple[None, int, int, int, int]:
        module, function, registers, spills, max_threads = None, 1, 32, 0, 1024  # no module, which would be unloaded
        return module, function, registers, spills, max_threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The function that Triton calls for every launch of one compiled kernel."""
        return _launch_nothing


def _launch_nothing(*args: Any) -> None:
    pass


_Driver = TypeVar("_Driver", bound=NullDriver)


@contextlib.contextmanager
def active(driver: _Driver) -> Iterator[_Driver]:
    """Within, Triton compiles for and launches by this driver, and this package takes CPU tensors for its GPU's.

    Raises RuntimeError in a process with TRITON_INTERPRET, which has no JIT.
    """
    import triton
    from triton.runtime import driver as drivers

    from lstm_triton import dispatch
    from lstm_triton.kernels import launch, search

    if triton.knobs.runtime.interpret:
        raise RuntimeError("a process with TRITON_INTERPRET=1 has no JIT to give a driver to")
    previous = drivers._active  # None before the first use: asking for `active` would look for a GPU
    drivers.set_active(driver)
    dispatch._remembered.cache_clear()
    try:
        with (
            mock.patch.object(dispatch, "_why_no_kernels", lambda *arguments: None),
            mock.patch.dict(search._chosen, clear=True),
            launch.cpu_as(driver.figures),
        ):
            yield driver
    finally:
        dispatch._remembered.cache_clear()
        drivers.set_active(previous)
