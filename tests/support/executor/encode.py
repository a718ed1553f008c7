"""From PTX to the machine's instructions."""

from __future__ import annotations

import functools
import re
import struct
from array import array
from dataclasses import dataclass, field

from .instructions import Instructions
from .ptx import SIZES, Kernel, Parameter, Statement, Unsupported, parse

SHARED_BASE = 1024  # the address of the first byte of shared memory, as in machine.h

# The first registers of a program, in the order of machine.c.
_SPECIALS = ("tid.x", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y", "nctaid.z", "ntid.x", "laneid", "warpid")
_FORM = re.compile(r"(?P<size>\d+)(?P<more>\+?)(?:x(?P<count>\d+)(?:/(?P<by>\d+))?)?\??|\[(?P<bases>[48]+)\]")

Place = tuple[int, int, int, int]  # struct Operand


@dataclass
class Program:
    """A kernel, encoded: all that the machine needs of it, which is kept on disk."""

    parameters: list[Parameter]
    threads: int
    waits: bool  # whether its programs may wait for each other: whether it acquires, or loads what may change meanwhile
    uses_tensor_memory: bool
    code: array = field(default_factory=lambda: array("i"))  # 16 integers for each statement: struct Instruction
    operands: array = field(default_factory=lambda: array("i"))
    image: array = field(default_factory=lambda: array("B"))  # the register file at the start
    defined: array = field(default_factory=lambda: array("I"))  # of each register: in which lanes it is, then

    @classmethod
    def of(cls, kernel: Kernel) -> Program:
        opcodes = {s.opcode for s in kernel.statements}
        waits = any(".acq" in o or o.startswith("ld.relaxed") for o in opcodes)
        return cls(kernel.parameters, kernel.threads, waits, any(o.startswith("tcgen05") for o in opcodes))

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + SIZES[p.type] for p in self.parameters), default=0)


def encode(ptx: str, instructions: Instructions) -> Program:
    """Raises Unsupported for everything that is not known, all of it in one message."""
    encoder = _Encoder(parse(ptx), instructions)
    faults = []
    for statement in encoder.kernel.statements:
        try:
            encoder.encode(statement)
        except Unsupported as fault:
            faults.append(str(fault))
    if faults:
        more = f"\nand {len(faults) - 20} more" if len(faults) > 20 else ""
        raise Unsupported(f"{encoder.kernel.name}: " + "\n".join(faults[:20]) + more)
    return encoder.out


class _Encoder:
    def __init__(self, kernel: Kernel, instructions: Instructions):
        self.kernel, self.instructions, self.out = kernel, instructions, Program.of(kernel)
        self.places: dict[tuple[str | int, int], Place] = {}  # of names and constants
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        for name in _SPECIALS:
            self._new(f"%{name}", 4, 0)

    def encode(self, s: Statement) -> None:
        """By the first form that the operands have."""
        try:
            candidates = self.instructions.forms(s.opcode)
        except LookupError as fault:
            raise s.unsupported(str(fault)) from None
        faults = [s.unsupported(f"unknown instruction {s.opcode}")]
        for operation, form, values in candidates:
            try:
                found = self._operands(s, form)
            except Unsupported as fault:
                faults.append(fault)
                continue
            if s.opcode == "bar.warp.sync" and self.kernel.threads == 32:  # the barrier of the warp is the program's
                [(operation, *_)] = self.instructions.forms("bar.sync")
            return self._emit(s, operation, values, *found)
        raise faults[-1]

    def _emit(
        self, s: Statement, operation: int, values: list[int], results: int, places: list[Place], numbers: list[int]
    ):
        target = self.kernel.target(s) if s.opcode.startswith("bra") else 0
        at, guard, *_ = self._place(s, s.guard, 1) if s.guard else (0, -1)
        first = len(self.out.operands) // 4
        for place in places:
            self.out.operands.extend(place)
        values = [*values, *numbers]
        values += [0] * (8 - len(values))
        self.out.code.extend((operation, guard, at, s.negated, target, first, results, len(places) - results, *values))

    # ---- operands ----

    def _operands(self, s: Statement, form: list[str]) -> tuple[int, list[Place], list[int]]:
        """How many results, all operands, and the numbers among them, if they have this form."""
        texts = [text for operand in s.operands for text in operand.split("|")]
        if len(texts) == len(form) - 2:
            form = [token for token in form if token[-1] != "?"]
        if len(texts) != len(form) - 1:
            raise s.unsupported("number of operands")
        places: list[Place] = []
        numbers: list[int] = []
        results, remaining = 0, iter(texts)
        for token in form:
            if token == "=":
                results = len(places)
                continue
            text = next(remaining)
            if token[0] in "!#":
                self._number(s, text, token, numbers)
            elif token != "label":
                found = _form(token)
                places += self._address(s, text, found["bases"]) if found["bases"] else self._values(s, text, found)
        return results, places, numbers

    def _number(self, s: Statement, text: str, token: str, numbers: list[int]) -> None:
        value, allowed = _constant(text, 4), [_constant(n, 4) for n in token[1:].rstrip("?").split("|") if n]
        if value is None or (allowed and value not in allowed):
            raise s.unsupported(f"operand `{text}`")
        if token[0] == "#":
            numbers.append(value)

    def _values(self, s: Statement, text: str, form: re.Match) -> list[Place]:
        size, count = int(form["size"]), int(form["count"] or 1) // int(form["by"] or 1)
        names = [name.strip() for name in text.strip("{}").split(",")]
        if len(names) != count or (text[0] == "{" and not form["count"] and not form["more"]):
            raise s.unsupported("registers")
        return [self._place(s, n, max(size, self.kernel.registers.get(n, 0)) if form["more"] else size) for n in names]

    def _address(self, s: Statement, text: str, sizes: str) -> list[Place]:
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise s.unsupported(f"address `{text}`")
        size = self.kernel.registers.get(found[1], int(sizes[0]))
        if str(size) not in sizes:
            raise s.unsupported(f"address `{text}` of {8 * size} bits")
        return [(*self._place(s, found[1], size)[:3], int(found[2] or "0", 0))]

    def _place(self, s: Statement, text: str, size: int) -> Place:
        """A register of this size, or a constant or special register where there is none."""
        if found := self.places.get((text, size)):
            return found
        registered = self.kernel.registers.get(text, size if text == "_" else 4 if text[1:] in _SPECIALS else None)
        if registered is not None:
            if registered != size:
                raise s.unsupported(f"{text} has {8 * registered} bits, not {8 * size}")
            return self._new(text, size, None)
        value = SHARED_BASE if text == "global_smem" else self.parameters.get(text, _constant(text, size))
        if value is None:
            raise s.unsupported(f"operand `{text}`")
        return self.places.get((value, size)) or self._new(value, size, value)

    def _new(self, name: str | int, size: int, value: int | None) -> Place:
        out = self.out
        self.places[name, size] = place = (len(out.image), len(out.defined), size, 0)
        # A predicate is a word of 32 bits.
        values = [0xFFFFFFFF if value else 0] if size == 1 else [value or 0] * 32
        out.image.frombytes(struct.pack({1: "<I", 2: "<32H", 4: "<32I", 8: "<32Q"}[size], *values))
        out.image.extend(bytes(-len(out.image) % 64))
        out.defined.append(0 if value is None else 0xFFFFFFFF)
        return place


@functools.cache
def _form(token: str) -> re.Match:
    found = _FORM.fullmatch(token)
    assert found is not None, token
    return found


def _constant(text: str, size: int) -> int | None:
    """The bits of a number in PTX."""
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        bits = found[1] or found[2]
        return int(bits, 16) if len(bits) == 2 * size else None
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return None
    value = int(text.rstrip("U"), 0)
    if size == 1:
        return int(value != 0)
    return value & (1 << 8 * size) - 1 if -(1 << 8 * size - 1) <= value < 1 << 8 * size else None
