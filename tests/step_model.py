"""Cycles of a time step of the sequence kernels, by a model of their compiled code: `make step-model`.

`make step-model ARGS="90 768 16 bf16"` compiles both kernels for compute capability 9.0, H = 768, B = 16 in bfloat16; without
ARGS for the five layers of the table in docs/design.md. No GPU is needed, and none is timed.

The loop over time is read from the disassembly, with the stall counts and scoreboards by which the assembler schedules it, and
issued in order: the warps of one program that share a quarter of an SM, beside the pipes for which they compete
(tensor cores, special functions, shared memory, and the SM's port to the L2 cache). Programs have no skew, and the
first poll succeeds: a loop that waits for a counter takes no time, one that waits by loading the data itself loads it once.

Latencies are assumed ranges, (fewest, most) cycles, for GPUs of compute capability 8 and 9; no kernel of this project has been
timed. The model may be 30 % wrong or more. It is for differences between two forms of a kernel, and no kernel is fitted to its
constants.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parent.parent / ".ci-cache" / "triton"))

from support.aot import KINDS, Report  # noqa: E402
from support.aot_sequence import Case, choose  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime.cache import get_cache_manager  # noqa: E402

LAYERS = (
    ("768", "16", "bf16"),
    ("512", "16", "fp16"),
    ("256", "64", "tf32"),
    ("1024", "16", "bf16"),
    ("128", "64", "bf16"),
)

# Cycles until a result of variable latency is there.
_LATENCIES = {
    opcode: latency
    for opcodes, latency in {
        "LDS STS STSM": (23, 33),
        "LDSM": (26, 36),
        "SHFL": (23, 26),
        "MUFU": (18, 40),
        "LDG ATOMG LDGSTS": (263, 500),
        "S2R S2UR": (15, 30),
        "LDC": (25, 45),
        "POPC I2F F2I": (15, 25),
        "R2UR": (10, 12),
        "SYNCS": (20, 30),
        "FENCE": (10, 30),
    }.items()
    for opcode in opcodes.split()
}
_OTHER = (20, 20)
_FROM_DRAM = (263, 800)  # what other launches have written may still lie in the L2 cache, or not
_L2_PORT = (64, 40)  # bytes a cycle: where few SMs read, and where all do
_SOURCES_READ = (8, 15)
_BARRIER_OF_THREADS = (18, 30)
_FENCE_OF_THREADS = (10, 35)
_STORES_ACKNOWLEDGED = (263, 700)  # a way to the L2 cache and back since the last store
_TENSOR_CORES_DRAIN = (25, 60)


@dataclass
class Instruction:
    """One line of SASS with its scheduling: cycles to the next one; scoreboards it sets, by its result and when its sources are
    read, and those it waits for."""

    text: str  # without its predicate
    labels: list[str]
    stall: int
    result: int
    sources: int
    waits: int
    from_dram: bool = False

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_strong_load(self) -> bool:
        return self.opcode == "LDG" and "STRONG" in self.name

    @property
    def loads_flag(self) -> bool:
        """A strong load of one word, as a barrier polls. Wider ones are of data, which takes the port to the L2 cache."""
        return self.is_strong_load and not re.search(r"\.(64|128)", self.name)

    def transfer(self, case: int) -> tuple[str, float, int]:
        """The pipe that it takes, for how many cycles, and how many after that its result is there."""
        latency = _LATENCIES.get(self.opcode, _OTHER)[case]
        if self.opcode == "MUFU":
            return "special functions", 8, latency - 8
        if self.opcode == "HMMA":
            return "tensor cores", 8, latency - 8
        if self.opcode in ("LDS", "LDSM", "STS", "STSM"):
            # 128 bytes a cycle for four partitions, which all do the same at once.
            wide = ".128" in self.name or self.name.endswith(".4")
            return "shared memory", 16 if wide else 8 if ".64" in self.name else 4, latency - 4
        if self.opcode == "LDG" and not self.loads_flag:
            bytes_of_thread = next((n for width, n in ((".128", 16), (".64", 8), ("16", 2)) if width in self.name), 4)
            return "L2", bytes_of_thread * 32 * 4 / _L2_PORT[case], _FROM_DRAM[case] if self.from_dram else latency
        return "none", 0, latency

    def wgmma_cycles(self) -> float:
        shape = re.match(r"HGMMA\.64x(\d+)x(\d+)", self.name)
        assert shape, self.text
        n, k = int(shape[1]), int(shape[2])
        itemsize, rate = (4, 1024) if "TF32" in self.name else (2, 2048)
        # Both operands from shared memory, or the left one from registers.
        shared = "gdesc[UR" in self.text and not re.search(r"R\d+, R\d+, gdesc", self.text)
        bytes_read = ((64 if shared else 0) + n) * k * itemsize
        return max(bytes_read / 128, 64 * n * k / rate, 0 if shared else 16)


def disassembled(disassembly: str) -> list[Instruction]:
    """The instructions in what `nvdisasm -hex` prints."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    text = None
    for line in disassembly.splitlines():
        if label := re.match(r"(\.L_?\w+):", line):
            labels.append(label[1])
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(.*?);\s+/\* 0x[0-9a-f]+ \*/", line):
            text = code[1].strip()
        elif text and (upper := re.match(r"\s+/\* (0x[0-9a-f]+) \*/", line)):
            control = int(upper[1], 16) >> 41  # bits 105 and up of 128
            stall, result, sources = control & 15, control >> 5 & 7, control >> 8 & 7
            instructions.append(Instruction(text, labels, stall, result, sources, control >> 11 & 63))
            labels, text = [], None
    return instructions


def time_step(instructions: Sequence[Instruction]) -> list[Instruction]:
    """What a warp issues in one step: the longest loop, less the loops in it that poll a counter, and the ways to a trap."""
    positions = {label: i for i, instruction in enumerate(instructions) for label in instruction.labels}
    branches = {}
    for source, instruction in enumerate(instructions):
        label = re.search(r"`\((\.L\w+)\)", instruction.text) if instruction.opcode == "BRA" else None
        if label and label[1] in positions:
            branches[source] = positions[label[1]]
    loops = [range(target, source + 1) for source, target in branches.items() if target <= source]
    longest = max(loops, key=len)
    left_out: set[int] = set()
    for loop in loops:
        strong = [instructions[i] for i in loop if instructions[i].is_strong_load]
        inside = loop != longest and longest.start <= loop.start and loop.stop <= longest.stop
        if inside and len(strong) == 1 and strong[0].loads_flag:
            left_out.update(loop)
    for trap in (i for i in longest if instructions[i].opcode == "BPT"):
        # Nothing passes here but a wait that does not end: the nearest branch before it leads past it.
        around = [source for source, target in branches.items() if source < trap < target < longest.stop]
        left_out.update(range(max(around) + 1, branches[max(around)]) if around else ())
    return [replace(instructions[i]) for i in longest if i not in left_out]


@dataclass
class _Warp:
    position: int = 0
    ready: float = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 8)  # 6 of them; 7 stands for none
    at_barrier: bool = False
    products_end: float = 0
    stored: float = 0


def cycles(instructions: Sequence[Instruction], warps: int, most: bool) -> float:
    """Until `warps` warps of one partition have issued all of these, in the model's best or (most) worst case."""
    case, now, end = int(most), 0, len(instructions)
    all_warps = [_Warp() for _ in range(warps)]
    free_at: Counter[str] = Counter()  # of each pipe

    def blocked(warp: _Warp, instruction: Instruction) -> bool:
        if any(instruction.waits >> k & 1 and until > now for k, until in enumerate(warp.scoreboards)):
            return True
        if instruction.opcode == "HMMA":
            return free_at["tensor cores"] > now
        waits_for_products = instruction.opcode == "WARPGROUP" and "DEPBAR" in instruction.name
        return waits_for_products and warp.products_end + _TENSOR_CORES_DRAIN[case] > now

    def issue(warp: _Warp, instruction: Instruction) -> None:
        pipe, occupied, latency = instruction.transfer(case)
        free_at[pipe] = max(now, free_at[pipe]) + occupied
        for scoreboard, until in (
            (instruction.result, free_at[pipe] + latency),
            (instruction.sources, now + _SOURCES_READ[case]),
        ):
            warp.scoreboards[scoreboard] = max(warp.scoreboards[scoreboard], until)
        warp.ready = now + max(instruction.stall, 1)
        if instruction.opcode == "MEMBAR":
            far = ".GPU" in instruction.name or ".SYS" in instruction.name
            acknowledged = max(warp.ready, warp.stored + _STORES_ACKNOWLEDGED[case])
            warp.ready = acknowledged if far else now + _FENCE_OF_THREADS[case]
        elif instruction.opcode == "HGMMA":
            warp.products_end = max(warp.products_end, now) + instruction.wgmma_cycles()
        elif instruction.opcode == "STG":
            warp.stored = now
        warp.at_barrier = instruction.opcode == "BAR"
        warp.position += 1
        # A barrier opens as soon as all warps that still run stand at it.
        if warp.at_barrier and all(w.at_barrier or w.position == end for w in all_warps):
            for w in all_warps:
                if w.at_barrier:
                    w.ready, w.at_barrier = max(w.ready, now + _BARRIER_OF_THREADS[case]), False

    while any(warp.position < end or warp.at_barrier for warp in all_warps):
        for warp in sorted(all_warps, key=lambda warp: warp.position):
            runs = warp.position < end and warp.ready <= now and not warp.at_barrier
            if runs and not blocked(warp, instructions[warp.position]):
                issue(warp, instructions[warp.position])
                break
        now += 1
    return max(warp.ready for warp in all_warps)


def step_cycles(report: Report) -> tuple[list[Instruction], int, int]:
    """The instructions of a step, and its fewest and most cycles: those by which a third step prolongs two."""
    binary = get_cache_manager(report.kernel.hash).get_file(f"{report.name}.cubin")
    command = [knobs.nvidia.nvdisasm.path, "-hex", "--print-code", binary]
    step = time_step(disassembled(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    strong = [instruction.is_strong_load for instruction in step]
    for instruction in step[: strong.index(True)] if True in strong else ():
        # Before the exchange a step asks for what other launches have written.
        instruction.from_dram = instruction.opcode == "LDG"
    warps = report.threads // 128
    fewest, most = (cycles(step * 3, warps, case) - cycles(step * 2, warps, case) for case in (False, True))
    return step, round(fewest), round(most)


def main(arguments: Sequence[str]) -> None:
    arch, *layer = arguments or ["90"]
    for H, B, kind, *ways in [layer] if layer else LAYERS:
        for way in ways or ("forward", "backward"):
            report = choose(Case(way, int(H), int(B), 1, *KINDS[kind]), int(arch)).report
            step, fewest, most = step_cycles(report)
            print(
                f"sm_{arch} {way:8} H={H} B={B} {kind}: {fewest} to {most} cycles, {len(step)} instructions,"
                f" {report.registers} registers, {report.stack_bytes} bytes of local memory",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
