"""How long one time step of a sequence kernel takes, by a model of its compiled code: `make step-model`.

The loop over time is read from the disassembly, with the stall counts and scoreboards by which the assembler schedules it, and
issued in order: the warps of one program that share a quarter of an SM, beside the pipes for which they compete
(tensor cores, special functions, shared memory, and the SM's port to the L2 cache). Programs have no skew, and the
first poll succeeds: a loop that waits for a counter takes no time, one that waits by loading the data itself loads it once.

Latencies are assumed ranges, (fewest, most) cycles, for GPUs of compute capability 8 and 9; no kernel of this project has been
timed. The model may be 30 % wrong or more. It is for differences between two forms of a kernel, and no kernel is fitted to its
constants.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from triton import knobs

from .aot import Report

# Cycles until a result of variable latency is there.
_LATENCIES = {
    "LDS": (23, 33),
    "LDSM": (26, 36),
    "SHFL": (23, 26),
    "MUFU": (18, 40),
    "LDG": (263, 500),
    "ATOMG": (263, 500),
    "S2R": (15, 30),
    "S2UR": (15, 30),
    "LDC": (25, 45),
    "POPC": (15, 25),
    "R2UR": (10, 12),
    "I2F": (15, 25),
    "F2I": (15, 25),
    "SYNCS": (20, 30),
    "LDGSTS": (263, 500),
}
_FROM_DRAM = (263, 800)  # what other launches have written may still lie in the L2 cache, or not
_L2_PORT = (64, 40)  # bytes a cycle: where few SMs read, and where all do
_SOURCES_READ = (8, 15)
_BARRIER_OF_THREADS = (18, 30)
_FENCE_OF_THREADS = (10, 35)
_FENCE = (10, 30)
_STORES_ACKNOWLEDGED = (263, 700)  # a way to the L2 cache and back since the last store
_TENSOR_CORES_DRAIN = (25, 60)
_OTHER = 20


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
    from_dram: bool = field(default=False)

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def loads_flag(self) -> bool:
        """A strong load of one word, as a barrier polls. Wider ones are of data, which takes the port to the L2 cache."""
        return self._is_strong_load and not re.search(r"\.(64|128)", self.name)

    @property
    def _is_strong_load(self) -> bool:
        return self.opcode == "LDG" and "STRONG" in self.name

    @property
    def bytes_of_thread(self) -> int:
        return next((n for width, n in ((".128", 16), (".64", 8), ("16", 2)) if width in self.name), 4)


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
        strong = [instructions[i] for i in loop if instructions[i]._is_strong_load]
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
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    at_barrier: bool = False
    products_end: float = 0
    stored: float = 0


def cycles(instructions: Sequence[Instruction], warps: int, most: bool) -> float:
    """Until `warps` warps of one partition have issued all of these, in the model's best or (most) worst case."""
    case = int(most)
    all_warps = [_Warp() for _ in range(warps)]
    pipes = {"MUFU": 0.0, "shared memory": 0.0, "L2": 0.0, "tensor cores": 0.0}
    now = 0

    def through(pipe: str, occupied: float) -> float:
        """When a transfer that asks now has left this pipe."""
        pipes[pipe] = max(now, pipes[pipe]) + occupied
        return pipes[pipe]

    def blocked(warp: _Warp, instruction: Instruction) -> bool:
        if any(instruction.waits >> k & 1 and until > now for k, until in enumerate(warp.scoreboards)):
            return True
        if instruction.opcode == "HMMA":
            return pipes["tensor cores"] > now
        waits_for_products = instruction.opcode == "WARPGROUP" and "DEPBAR" in instruction.name
        return waits_for_products and warp.products_end + _TENSOR_CORES_DRAIN[case] > now

    while any(warp.position < len(instructions) for warp in all_warps):
        for warp in sorted(all_warps, key=lambda warp: warp.position):
            if warp.position == len(instructions) or warp.ready > now or warp.at_barrier:
                continue
            instruction = instructions[warp.position]
            if blocked(warp, instruction):
                continue
            opcode = instruction.opcode
            warp.ready = now + max(instruction.stall, 1)
            result: float = now + (_LATENCIES[opcode][case] if opcode in _LATENCIES else _OTHER)
            if opcode == "MUFU":
                result = through("MUFU", 8) - 8 + _LATENCIES["MUFU"][case]
            elif opcode in ("LDS", "LDSM", "STS", "STSM"):
                # 128 bytes a cycle for four partitions, which all do the same at once.
                name = instruction.name
                width = 16 if ".128" in name or name.endswith(".4") else 8 if ".64" in name else 4
                result = through("shared memory", width) + _LATENCIES["LDSM" if opcode == "LDSM" else "LDS"][case] - 4
            elif opcode == "LDG" and not instruction.loads_flag:
                latency = _FROM_DRAM if instruction.from_dram else _LATENCIES["LDG"]
                result = through("L2", instruction.bytes_of_thread * 32 * 4 / _L2_PORT[case]) + latency[case]
            elif opcode == "MEMBAR":
                far = ".GPU" in instruction.name or ".SYS" in instruction.name
                acknowledged = max(warp.ready, warp.stored + _STORES_ACKNOWLEDGED[case])
                warp.ready = acknowledged if far else now + _FENCE_OF_THREADS[case]
            elif opcode == "FENCE":
                result = now + _FENCE[case]
            elif opcode == "HMMA":
                pipes["tensor cores"] = now + 8
            elif opcode == "HGMMA":
                warp.products_end = max(warp.products_end, now) + _wgmma_cycles(instruction)
            elif opcode == "STG":
                warp.stored = now
            if instruction.result < 6:
                warp.scoreboards[instruction.result] = max(warp.scoreboards[instruction.result], result)
            if instruction.sources < 6:
                read = now + _SOURCES_READ[case]
                warp.scoreboards[instruction.sources] = max(warp.scoreboards[instruction.sources], read)
            if opcode == "BAR":
                warp.at_barrier = True
                _open_barrier(all_warps, len(instructions), now + _BARRIER_OF_THREADS[case])
            else:
                warp.position += 1
            break
        now += 1
    return max(warp.ready for warp in all_warps)


def _open_barrier(warps: Sequence[_Warp], end: int, opens: float) -> None:
    """Let those go on that stand at a barrier, if all that still run do."""
    if all(warp.at_barrier or warp.position == end for warp in warps):
        for warp in warps:
            if warp.at_barrier:
                warp.ready, warp.at_barrier = max(warp.ready, opens), False
                warp.position += 1


def _wgmma_cycles(instruction: Instruction) -> float:
    shape = re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction.name)
    assert shape, instruction.text
    n, k = int(shape[1]), int(shape[2])
    itemsize, rate = (4, 1024) if "TF32" in instruction.name else (2, 2048)
    # Both operands from shared memory, or the left one from registers.
    shared = "gdesc[UR" in instruction.text and not re.search(r"R\d+, R\d+, gdesc", instruction.text)
    bytes_read = ((64 if shared else 0) + n) * k * itemsize
    return max(bytes_read / 128, 64 * n * k / rate, 0 if shared else 16)


def step_cycles(report: Report) -> tuple[list[Instruction], int, int]:
    """The instructions of a step, and its fewest and most cycles: those by which a third step prolongs two."""
    command = [knobs.nvidia.nvdisasm.path, "-hex", "--print-code", report.cubin]
    step = time_step(disassembled(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for instruction in step:
        if instruction._is_strong_load:
            break
        # Before the exchange a step asks for what other launches have written.
        instruction.from_dram = instruction.opcode == "LDG"
    else:
        for instruction in step:
            instruction.from_dram = False  # nothing is waited for
    warps = report.threads // 128
    fewest, most = (cycles(step * 3, warps, case) - cycles(step * 2, warps, case) for case in (False, True))
    return step, round(fewest), round(most)
