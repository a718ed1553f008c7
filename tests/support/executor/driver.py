"""A driver for Triton whose launches are executed by the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import pickle
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime import driver as drivers
from triton.runtime.cache import get_cache_manager

from ..aot_sequence import DEVICES
from ..fake_driver import NullDriver, active
from .build import CACHE, KernelStruct, LaunchStruct, instructions, machine, sources
from .encode import Program, encode
from .ptx import SIZES, Statement, parse

_REPORT_BYTES = 1 << 16


@dataclass(frozen=True)
class Report:
    """One thing that is wrong with a launch, where it was seen first."""

    kind: str
    kernel: str
    program: int
    thread: int  # of the program; -1 of the launch as a whole
    message: str
    statement: Statement | None

    def __str__(self) -> str:
        where = f"{self.kernel}, program {self.program}, thread {self.thread}" if self.program >= 0 else self.kernel
        line = f"\n    at {self.statement.source}: `{self.statement.text}`" if self.statement else ""
        return f"{self.kind}: {where}: {self.message}{line}"


class KernelFault(RuntimeError):
    """A launch did what no correct kernel does; the message has the `reports`."""

    def __init__(self, reports: list[Report]):
        super().__init__("\n".join(map(str, reports)))
        self.reports = reports


@dataclass(frozen=True)
class Launch:
    """What is to be executed."""

    kernel: str
    ptx: str
    grid: tuple[int, int, int]
    arguments: list[tuple[str, str, Any]]  # name, type and value of each
    shared: int  # bytes of shared memory
    at_once: int  # programs that run at the same time


@dataclass(frozen=True)
class Executed:
    """A launch that was executed."""

    kernel: str
    grid: tuple[int, int, int]
    steps: int  # instructions of warps
    unfenced: int  # accesses to tensor memory behind a barrier without tcgen05.fence::after_thread_sync
    serialized: int  # registers overwritten that a wgmma in flight reads: ptxas makes each such product wait
    late_zeros: int  # accumulators of a wgmma that were zeroed behind its wgmma.fence
    reports: tuple[Report, ...]


@functools.lru_cache(maxsize=256)
def _encoded(ptx: str) -> Program:
    """Kept on disk by its content, beside the compiled kernels."""
    kept = get_cache_manager(hashlib.sha256(f"{sources()} {ptx}".encode()).hexdigest())
    if (file := kept.get_file("encoded")) is None:
        file = kept.put(zlib.compress(pickle.dumps(encode(ptx, instructions())), 1), "encoded")
    return pickle.loads(zlib.decompress(Path(file).read_bytes()))


@functools.lru_cache(maxsize=16)
def _statements(ptx: str) -> list[Statement]:
    return parse(ptx).statements


class ExecutingDriver(NullDriver):
    """See `executing`. The attributes may be changed between launches."""

    def __init__(self, arch: int, seed: int = 1, programs_per_sm: int = 1):
        device = DEVICES[arch]
        super().__init__(arch, device.sms, device.shared_memory, device=2000 + arch)
        self.seed, self.programs_per_sm = seed, programs_per_sm
        self.change: Callable[[str, str], str] | None = None  # (kernel, its PTX) -> the PTX to execute instead
        self.raises = True  # False: what is reported only stands in `executed`
        self.executed: list[Executed] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        types = list(source.signature.items())
        group = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json")
        ptx = Path(group[f"{metadata.name[:150]}.ptx"]).read_text()

        def launch(grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
            device = drivers.active  # Triton keeps this function for every later driver of the same device number
            named = [(str(name), type_, value) for (name, type_), value in zip(types, arguments, strict=True)]
            grid = (grid_x, grid_y, grid_z)
            at_once = math.prod(grid) if metadata.launch_cooperative_grid else 8
            device.execute(Launch(metadata.name, ptx, grid, named, metadata.shared, at_once))

        return launch

    def run(self, ptx: str, grid: tuple[int, int, int], *arguments: Any, shared: int = 0) -> Executed:
        """Execute PTX that was written by hand; also in a process with TRITON_INTERPRET=1."""
        named = [(f"argument {k}", "", value) for k, value in enumerate(arguments)]
        return self.execute(Launch(parse(ptx).name, ptx, grid, named, shared, math.prod(grid)))

    def execute(self, launch: Launch) -> Executed:
        ptx = self.change(launch.kernel, launch.ptx) if self.change else launch.ptx
        program = _encoded(ptx)
        parameters = _parameters(program, launch.arguments)
        storages: dict[tuple[int, int], list[str]] = {}
        for argument, _, value in launch.arguments:
            if hasattr(value, "untyped_storage") and value.untyped_storage().nbytes():
                start = value.untyped_storage().data_ptr()
                storages.setdefault((start, start + value.untyped_storage().nbytes()), []).append(argument)
        message = ctypes.create_string_buffer(_REPORT_BYTES)
        starts, ends = (array("Q", [storage[k] for storage in storages]) for k in (0, 1))
        names = (ctypes.c_char_p * len(storages))(*("/".join(names).encode() for names in storages.values()))
        c_launch = LaunchStruct(
            grid=launch.grid,
            threads=program.threads,
            shared=launch.shared,
            tensors=len(storages),
            concurrent=min(math.prod(launch.grid), launch.at_once),
            programs_per_sm=self.programs_per_sm,
            seed=self.seed,
            parameters=ctypes.addressof(parameters),
            starts=starts.buffer_info()[0],
            ends=ends.buffer_info()[0],
            names=ctypes.addressof(names),
            message=ctypes.addressof(message),
            message_size=_REPORT_BYTES,
            parameter_bytes=program.parameter_bytes,
        )
        arrays = (program.code, program.operands, program.image, program.defined)
        c_kernel = KernelStruct(
            *(a.buffer_info()[0] for a in arrays),
            instructions=len(program.code) // 16,
            registers=len(program.defined),
            file_size=len(program.image),
            waits=program.waits,
            uses_tensor_memory=program.uses_tensor_memory,
        )
        machine().execute(c_kernel, c_launch)
        reports = [_report(launch.kernel, ptx, line) for line in message.value.decode().splitlines()]
        counts = c_launch.steps, c_launch.unfenced, c_launch.serialized, c_launch.late_zeros
        self.executed.append(Executed(launch.kernel, launch.grid, *counts, tuple(reports)))
        if reports and self.raises:
            raise KernelFault(reports)
        return self.executed[-1]


def _report(kernel: str, ptx: str, line: str) -> Report:
    kind, program, thread, instruction, message = line.split("\t")
    statement = _statements(ptx)[int(instruction)] if int(instruction) >= 0 else None
    return Report(kind, kernel, int(program), int(thread), message, statement)


def _parameters(program: Program, arguments: list[tuple[str, str, Any]]) -> ctypes.Array:
    parameters = program.parameters
    values = [value for _, type_, value in arguments if type_ != "constexpr"]
    values += [0] * (len(parameters) - len(values))  # pointers to Triton's own scratch memory
    packed = bytearray(program.parameter_bytes)
    for parameter, value in zip(parameters, values, strict=True):
        size = SIZES[parameter.type]
        if hasattr(value, "data_ptr"):
            value = value.data_ptr()
        elif isinstance(value, float):
            value = int.from_bytes(struct.pack({4: "<f", 8: "<d"}[size], value), "little")
        packed[parameter.offset : parameter.offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return (ctypes.c_uint8 * max(len(packed), 1)).from_buffer(packed or bytearray(1))


@contextlib.contextmanager
def executing(
    target: str = "sm_90", *, seed: int = 1, programs_per_sm: int = 1, driver: ExecutingDriver | None = None
) -> Iterator[ExecutingDriver]:
    """Within, kernels launched on CPU tensors are compiled for `target` ("sm_80", "sm_90", ...), executed and checked.

    seed: of the order in which programs, warps and lanes take turns.
    programs_per_sm: how many programs share an SM, and so its tensor memory.
    driver: one that is there already, instead of target, seed and programs_per_sm.
    """
    driver = driver or ExecutingDriver(int(target.removeprefix("sm_")), seed, programs_per_sm)
    with knobs.cache.scope(), knobs.runtime.scope(), active(driver):
        knobs.cache.dir, knobs.runtime.add_stages_inspection_hook = str(CACHE / "executed"), _without_ptxas
        yield driver


def _without_ptxas(*compilation: Any) -> tuple[str, str] | None:
    """A hook of Triton's compiler: of what is compiled, nothing behind the PTX is executed."""
    if not compilation:
        return "", ""  # what is added to the keys of caches; these kernels lie in a folder of their own
    _, stages, *_ = compilation
    stages["cubin"] = lambda ptx, metadata: b""
    return None
