"""What became of a kernel that was compiled for some NVIDIA GPU: its resources and instructions, on a machine without one."""

from __future__ import annotations

import functools
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

from lstm_triton.kernels.search import MATRIX_INSTRUCTIONS

# Bytes that one block may have, by compute capability (CUDA C++ programming guide, technical specifications).
SHARED_MEMORY_PER_BLOCK = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# One of each generation; the others have the same instructions.
ARCHITECTURES = (80, 90, 100, 120)

# What a test calls a dtype, and the precision of its products.
KINDS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp64": (torch.float64, "ieee"),
}


class Instruction(NamedTuple):
    opcode: str  # without its modifiers: "LDG", not "LDG.E.128"
    text: str


@dataclass(frozen=True)
class Report:
    """The resources and code of a kernel that a `fake_driver` has loaded. Nothing is disassembled before it is asked for."""

    kernel: CompiledKernel = field(repr=False)
    arch: int

    name = property(attrgetter("kernel.name"))
    ptx = property(lambda self: self.kernel.asm["ptx"])
    ttgir = property(lambda self: self.kernel.asm["ttgir"])
    shared_memory = property(attrgetter("kernel.metadata.shared"))  # bytes of a block
    tensor_memory = property(attrgetter("kernel.metadata.tmem_size"))  # columns of a block
    threads = property(lambda self: 32 * self.kernel.metadata.num_warps)  # of a block
    registers = property(attrgetter("kernel.n_regs"))  # of a thread
    # Local memory of a thread: for want of registers, or for arrays.
    stack_bytes = property(lambda self: 4 * self.kernel.n_spills)

    @functools.cached_property
    def sass(self) -> str:
        beside = get_cache_manager(self.kernel.hash)  # in Triton's cache
        if not (path := beside.get_file("sass")):
            command = [knobs.nvidia.nvdisasm.path, "--print-code", beside.get_file(f"{self.name}.cubin")]
            path = beside.put(subprocess.run(command, capture_output=True, text=True, check=True).stdout, "sass")
        return Path(path).read_text()

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

    def blocks_per_sm(self) -> int:
        """The most blocks of this kernel that share an SM of sm_90 or sm_100: by its registers, shared memory and warps."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min((64 << 10) // registers, (228 << 10) // (self.shared_memory + 1024), 2048 // self.threads)

    def local_memory_in_loops(self) -> int:
        """Loads from and stores to local memory inside loops: spills that are paid for again and again."""
        return sum(i.opcode in ("LDL", "STL") for i in self.in_loops) if self.stack_bytes else 0

    def faults(self, on_tensor_cores: bool | None, most_words: int) -> Iterator[str]:
        """What is wrong with any kernel. most_words: of local memory that a thread may have.

        on_tensor_cores: whether it has to have matrix instructions; None if it may.
        """
        if self.stack_bytes > 4 * most_words:
            yield f"{self.stack_bytes} bytes of local memory"
        if self.shared_memory > SHARED_MEMORY_PER_BLOCK[self.arch]:
            yield f"{self.shared_memory} bytes of shared memory"
        has_product = any(name in self.ptx for name in MATRIX_INSTRUCTIONS)
        if on_tensor_cores is not None and has_product != on_tensor_cores:
            yield f"{'' if has_product else 'no '}matrix instructions"
