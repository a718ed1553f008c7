"""Kernels compiled for any NVIDIA GPU, on a machine without one, and each only once.

    kernel = compiled(kernel, {"x_ptr": "*bf16:16", "T": "i32"}, {"BLOCK": 64}, {"num_warps": 4, "num_stages": 1}, arch=90)
    kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.shared

What is compiled stays on disk, in Triton's own cache: by the content of the kernel and of all it calls, its types, constants
and options, the architecture, and the versions of Triton and ptxas. All processes of the suite have one folder for it
(conftest.py), in which Triton's JIT finds the same kernels. What is derived from a compiled kernel lies beside it (`derived`).

Not in a process with TRITON_INTERPRET=1, where Triton's own library functions cannot be compiled: see
process.run_without_interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.cache import get_cache_manager

Signature = Mapping[str, str | None] | Sequence[str | None]


def compiled(
    kernel: Any, signature: Signature, constants: Mapping[str, Any], options: Mapping[str, Any], *, arch: int
) -> CompiledKernel:
    """A @triton.jit kernel for compute capability `arch` (80, 86, 89, 90, 100 or 120), from the cache or else into it.

    signature: the type of every parameter that is not in constants, by name or in order: "*bf16", "i32", "fp32".
        What the JIT would find out about the argument has to be said here, or the code is not the code that runs:
        "*bf16:16" and "i32:16" are divisible by 16, "i32:1" is 1 (and becomes a constant), None is None.
    options: those of a launch: num_warps, num_stages, launch_cooperative_grid, maxnreg, ...
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn  # inside triton.autotune or triton.heuristics
    source = ASTSource(kernel, *_specialize(kernel.params, signature, constants))
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))


def derived(kernel: CompiledKernel, name: str, make: Callable[[], str | bytes]) -> Path:
    """The file of this name beside the compiled kernel. `make` gives its content where it is not there yet."""
    beside = get_cache_manager(kernel.hash)
    return Path(beside.get_file(name) or beside.put(make(), name))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack


def _specialize(params: Sequence[Any], signature: Signature, constants: Mapping[str, Any]):
    """Types, constants and attributes as the JIT would make them of real arguments, so that it finds the same kernel."""
    names = [parameter.name for parameter in params]
    if not isinstance(signature, Mapping):
        signature = dict(zip([name for name in names if name not in constants], signature, strict=True))
    if unclear := set(names) ^ (set(signature) | set(constants)) | set(signature) & set(constants):
        raise ValueError(f"given twice, missing or unknown: {sorted(unclear)}")
    types, values, attributes = {}, dict(constants), {}
    for parameter in params:
        type_, _, hint = (signature.get(parameter.name) or "").partition(":")
        if parameter.name in constants or not type_ or hint == "1":
            types[parameter.name] = "constexpr"
            values.setdefault(parameter.name, 1 if hint else None)
            hint = ""
        else:
            types[parameter.name] = type_
        if types[parameter.name] == "constexpr" or not parameter.do_not_specialize:
            attributes[(parameter.num,)] = [["tt.divisibility", int(hint)]] if hint else []
    return types, values, attributes
