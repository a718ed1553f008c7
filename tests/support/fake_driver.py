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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
from triton.runtime import driver as drivers

from lstm_triton.bench.null_driver import NullDriver, active

from .aot import SHARED_MEMORY_PER_BLOCK
from .compiled import resources

# Kernels are cached per device: numbers of their own keep the caches of real devices, and of other contexts, apart.
_device_numbers = itertools.count(1000)


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]


class FakeDriver(NullDriver):
    """Records what it is asked to launch."""

    def __init__(self, arch: int, sm_count: int):
        super().__init__(arch, sm_count, SHARED_MEMORY_PER_BLOCK[arch], next(_device_numbers))
        self.launches: list[Launch] = []

    def load_binary(self, name: str, cubin: bytes, *args: Any) -> tuple[None, int, int, int, int]:
        module, function, _, _, max_threads = super().load_binary()
        registers, local_bytes = resources(cubin)
        return module, function, registers, local_bytes // 4, max_threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(grid_x: int, grid_y: int, grid_z: int, *args: Any) -> None:
            self.launches.append(Launch(metadata.name, (grid_x, grid_y, grid_z)))

        return launch


@contextlib.contextmanager
def fake_driver(arch: int = 90, sm_count: int = 132) -> Iterator[FakeDriver]:
    """Within this context kernels are compiled for `arch`, and launches are recorded in `.launches`, not executed."""
    with active(FakeDriver(arch, sm_count)) as driver:
        yield driver


def count_compiled(jit_function: Any) -> int:
    """How many variants of a kernel the current fake driver's launches have needed; call it inside the context."""
    while not isinstance(jit_function, triton.runtime.JITFunction):
        jit_function = jit_function.fn  # inside triton.autotune or triton.heuristics
    kernels, *_ = jit_function.device_caches[drivers.active.get_current_device()]
    return len(kernels)
