"""Compile a kernel for any NVIDIA GPU on a machine without one, and read what became of it.

    report = compile_ahead(kernel, {"x_ptr": "*bf16:16", "T": "i32"}, {"BLOCK": 64}, arch=90, num_warps=4, num_stages=1)
    assert report.fits() and report.local_memory_in_loops() == 0

Not in a process with TRITON_INTERPRET=1, where Triton's own library functions cannot be compiled: see
process.run_without_interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

# Bytes that one block may have, by compute capability (CUDA C++ programming guide, technical specifications).
SHARED_MEMORY_PER_BLOCK = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# Architectures for which Triton writes the same PTX, products of float64 apart: one process of a test compiles for all of them.
GENERATIONS = ((80, 86, 89), (90,), (100,), (120,))

# Whether Triton puts a bar.sync before every release by itself.
RELEASE_COLLECTS_STORES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)

_GLOBAL_LOADS = {"LDG", "LDGSTS", "UTMALDG", "UBLKCP"}
_LOCAL_MEMORY = {"LDL", "STL"}


class Instruction(NamedTuple):
    opcode: str  # without its modifiers: "LDG", not "LDG.E.128"
    text: str


@dataclass(frozen=True)
class Report:
    """A compiled kernel's resources and code. Nothing is disassembled before it is asked for."""

    name: str
    arch: int
    registers: int  # per thread
    spill_bytes: int  # stored to local memory for want of registers, plus those loaded back; per thread
    stack_bytes: int  # local memory per thread, for whatever reason
    shared_memory: int  # bytes per block
    threads: int  # per block
    tensor_memory: int  # columns per block
    options: Mapping[str, Any] = field(repr=False)  # of the compiler
    asm: Mapping[str, Any] = field(repr=False)

    @property
    def ptx(self) -> str:
        return self.asm["ptx"]

    @property
    def ttgir(self) -> str:
        return self.asm["ttgir"]

    @functools.cached_property
    def sass(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(self.asm["cubin"])
            cubin.flush()
            command = [knobs.nvidia.nvdisasm.path, "--print-code", cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

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
    kernel: Any,
    signature: Mapping[str, str | None] | Sequence[str | None],
    constexprs: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    **options: Any,
) -> Report:
    """Compile a @triton.jit kernel for compute capability `arch` (80, 86, 89, 90, 100 or 120).

    signature: the type of every parameter that is not in constexprs, by name or in order: "*bf16", "i32", "fp32".
        What the JIT would find out about the argument has to be said here, or the code is not the code that runs:
        "*bf16:16" and "i32:16" are divisible by 16, "i32:1" is 1 (and becomes a constant), None is None.
    options: further options of a launch, such as maxnreg or launch_cooperative_grid.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn  # inside triton.autotune or triton.heuristics
    source = ASTSource(kernel, *_specialize(kernel.arg_names, signature, constexprs))
    options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    with _log_of_ptxas() as log:
        knobs.compilation.always_compile = True  # a kernel from the cache comes without a log
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata = compiled.metadata
    return Report(
        metadata.name, arch, *_resources(log), metadata.shared, metadata.num_warps * 32, metadata.tmem_size, options,
        compiled.asm,
    )  # fmt: skip


def compile_for(archs: Sequence[int], kernel: Any, signature: Any, constexprs: Mapping[str, Any], **options: Any):
    """A report for each architecture of one of GENERATIONS. Compiled for the first only, unless with float64."""
    first = compile_ahead(kernel, signature, constexprs, arch=archs[0], **options)
    if "f64" in first.ptx:
        return [first, *(compile_ahead(kernel, signature, constexprs, arch=arch, **options) for arch in archs[1:])]
    return [first, *(assemble(first, arch) for arch in archs[1:])]


def assemble(report: Report, arch: int) -> Report:
    """The same PTX for another architecture of its generation: what compiling gives, in a fraction of the time."""
    ptx = re.sub(r"\.target sm_\d+", f".target sm_{arch}", report.ptx)
    backend = make_backend(GPUTarget("cuda", arch, 32))
    with _log_of_ptxas() as log:
        cubin = backend.make_cubin(ptx, {}, backend.parse_options(report.options), arch)
    registers, spill_bytes, stack_bytes = _resources(log)
    return replace(
        report, arch=arch, registers=registers, spill_bytes=spill_bytes, stack_bytes=stack_bytes,
        asm={**report.asm, "ptx": ptx, "cubin": cubin},
    )  # fmt: skip


@contextlib.contextmanager
def _log_of_ptxas():
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        yield log


def _resources(log: io.StringIO) -> tuple[int, int, int]:
    """Registers, bytes spilled and bytes of stack."""
    return (
        max(_numbers(r"Used (\d+) registers", log)),
        sum(_numbers(r"(\d+) bytes spill", log)),
        max(_numbers(r"(\d+) bytes stack frame", log)),
    )


def _numbers(pattern: str, log: io.StringIO) -> list[int]:
    numbers = [int(number) for number in re.findall(pattern, log.getvalue())]
    if not numbers:
        raise RuntimeError(f"no {pattern!r} in the output of ptxas:\n{log.getvalue()}")
    return numbers


def _specialize(names, signature, constexprs):
    """Types, constants and attributes as the JIT would make them of real arguments."""
    if not isinstance(signature, Mapping):
        signature = dict(zip([name for name in names if name not in constexprs], signature, strict=True))
    if unclear := set(names) ^ (set(signature) | set(constexprs)) | set(signature) & set(constexprs):
        raise ValueError(f"given twice, missing or unknown: {sorted(unclear)}")
    types, constants, attributes = {}, dict(constexprs), {}
    for position, name in enumerate(names):
        type_, _, hint = (signature.get(name) or "").partition(":")
        if name in constexprs or not type_ or hint == "1":
            types[name] = "constexpr"
            constants.setdefault(name, 1 if hint else None)
        else:
            types[name] = type_
            if hint:
                attributes[(position,)] = [["tt.divisibility", int(hint)]]
    return types, constants, attributes


_CTA_BARRIER = re.compile(r"(bar|barrier|barrier\.cta)\.sync\b")
_WARP_BARRIER = re.compile(r"bar\.warp\.sync\b")
_RELEASE = re.compile(r"(atom|red|st)\S*\.(release|acq_rel)\b|fence\.(acq_rel|sc)\.(gpu|sys)|membar\.(gl|sys)")
_ACQUIRE = re.compile(r"(atom|ld)\S*\.(acquire|acq_rel)\b|fence\.(acq_rel|sc)\.(gpu|sys)|membar\.(gl|sys)")
_STORE = re.compile(r"st\S*\.global\b|cp\S*\.global\.shared\b|cp\.reduce\.async\.bulk\b")
_LOAD = re.compile(r"ld\S*\.global\b|cp\.async\S*\.shared\S*\.global\b")


def lint_grid_barrier(report: Report) -> list[str]:
    """Faults of a kernel whose programs wait for each other through a counter in global memory; [] if there are none.

    One thread arrives with a release and polls with an acquire on behalf of its whole program (CTA), so that

    * between any global store and the release after it a bar.sync collects the other threads' stores;
    * there is a release and an acquire: a volatile spin is none, and Triton up to 3.7 drops an acquire whose result is
      unused;
    * between the acquire and the next global load a bar.sync holds the other threads back;
    * the loop around the barrier is not software-pipelined, or its loads run before the barriers of earlier iterations.

    Every path through the PTX is followed. Atomics on data have to be relaxed, or they are taken for the barrier's.
    """
    code, labels = _parse_ptx(report.ptx)
    releases = any(_RELEASE.match(instruction) for _, instruction in code)
    acquires = any(_ACQUIRE.match(instruction) for _, instruction in code)
    faults = []
    if not releases:
        faults.append("no release: what a program stores need never reach the others")
    if not acquires:
        faults.append("no acquire: what a program loads may be older than the barrier")
    barriers = [_CTA_BARRIER, _WARP_BARRIER] if report.threads == 32 else [_CTA_BARRIER]
    # What may be true on arriving at an instruction: global stores, or an acquire, with no bar.sync since.
    to_visit, seen = [(0, False, False)], set()
    while to_visit:
        state = position, stored, acquired = to_visit.pop()
        if position >= len(code) or state in seen:
            continue
        seen.add(state)
        _, instruction = code[position]
        if any(barrier.match(instruction) for barrier in barriers):
            stored = acquired = False
        if _RELEASE.match(instruction):
            if stored:
                faults.append(f"no bar.sync between the stores and the release: {instruction}")
        elif _STORE.match(instruction):
            stored = True
        if _ACQUIRE.match(instruction):
            acquired = True
        elif acquired and _LOAD.match(instruction):
            faults.append(f"no bar.sync between the acquire and the load: {instruction}")
        to_visit += [(following, stored, acquired) for following in _next_positions(code, labels, position)]
    return sorted({*faults, *_pipelined_barriers(report.ttgir)})


def loads_behind_grid_barrier(report: Report) -> list[int]:
    """Global loads in the PTX on the paths from an acquire to the next release: how many with no bar.sync between them.

    What the programs exchange is loaded there and nowhere else: fewer loads than that takes have moved above the wait, where
    they read what need not be written yet. The assembler moves no load across an acquire or up across a bar.sync.
    """
    code, labels = _parse_ptx(report.ptx)
    to_visit = [position for position, (_, instruction) in enumerate(code) if _ACQUIRE.match(instruction)]
    seen: set[int] = set()
    while to_visit:
        position = to_visit.pop()
        if position in seen or position >= len(code) or _RELEASE.match(code[position][1]):
            continue
        seen.add(position)
        to_visit += _next_positions(code, labels, position)
    rounds = [0]
    for position in sorted(seen):
        instruction = code[position][1]
        if _CTA_BARRIER.match(instruction):
            rounds.append(0)
        elif _LOAD.match(instruction) and not _ACQUIRE.match(instruction):
            rounds[-1] += 1
    return [number for number in rounds if number]


def _next_positions(code: list[tuple[bool, str]], labels: dict[str, int], position: int) -> list[int]:
    guarded, instruction = code[position]
    jump = re.match(r"bra\S*\s+(\S+)", instruction)
    following = [labels[jump[1]]] if jump else []
    if guarded or not (jump or re.match(r"(ret|exit|trap)\b", instruction)):
        following.append(position + 1)
    return following


def _parse_ptx(ptx: str) -> tuple[list[tuple[bool, str]], dict[str, int]]:
    """(whether it is predicated, the instruction without its predicate) in order, and the position of every label."""
    code, labels = [], {}
    for statement in re.split(r"[;\n{}]|(?<=:)\s", re.sub(r"//.*", "", ptx)):
        predicate, instruction = re.match(r"\s*(@!?\S+)?\s*(.*?)\s*$", statement, re.DOTALL).groups()
        if instruction.endswith(":"):
            labels[instruction[:-1]] = len(code)
        elif instruction and not instruction.startswith("."):
            if instruction == "trap" and code[-1][1] == "membar.sys":
                code.pop()  # what a kernel says before it stops the device is for the host: no part of any barrier
            code.append((predicate is not None, instruction))
    return code, labels


def _pipelined_barriers(ttgir: str) -> list[str]:
    faults, loops = [], []  # of the loops around a line: indentation, text
    for line in filter(str.strip, ttgir.splitlines()):
        indentation = len(line) - len(line.lstrip())
        loops = [loop for loop in loops if loop[0] < indentation]
        if "scf.for" in line:
            loops.append((indentation, line))
        elif re.search(r"tt\.atomic_|inline_asm.*\.(release|acquire)", line):
            pipelined = [text for _, text in loops if re.search(r"!ttg\.(async\.token|memdesc)", text)]
            faults += [f"the loop around the barrier is software-pipelined: {text.strip()[:80]}" for text in pipelined]
    return faults
