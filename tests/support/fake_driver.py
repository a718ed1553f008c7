"""Triton's real JIT without a GPU: kernels are specialised, compiled and "launched" by a driver that launches nothing.

    with fake_driver(arch=90) as driver:
        kernel[(4,)](torch.empty(16), 16, BLOCK=16)
        assert driver.launches == [("kernel", (4, 1, 1))]
        assert count_compiled(kernel) == 1

Shows what recompiles, with what grids a launcher launches, and what the host side of a launch costs. Not in a process
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as drivers

from .aot import SHARED_MEMORY_PER_BLOCK

# Kernels are cached per device: numbers of their own keep the caches of real devices, and of other contexts, apart.
_device_numbers = itertools.count(1000)


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]


class FakeDriver:
    """What Triton asks of a driver, for one imaginary GPU whose tensors are CPU tensors."""

    def __init__(self, arch: int, sm_count: int):
        self.launches: list[Launch] = []
        self.utils = self  # get_device_properties and load_binary
        self._target = GPUTarget("cuda", arch, 32)
        self._device = next(_device_numbers)
        self._properties = {
            "max_shared_mem": SHARED_MEMORY_PER_BLOCK[arch],
            "max_num_regs": 65536,
            "multiprocessor_count": sm_count,
            "warpSize": 32,
        }

    def get_current_target(self) -> GPUTarget:
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
        return self._properties

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        module, function, registers, spills, max_threads = 1, 1, 32, 0, 1024
        return module, function, registers, spills, max_threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """The function Triton calls for every launch of one compiled kernel."""

        def launch(grid_x: int, grid_y: int, grid_z: int, *args: Any) -> None:
            self.launches.append(Launch(metadata.name, (grid_x, grid_y, grid_z)))

        return launch


@contextlib.contextmanager
def fake_driver(arch: int = 90, sm_count: int = 132) -> Iterator[FakeDriver]:
    """Within this context kernels are compiled for `arch`, and launches are recorded in `.launches`, not executed."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("a process with TRITON_INTERPRET=1 has no JIT to give a driver to")
    previous = drivers._active  # None before the first use: asking for `active` would look for a GPU
    driver = FakeDriver(arch, sm_count)
    drivers.set_active(driver)
    try:
        yield driver
    finally:
        drivers.set_active(previous)


def count_compiled(jit_function: Any) -> int:
    """How many variants of a kernel the current fake driver's launches have needed; call it inside the context."""
    while not isinstance(jit_function, triton.runtime.JITFunction):
        jit_function = jit_function.fn  # inside triton.autotune or triton.heuristics
    kernels, *_ = jit_function.device_caches[drivers.active.get_current_device()]
    return len(kernels)
