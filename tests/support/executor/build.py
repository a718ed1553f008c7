"""The machine (machine.c), compiled once for all kernels and kept by its content under .ci-cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from .instructions import Instructions

CACHE = Path(__file__).parents[3] / ".ci-cache"
# Lanes are vectorised at -O3; no product and sum may be fused that PTX keeps apart.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing", "-shared", "-fPIC")


def _fields(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names.split()]


class KernelStruct(ctypes.Structure):
    _fields_ = _fields("code operands image defined instructions registers file_size waits uses_tensor_memory")


class LaunchStruct(ctypes.Structure):
    _fields_ = [
        ("grid", 3 * ctypes.c_int64),
        *_fields("threads shared tensors concurrent programs_per_sm seed parameters starts ends names"),
        *_fields("message message_size parameter_bytes steps unfenced serialized late_zeros"),
    ]


class _OperationStruct(ctypes.Structure):
    _fields_ = [("opcode", ctypes.c_char_p), *_fields("run kind results inputs"), ("sizes", 4 * ctypes.c_int64)]


def why_not() -> str | None:
    """Why the executor cannot run here, or None where it can."""
    return None if _compiler() else "no C compiler (cc, gcc or clang)"


@functools.cache
def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)


@functools.cache
def machine() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_compiled()))
    library.execute.argtypes = [ctypes.POINTER(KernelStruct), ctypes.POINTER(LaunchStruct)]
    library.operation_at.restype = ctypes.POINTER(_OperationStruct)
    return library


@functools.cache
def instructions() -> Instructions:
    known = Instructions()
    for k in range(machine().operations_known()):
        operation = machine().operation_at(k).contents
        opcode, results, sizes = operation.opcode.decode(), operation.results, list(map(str, operation.sizes))
        if results >= 0:
            form = [*sizes[:results], "=", *sizes[results : results + operation.inputs]]
            known.add(k, opcode, " ".join(form))
        elif " " in opcode:
            known.add_patterns(k, opcode)
        else:
            known.add(k, opcode, "")
    return known


@functools.cache
def sources() -> str:
    """Changes with what reads PTX and with what executes it."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.*")))).hexdigest()


def _compiled() -> Path:
    compiler = _compiler()
    assert compiler is not None, why_not()
    built_with = f"{sources()} {compiler} {_FLAGS} {platform.machine()} {platform.node()}"
    path = CACHE / "executor" / f"{hashlib.sha256(built_with.encode()).hexdigest()[:20]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # other processes see the whole file or none
        source = Path(__file__).with_name("machine.c")
        subprocess.run([compiler, *_FLAGS, str(source), "-o", str(unfinished), "-lm"], check=True)
        unfinished.rename(path)
    return path
