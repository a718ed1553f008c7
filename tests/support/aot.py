"""What became of a kernel that was compiled for some NVIDIA GPU: its resources and instructions.

report = compile_ahead(kernel, {"x_ptr": "*bf16:16", "T": "i32"}, {"BLOCK": 64}, arch=90, num_warps=4, num_stages=1)
assert report.fits() and report.local_memory_in_loops() == 0
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend

from lstm_triton.kernels.config import LaunchConfig

from .compiled import Signature, compiled, derived

# Bytes that one block may have, by compute capability (CUDA C++ programming guide, technical specifications).
SHARED_MEMORY_PER_BLOCK = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# Architectures for which Triton writes the same PTX, products of float64 apart: one process of a test compiles for all of them.
GENERATIONS = ((80, 86, 89), (90,), (100,), (120,))

# What a test calls a dtype, and the precision of its products.
KINDS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp64": (torch.float64, "ieee"),
}

_GLOBAL_LOADS = {"LDG", "LDGSTS", "UTMALDG", "UBLKCP"}
_LOCAL_MEMORY = {"LDL", "STL"}


class Instruction(NamedTuple):
    opcode: str  # without its modifiers: "LDG", not "LDG.E.128"
    text: str


@dataclass(frozen=True)
class Report:
    """A compiled kernel's resources and code. Nothing is disassembled before it is asked for."""

    kernel: CompiledKernel = field(repr=False)
    arch: int  # the kernel's own, or another one of its generation
    options: Mapping[str, Any]  # of the launch

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    @property
    def ttgir(self) -> str:
        return self.kernel.asm["ttgir"]

    @property
    def shared_memory(self) -> int:
        """Bytes per block."""
        return self.kernel.metadata.shared

    @property
    def tensor_memory(self) -> int:
        """Columns per block."""
        return self.kernel.metadata.tmem_size

    @property
    def threads(self) -> int:
        """Per block."""
        return self.kernel.metadata.num_warps * 32

    @property
    def registers(self) -> int:
        """Per thread."""
        return self._resources["REG"]

    @property
    def stack_bytes(self) -> int:
        """Local memory per thread: for want of registers, or for arrays."""
        return self._resources["STACK"]

    @functools.cached_property
    def cubin(self) -> Path:
        return derived(self.kernel, f"sm_{self.arch}.cubin", self._assemble)

    def _assemble(self) -> bytes:
        """The PTX for another architecture of its generation is what compiling would give, in a fraction of the time."""
        if self.arch == self.kernel.metadata.target.arch:
            return self.kernel.asm["cubin"]
        ptx = re.sub(r"\.target sm_\d+", f".target sm_{self.arch}", self.ptx)
        backend = make_backend(GPUTarget("cuda", self.arch, 32))
        return backend.make_cubin(ptx, {}, backend.parse_options(self.options), self.arch)

    @functools.cached_property
    def _resources(self) -> dict[str, int]:
        def read() -> str:
            return _run(knobs.nvidia.cuobjdump, "--dump-resource-usage", self.cubin)

        usage = derived(self.kernel, f"sm_{self.arch}.resources", read).read_text()
        return {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}

    @functools.cached_property
    def sass(self) -> str:
        def read() -> str:
            return _run(knobs.nvidia.nvdisasm, "--print-code", self.cubin)

        return derived(self.kernel, f"sm_{self.arch}.sass", read).read_text()

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        return [instruction for instruction, _ in self._listing]

    @functools.cached_property
    def counts(self) -> Counter[str]:
        """How many of each opcode; opcodes that do not occur count 0."""
        return Counter(instruction.opcode for instruction in self.instructions)

    @functools.cached_property
    def in_loops(self) -> list[Instruction]:
        """The instructions between the target of some backward branch and the branch."""
        labels = {label: index for index, (_, names) in enumerate(self._listing) for label in names}
        loops = []
        for index, instruction in enumerate(self.instructions):
            target = re.search(r"`\((\.L\w+)\)", instruction.text) if instruction.opcode == "BRA" else None
            if target and labels.get(target[1], math.inf) <= index:
                loops.append(range(labels[target[1]], index + 1))
        return [instruction for i, instruction in enumerate(self.instructions) if any(i in loop for loop in loops)]

    @functools.cached_property
    def _listing(self) -> list[tuple[Instruction, list[str]]]:
        """Each instruction with the labels that stand before it."""
        listing, labels = [], []
        for line in self.sass.splitlines():
            if label := re.match(r"(\.L\w+):", line):
                labels.append(label[1])
            elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(([A-Z]\w*).*?);", line):
                listing.append((Instruction(code[2], code[1].strip()), labels))
                labels = []
        return listing

    def fits(self, arch: int | None = None) -> bool:
        """Whether one block has room in the shared memory of `arch`, by default the one compiled for."""
        return self.shared_memory <= SHARED_MEMORY_PER_BLOCK[arch or self.arch]

    def blocks_per_sm(self) -> int:
        """The most blocks of this kernel that share an SM of sm_90 or sm_100: by its registers, shared memory and warps."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min((64 << 10) // registers, (228 << 10) // (self.shared_memory + 1024), 2048 // self.threads)

    def local_memory_in_loops(self) -> int:
        """Loads from and stores to local memory inside loops: spills that are paid for again and again."""
        return sum(instruction.opcode in _LOCAL_MEMORY for instruction in self.in_loops)

    def global_loads_in_loop(self) -> int:
        return sum(instruction.opcode in _GLOBAL_LOADS for instruction in self.in_loops)

    def matrix_instructions(self) -> int:
        """Instructions of the tensor cores: HMMA, HGMMA, DMMA, IMMA, UTCHMMA, ..."""
        return sum(number for opcode, number in self.counts.items() if opcode.endswith("MMA"))


def compile_ahead(
    kernel: Any, signature: Signature, constants: Mapping[str, Any], *, arch: int, **options: Any
) -> Report:
    """A kernel compiled for compute capability `arch` with the options of a launch: see `compiled`."""
    return Report(compiled(kernel, signature, constants, options, arch=arch), arch, options)


def compile_for(archs: Sequence[int], kernel: Any, signature: Any, constants: Mapping[str, Any], **options: Any):
    """A report for each architecture of one of GENERATIONS. Compiled for the first only, unless with float64."""
    first = compile_ahead(kernel, signature, constants, arch=archs[0], **options)
    if "f64" in first.ptx:
        return [first, *(compile_ahead(kernel, signature, constants, arch=arch, **options) for arch in archs[1:])]
    return [replace(first, arch=arch) for arch in archs]


class Variant(NamedTuple):
    """A launch to be compiled. signature: see `compiled`. tensor_cores: whether its products, if not of float64, run there."""

    kernel: Any
    signature: Signature
    constants: Mapping[str, Any]
    config: LaunchConfig
    tensor_cores: bool
    words: str  # what is particular about it


def in_turn(archs: Sequence[int], everything: bool, turn: int, variants: Sequence[Any]) -> Sequence[Any]:
    """All variants of a configuration, or unless everything one of them, for the generation whose turn it is."""
    chosen, generation = divmod(turn, len(GENERATIONS))
    if everything:
        return variants
    return [variants[chosen % len(variants)]] if archs == GENERATIONS[generation] else []


def compile_all(variants: Callable[[Sequence[int], bool], Iterable[Variant]], spills: bool) -> None:
    """For a script with architectures of a generation as arguments, and "all": compile and print how many, or what is wrong.

    spills: whether there may be local memory, if none of it is accessed in loops.
    """
    archs, count, failures = tuple(int(arch) for arch in sys.argv[1:] if arch != "all"), 0, []
    for variant in variants(archs, "all" in sys.argv):
        for report in compile_for(
            archs, variant.kernel, variant.signature, variant.constants, **variant.config.options
        ):
            what = f"{report.name} sm_{report.arch} {variant.words} {variant.config}"
            failures += [f"{what}: {fault}" for fault in _faults(report, variant.tensor_cores, spills)]
            count += 1
    if failures:
        sys.exit("\n".join(failures))
    print(count, "kernels compiled well")


def _faults(report: Report, tensor_cores: bool, spills: bool) -> Iterator[str]:
    if report.stack_bytes and not (spills and report.local_memory_in_loops() == 0):
        yield f"{report.stack_bytes} bytes of local memory"
    if not report.fits():
        yield f"{report.shared_memory} bytes of shared memory"
    found = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", report.ptx)
    # Whether products of float64 have any is up to the architecture.
    if "f64" not in report.ptx and tensor_cores != bool(found):
        yield f"{len(found)} matrix instructions"


def _run(tool: Any, *args: Any) -> str:
    return subprocess.run([tool.path, *args], capture_output=True, text=True, check=True).stdout
