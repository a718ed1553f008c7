"""Triton's real JIT without a GPU: kernels are specialised, compiled and "launched" by a driver that launches nothing.

Shows what recompiles, with what grids a launcher launches, and what the host side of a launch costs. Not in a process
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver as drivers

from lstm_triton import dispatch
from lstm_triton.kernels import device, launch, search
from lstm_triton.kernels.figures import figures

from .aot import SHARED_MEMORY_PER_BLOCK

_compile = triton.compiler.compile
# Kernels are cached per device: numbers of their own keep the caches of real devices, and of other contexts, apart.
_device_numbers = itertools.count(1000)


class NullDriver:
    """What Triton asks of a driver, for one imaginary GPU.

    device: its number, under which Triton keeps compiled kernels: none that exists.
    """

    def __init__(
        self, arch: int = 90, multiprocessors: int = 132, shared_memory: int = 227 << 10, device: int = 4711
    ) -> None:
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
        """Module, which is none, since it would be unloaded; function, registers, spills, threads at most."""
        return None, 1, 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The function that Triton calls for every launch of one compiled kernel."""
        return lambda *args: None


_Driver = TypeVar("_Driver", bound=NullDriver)


@contextlib.contextmanager
def active(driver: _Driver) -> Iterator[_Driver]:
    """Within, Triton compiles for and launches by this driver, and this package takes CPU tensors for its GPU's.

    Raises RuntimeError in a process with TRITON_INTERPRET, which has no JIT.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("a process with TRITON_INTERPRET=1 has no JIT to give a driver to")
    previous = drivers._active  # None before the first use: asking for `active` would look for a GPU
    drivers.set_active(driver)
    dispatch._remembered.cache_clear()
    try:
        with (
            mock.patch.object(dispatch, "_why_no_kernels", lambda *arguments: None),
            mock.patch.dict(search.remembered, clear=True),
            mock.patch.object(device, "_cpu_figures", driver.figures),
        ):
            _forget_compiled()
            yield driver
    finally:
        _forget_compiled()
        dispatch._remembered.cache_clear()
        drivers.set_active(previous)


def _forget_compiled() -> None:
    """Kernels that were compiled for what the CPU stood for."""
    for launcher in launch.Launcher._all:
        launcher._compiled.clear()


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]


class FakeDriver(NullDriver):
    """Records what it is asked to launch."""

    def __init__(self, arch: int, sm_count: int):
        super().__init__(arch, sm_count, SHARED_MEMORY_PER_BLOCK[arch], next(_device_numbers))
        self.launches: list[Launch] = []

    def load_binary(self, name: str, cubin: bytes, *args: Any) -> tuple[None, int, int, int, int]:
        registers, local_bytes = _resources(cubin)
        return None, 1, registers, local_bytes // 4, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            *grid, _, _, _, launch_metadata, enter_hook = args[:8]
            if enter_hook is not None:
                enter_hook(launch_metadata)
            self.launches.append(Launch(metadata.name, tuple(grid)))

        return launch


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack


class _Uncompiled(CompiledKernel):
    """Stands for a kernel that is compiled well, where it matters that there is one, and not what is in it; `compile` does."""

    def __init__(self, source: Any, **options: Any) -> None:
        self.compile = functools.partial(_compile, source, **options)
        self.src, self.name = source, source.fn.__name__
        self.metadata = types.SimpleNamespace(name=self.name, shared=0, tmem_size=0)
        self.n_regs, self.n_spills, self.asm = 32, 0, {"ptx": "mma.sync"}
        self.function = self.packed_metadata = self._run = None

    def _init_handles(self) -> None:
        self._run = drivers.active.launcher_cls(self.src, self.metadata)


@contextlib.contextmanager
def fake_driver(arch: int = 90, sm_count: int = 132, *, compiling: bool = True) -> Iterator[FakeDriver]:
    """Within this context kernels are compiled for `arch`, and launches are recorded in `.launches`, not executed.

    compiling: False where only what would be compiled and launched is asked for. Then kernels hold no code.
    """
    with contextlib.ExitStack() as stack:
        if not compiling:
            stack.enter_context(mock.patch.object(triton.compiler, "compile", _Uncompiled))
        yield stack.enter_context(active(FakeDriver(arch, sm_count)))


def count_compiled(jit_function: Any) -> int:
    """How many variants of a kernel the current fake driver's launches have needed; call it inside the context."""
    while not isinstance(jit_function, triton.runtime.JITFunction):
        jit_function = jit_function.fn  # inside triton.autotune or triton.heuristics
    kernels, *_ = jit_function.device_caches[drivers.active.get_current_device()]
    return len(kernels)
