"""From PTX to the machine's instructions: operations by their full names, families by their modifiers.

Arithmetic is a table (arithmetic.h): the opcode as a whole has to stand there. Instructions of memory, matrices and
synchronisation are families (memory.h, matrix.h, tensor.h), whose modifiers are read here.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .ptx import SIZES, Kernel, Register, Statement, Unsupported, parse

SHARED_BASE = 1024  # the address of the first byte of shared memory, as in machine.h

_SPECIALS = ("tid.x", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y", "nctaid.z", "ntid.x", "laneid", "warpid")
_TYPES = {"bf16": 0, "f16": 1, "tf32": 2}


class Operation(NamedTuple):
    """What the machine says about one of its operations. results is -1 for a family."""

    index: int
    results: int
    inputs: int
    sizes: tuple[int, ...]


@dataclass
class Program:
    """A kernel, encoded."""

    kernel: Kernel
    code: list[int]  # 16 integers for each statement: struct Instruction
    operands: list[int]  # pairs: byte offset in the register file, number of the register
    specials: list[int]  # triples: which, byte offset, number
    constants: list[int]
    image: bytearray  # the register file at the start
    registers: int
    origin: list[int]  # of each instruction: the position of its statement

    @property
    def waits(self) -> bool:
        """Whether its programs may wait for each other: whether it acquires."""
        return any(".acq" in s.opcode for s in self.kernel.statements)

    @property
    def uses_tensor_memory(self) -> bool:
        return any(s.opcode.startswith("tcgen05") for s in self.kernel.statements)


def encode(ptx: str, operation: Callable[[str], Operation | None]) -> Program:
    """Raises Unsupported for everything that is not known, all of it in one message."""
    return _Encoder(parse(ptx), operation).run()


class _Encoder:
    def __init__(self, kernel: Kernel, operation: Callable[[str], Operation | None]):
        self.operation = operation
        self.out = Program(kernel, [], [], [], [], bytearray(), 0, [])
        self.places: dict[tuple, tuple[int, int]] = {}
        self.parameters = {p.name: p.offset for p in kernel.parameters}

    def run(self) -> Program:
        faults = []
        starts = []
        for position, statement in enumerate(self.out.kernel.statements):
            self.position = position
            starts.append(len(self.out.origin))
            try:
                self._encode(statement)
            except Unsupported as fault:
                faults.append(str(fault))
        if faults:
            more = f"\nand {len(faults) - 20} more" if len(faults) > 20 else ""
            raise Unsupported(f"{self.out.kernel.name}: " + "\n".join(faults[:20]) + more)
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
            self.out.operands += place
        values = (*values, *(0,) * (8 - len(values)))
        self.out.origin.append(self.position)
        self.out.code += [operation.index, guard, at, s.negated, target, first, results, len(places) - results, *values]

    # ---- operands ----

    def register(self, s: Statement, name: str) -> Register | None:
        return next((scope[name] for scope in s.scopes if name in scope), None)

    def place_of_register(self, register: Register) -> tuple[int, int]:
        return self._place(("register", register.name), register.size)

    def place(self, s: Statement, text: str, size: int) -> tuple[int, int]:
        """A register of this size, or a constant or special register where there is none."""
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
                out.specials += [special, *place]
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


_FAMILIES: list[tuple[re.Pattern, Callable[[_Encoder, Statement, re.Match], None]]] = []


@functools.cache
def _family_of(opcode: str) -> tuple[Callable | None, Any]:
    return next(((function, m) for pattern, function in _FAMILIES if (m := pattern.fullmatch(opcode))), (None, None))


def family(pattern: str):
    """Declares how instructions whose opcode fits the pattern are encoded."""

    def register(function):
        _FAMILIES.append((re.compile(pattern), function))
        return function

    return register


# ---- control ----


@family(r"bra(\.uni)?")
def _branch(e: _Encoder, s: Statement, found: re.Match) -> None:
    e.emit(s, "bra", [], 0, target=e.out.kernel.target(s))


@family(
    r"ret|exit|trap|membar\.sys|fence\.proxy\.async\.shared::cta|cp\.async\.commit_group"
    r"|wgmma\.(fence|commit_group)\.sync\.aligned|tcgen05\.(relinquish_alloc_permit\.cta_group::1|wait::(ld|st))\.sync\.aligned|tcgen05\.fence::(before|after)_thread_sync"
)
def _without_operands(e: _Encoder, s: Statement, found: re.Match) -> None:
    if s.operands:
        raise s.unsupported("operands")
    e.emit(s, "ret" if s.opcode == "exit" else s.opcode, [], 0)


@family(r"bar(rier)?(\.cta)?\.sync(\.aligned)?|bar\.warp\.sync")
def _barrier(e: _Encoder, s: Statement, found: re.Match) -> None:
    of_warp = s.opcode == "bar.warp.sync"
    if s.operands not in ([("-1",), ("0xffffffff",)] if of_warp else [("0",)]):
        raise s.unsupported("operands")
    alone = e.out.kernel.threads == 32  # then the barrier of the warp is the program's
    e.emit(s, "bar.warp.sync" if of_warp and not alone else "bar.sync", [], 0)


@family(r"(cp\.async|wgmma)\.wait_group(\.sync\.aligned)?|cp\.async\.wait_all")
def _wait_group(e: _Encoder, s: Statement, found: re.Match) -> None:
    if s.opcode == "cp.async.wait_all":  # those of the open group as well
        return e.emit(s, "cp.async.wait_group", [], 0, (-1,))
    e.emit(s, s.opcode, [], 0, (int(s.operands[0]),))


# ---- memory ----

_CACHE = {"L1::evict_last", "L1::evict_first", "L1::no_allocate", "ca", "cg", "cs", "nc"}
_ORDER = {"weak", "relaxed", "acquire", "release", "acq_rel", "volatile"}
_SCOPE = {"cta", "gpu", "sys"}


def _modifiers(s: Statement, known: set[str]) -> tuple[set[str], str, bool, bool, bool]:
    """All, the type, and whether the access is strong, releases, acquires: between programs only at the scope of the GPU."""
    *rest, type_ = s.opcode.split(".")[1:]
    found = set(rest)
    if unknown := found - known - _ORDER - _SCOPE - {"global"}:
        raise s.unsupported(f"modifier {', '.join(sorted(unknown))}")
    if type_ not in SIZES or len(found & _ORDER) > 1 or len(found & _SCOPE) > 1:
        raise s.unsupported("modifiers")
    if found & {"acquire", "release", "acq_rel", "relaxed"} and not found & _SCOPE and s.opcode[:2] in ("ld", "st"):
        raise s.unsupported("a memory order without a scope")
    wide = not found & {"cta"}
    strong = bool(found & _ORDER - {"weak"}) and wide
    return (
        found,
        type_,
        strong,
        wide and bool(found & {"release", "acq_rel"}),
        wide and bool(found & {"acquire", "acq_rel"}),
    )


@family(r"ld\.param\.(\w+)")
def _load_parameter(e: _Encoder, s: Statement, found: re.Match) -> None:
    register = e.register(s, s.operands[0])
    base, offset, bytes_ = e.address(s, s.operands[1])
    if register is None or SIZES[found[1]] > register.size:
        raise s.unsupported("operands")
    values = (offset, SIZES[found[1]], int(found[1][0] == "s"), 0, 0, 0, 0, (bytes_ == 4) << 1 | register.size << 16)
    e.emit(s, "ld.param", [e.place_of_register(register), base], 1, values)


@family(r"(ld|st)\..*")
def _load_or_store(e: _Encoder, s: Statement, found: re.Match) -> None:
    loads = found[1] == "ld"
    modifiers, type_, strong, releases, acquires = _modifiers(s, _CACHE | {"shared", "shared::cta", "v2", "v4"})
    if len(s.operands) != 2 or (loads and releases) or (not loads and acquires):
        raise s.unsupported("operands or memory order")
    registers, memory = s.operands if loads else s.operands[::-1]
    names = e.vector(s, registers)
    count = next((int(m[1]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
    known = [r for name in names if (r := e.register(s, name))]
    size = known[0].size if known else max(SIZES[type_], 2)
    if len(names) != count or size < SIZES[type_]:
        raise s.unsupported("registers")
    space = 1 if modifiers & {"shared", "shared::cta"} else 0 if "global" in modifiers else 2
    if space == 2 and "volatile" not in modifiers:
        raise s.unsupported("no state space")
    base, offset, bytes_ = e.address(s, memory, (4, 8) if space == 1 else (8,))
    places = e.places_of(s, registers, size)
    position = count if loads else 0
    values = (
        offset,
        space,
        SIZES[type_],
        count,
        int(type_[0] == "s"),
        int(strong),
        int(releases or acquires),
        (bytes_ == 4) << position | size << 16,
    )
    e.emit(s, s.opcode[:2], [*places, base] if loads else [base, *places], count if loads else 0, values)


@family(r"(atom|red)\..*")
def _atomic(e: _Encoder, s: Statement, found: re.Match) -> None:
    modifiers, type_, _, releases, acquires = _modifiers(s, {"add"})
    if not {"global", "add"} <= modifiers or type_ not in ("u32", "s32", "u64", "f32"):
        raise s.unsupported("atomic operation")
    returns = found[1] == "atom"
    base, offset, _ = e.address(s, s.operands[returns], (8,))
    places = [
        *([e.place(s, s.operands[0], SIZES[type_])] if returns else []),
        base,
        e.place(s, s.operands[1 + returns], SIZES[type_]),
    ]
    e.emit(
        s,
        "atom.add",
        places,
        int(returns),
        (offset, 0, SIZES[type_], int(returns), int(type_ == "f32"), int(releases), int(acquires)),
    )


@family(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global")
def _copy(e: _Encoder, s: Statement, found: re.Match) -> None:
    to, to_offset, bytes_ = e.address(s, s.operands[0])
    source, source_offset, _ = e.address(s, s.operands[1], (8,))
    size = int(s.operands[2], 0)
    if size not in (4, 8, 16) or len(s.operands) > 4:
        raise s.unsupported("operands")
    sizes = [e.place(s, o, 4) for o in s.operands[3:]]
    e.emit(s, "cp.async", [to, source, *sizes], 0, (to_offset, source_offset, size, 0, 0, 0, 0, int(bytes_ == 4)))


@family(r"mov\.b(32|64)")
def _pack(e: _Encoder, s: Statement, found: re.Match) -> None:
    size, parts = int(found[1]) // 8, max(s.operands, key=len)
    part = size // len(e.vector(s, parts))
    if not parts.startswith("{") or part < 2:
        raise s.unsupported("operands")
    packs = s.operands[1] == parts
    many, one = e.places_of(s, parts, part), e.place(s, s.operands[not packs], size)
    e.emit(
        s,
        "mov.pack" if packs else "mov.unpack",
        [one, *many] if packs else [*many, one],
        1 if packs else len(many),
        (part, size),
    )
