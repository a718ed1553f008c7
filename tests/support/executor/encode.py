"""From PTX to the machine's instructions: operations by their full names, families by their modifiers.

Arithmetic is a table (arithmetic.h): the opcode as a whole has to stand there. Instructions of memory, matrices and
synchronisation are families (memory.h, matrix.h, tensor.h), whose modifiers encode_memory.py and encode_matrix.py read.
"""

from __future__ import annotations

import functools
import re
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .ptx import Kernel, Parameter, Register, Statement, Unsupported, parse

SHARED_BASE = 1024  # the address of the first byte of shared memory, as in machine.h

_SPECIALS = ("tid.x", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y", "nctaid.z", "ntid.x", "laneid", "warpid")


class Operation(NamedTuple):
    """What the machine says about one of its operations. results is -1 for a family."""

    index: int
    results: int
    inputs: int
    sizes: tuple[int, ...]


@dataclass
class Program:
    """A kernel, encoded: all that the machine needs of it, which is kept on disk."""

    parameters: list[Parameter]
    threads: int
    waits: bool  # whether its programs may wait for each other: whether it acquires, or loads what may change meanwhile
    uses_tensor_memory: bool
    code: array = field(default_factory=lambda: array("i"))  # 16 integers for each statement: struct Instruction
    operands: array = field(default_factory=lambda: array("i"))  # pairs: byte offset in the register file, its number
    specials: array = field(default_factory=lambda: array("i"))  # triples: which, byte offset, number
    constants: array = field(default_factory=lambda: array("i"))
    image: bytearray = field(default_factory=bytearray)  # the register file at the start
    registers: int = 0
    origin: array = field(default_factory=lambda: array("i"))  # of each instruction: the position of its statement

    @classmethod
    def of(cls, kernel: Kernel) -> Program:
        opcodes = {s.opcode for s in kernel.statements}
        waits = any(".acq" in o or o.startswith("ld.relaxed") for o in opcodes)
        return cls(kernel.parameters, kernel.threads, waits, any(o.startswith("tcgen05") for o in opcodes))


def encode(ptx: str, operation: Callable[[str], Operation | None]) -> Program:
    """Raises Unsupported for everything that is not known, all of it in one message."""
    return Encoder(parse(ptx), operation).run()


class Encoder:
    def __init__(self, kernel: Kernel, operation: Callable[[str], Operation | None]):
        self.kernel, self.operation = kernel, operation
        self.out = Program.of(kernel)
        self.found: dict[tuple, tuple[int, int]] = {}
        self.places: dict[tuple, tuple[int, int]] = {}
        self.parameters = {p.name: p.offset for p in kernel.parameters}

    def run(self) -> Program:
        faults = []
        starts = []
        for position, statement in enumerate(self.kernel.statements):
            self.position = position
            starts.append(len(self.out.origin))
            try:
                self._encode(statement)
            except Unsupported as fault:
                faults.append(str(fault))
        if faults:
            more = f"\nand {len(faults) - 20} more" if len(faults) > 20 else ""
            raise Unsupported(f"{self.kernel.name}: " + "\n".join(faults[:20]) + more)
        for target in range(
            4, len(self.out.code), 16
        ):  # of branches: from the position of a statement to its instruction
            self.out.code[target] = starts[self.out.code[target]]
        return self.out

    def _encode(self, s: Statement) -> None:
        known = self.operation(s.opcode)
        if known is not None and known.results >= 0 and not any(o.startswith("{") for o in s.operands):
            return self._encode_operation(s, known)
        function, found = _family_of(s.opcode)
        if function is None:
            raise s.unsupported(f"unknown instruction {s.opcode}")
        function(self, s, found)

    def _encode_operation(self, s: Statement, known: Operation) -> None:
        operands, name = [o for operand in s.operands for o in operand.split("|")], s.opcode
        if len(operands) == 4 and known.inputs == 2 and (three := self.operation(f"{s.opcode}/3")):
            name, known = f"{s.opcode}/3", three
        if len(operands) != known.results + known.inputs:
            raise s.unsupported("number of operands")
        source = self.register(s, operands[-1])
        if (
            s.opcode.startswith("cvt.") and source and source.size > known.sizes[1]
        ):  # reads the low bits of a wider register
            parts = source.size // known.sizes[1]
            operands[-1:] = []
            places = [self._place(("part", part, known.sizes[1]), known.sizes[1]) for part in range(parts)]
            self.emit(s, "mov.unpack", [*places, self.place_of_register(source)], parts, (known.sizes[1], source.size))
            return self.emit(s, name, [self.place(s, operands[0], known.sizes[0]), places[0]], known.results)
        self.emit(s, name, [self.place(s, o, size) for o, size in zip(operands, known.sizes)], known.results)

    def emit(
        self,
        s: Statement,
        name: str,
        places: list[tuple[int, int]],
        results: int,
        values: tuple[int, ...] = (),
        target: int = 0,
    ) -> None:
        operation = self.operation(name)
        assert operation is not None, name
        at, guard = self.place_of_register(s.guard) if s.guard else (0, -1)
        first = len(self.out.operands) // 2
        for place in places:
            self.out.operands.extend(place)
        values = (*values, *(0,) * (8 - len(values)))
        self.out.origin.append(self.position)
        counts = results, len(places) - results
        self.out.code.extend((operation.index, guard, at, s.negated, target, first, *counts, *values))

    # ---- operands ----

    def register(self, s: Statement, name: str) -> Register | None:
        return next((scope[name] for scope in s.scopes if name in scope), None)

    def place_of_register(self, register: Register) -> tuple[int, int]:
        return self._place(("register", register.name), register.size)

    def place(self, s: Statement, text: str, size: int) -> tuple[int, int]:
        """A register of this size, or a constant or special register where there is none."""
        key = (s.label_scope, text, size)
        if key not in self.found:
            self.found[key] = self._find(s, text, size)
        return self.found[key]

    def _find(self, s: Statement, text: str, size: int) -> tuple[int, int]:
        if register := self.register(s, text):
            if register.size != size:
                raise s.unsupported(f"{text} has {8 * register.size} bits, not {8 * size}")
            return self.place_of_register(register)
        if text[1:] in _SPECIALS and text[0] == "%":
            if size != 4:
                raise s.unsupported(f"{text} of {8 * size} bits")
            return self._place(("special", text), 4, special=_SPECIALS.index(text[1:]))
        if text == "_":
            return self._place(("part", "_", size), size)
        value = SHARED_BASE if text == "global_smem" else self.parameters.get(text, _constant(text, size))
        if value is None:
            raise s.unsupported(f"operand `{text}`")
        return self._place(("constant", value, size), size, value=value)

    def _place(self, key: tuple, size: int, value: int | None = None, special: int | None = None) -> tuple[int, int]:
        if key not in self.places:
            out = self.out
            self.places[key] = place = (len(out.image), out.registers)
            out.registers += 1
            lanes = {1: "<I", 2: "<32H", 4: "<32I", 8: "<32Q"}[size]
            # A predicate is a word of 32 bits.
            values = [-(value or 0 != 0) & 0xFFFFFFFF if size == 1 and value else value or 0] * (1 if size == 1 else 32)
            out.image += struct.pack(lanes, *values)
            out.image += bytes(-len(out.image) % 64)
            if value is not None:
                out.constants.append(place[1])
            if special is not None:
                out.specials.extend((special, *place))
        return self.places[key]

    def vector(self, s: Statement, text: str) -> list[str]:
        return [t.strip() for t in text.strip("{}").split(",")] if text.startswith("{") else [text]

    def places_of(self, s: Statement, text: str, size: int) -> list[tuple[int, int]]:
        return [self.place(s, t, size) for t in self.vector(s, text)]

    def address(self, s: Statement, text: str, sizes: tuple[int, ...] = (4, 8)) -> tuple[tuple[int, int], int, int]:
        """The place of the base, the offset, the bytes of the base."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise s.unsupported(f"address `{text}`")
        register = self.register(s, found[1])
        size = register.size if register else sizes[0]
        if size not in sizes:
            raise s.unsupported(f"address `{text}` of {8 * size} bits")
        return self.place(s, found[1], size), int(found[2], 0) if found[2] else 0, size


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


_FAMILIES: list[tuple[re.Pattern, Callable[[Encoder, Statement, re.Match], None]]] = []


@functools.cache
def _family_of(opcode: str) -> tuple[Callable | None, Any]:
    return next(((function, m) for pattern, function in _FAMILIES if (m := pattern.fullmatch(opcode))), (None, None))


def family(pattern: str):
    """Declares how instructions whose opcode fits the pattern are encoded."""

    def register(function):
        _FAMILIES.append((re.compile(pattern), function))
        return function

    return register
