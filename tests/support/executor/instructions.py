"""What the machine executes: opcodes, and the forms of operands that each may have.

Arithmetic stands in arithmetic.h, under full opcodes. Everything else in C is INSTRUCTION("opcode form or form; ...", kind): an
opcode is a regular expression, but for its dots, and a form says of the operands, results in front of "=":

    4          a register of so many bytes (1: a predicate), or a constant
    2+         a register of at least so many bytes
    4x8, 4x{0} so many of them, in braces; {0} is the first group of the opcode
    [4], [48]  an address in a register of so many bytes, or of either
    !-1        this number
    #, #4|8    a number, or one of these
    label      where a branch goes
    4?, #?     the same, or nothing

What is captured from an opcode, and behind that the numbers that # stands for, are the instruction's values.
"""

from __future__ import annotations

import re

from .ptx import SIZES

# What C calls the values of groups; another group is 1 where it is there, and 0 where it is not.
_ENUMERATIONS = "bf16 f16 tf32 f64, up down bfly idx, any all ballot, add min max, s32 u32 f32, 32x32b 16x32bx2"
_VALUES = {name: value for names in _ENUMERATIONS.split(", ") for value, name in enumerate(names.split())}

Form = tuple[int, list[str], list[int]]  # the number of an operation, the operands, the values


class Instructions:
    def __init__(self) -> None:
        self._full: dict[str, list[tuple[int, str]]] = {}
        self._patterns: list[tuple[re.Pattern, int, str]] = []
        self._found: dict[str, list[Form]] = {}

    def add(self, operation: int, opcode: str, form: str) -> None:
        self._full.setdefault(opcode, []).append((operation, form))

    def add_patterns(self, operation: int, listed: str) -> None:
        for instruction in listed.split("; "):
            opcode, _, forms = instruction.partition(" ")
            pattern = re.compile(opcode.replace(".", r"\."))
            self._patterns += [(pattern, operation, form) for form in forms.split(" or ")]

    def forms(self, opcode: str) -> list[Form]:
        """All forms that an opcode may have. Raises LookupError for modifiers that are not known."""
        if opcode not in self._found:
            self._found[opcode] = self._find(opcode)
        return self._found[opcode]

    def _find(self, opcode: str) -> list[Form]:
        if opcode.partition(".")[0] in ("ld", "st", "atom", "red"):
            kind, form, values = _access(opcode)
            return [(operation, form.split(), values) for operation, _ in self._full[kind]]
        found: list[Form] = [(operation, form.split(), []) for operation, form in self._full.get(opcode, ())]
        for pattern, operation, form in self._patterns:
            if match := pattern.fullmatch(opcode):
                values = [int(g) if g and g.isdigit() else _VALUES.get(g, int(bool(g))) for g in match.groups()]
                found.append((operation, form.format(*match.groups()).split(), values))
        return found


_SPACES = {"global": 0, "shared": 1, "shared::cta": 1, "param": 3}  # 2: generic
_ORDERS = {"weak", "relaxed", "acquire", "release", "acq_rel", "volatile"}
_SCOPES = {"cta", "gpu", "sys"}
_IGNORED = {"L1::evict_last", "L1::evict_first", "L1::no_allocate", "ca", "cg", "cs", "nc"}
_ATOMIC = {("add", "u32"): 0, ("add", "s32"): 0, ("add", "u64"): 0, ("add", "f32"): 1, ("inc", "u32"): 2}


def _access(opcode: str) -> tuple[str, str, list[int]]:
    """Loads, stores and atomics, whose modifiers come in any order. They order programs only at the scope of the GPU."""
    kind, *modifiers, type_ = opcode.split(".")
    found, is_atomic = set(modifiers), kind in ("atom", "red")
    known = {"add", "inc"} if is_atomic else _IGNORED | {"v2", "v4"}
    if unknown := found - known - _ORDERS - _SCOPES - set(_SPACES):
        raise LookupError(f"modifier {', '.join(sorted(unknown))}")
    order, scope, space = (next(iter(found & some), None) for some in (_ORDERS, _SCOPES, set(_SPACES)))
    if type_ not in SIZES or any(
        len(found & some) > 1 for some in (_ORDERS, _SCOPES, set(_SPACES), {"v2", "v4"}, {"add", "inc"})
    ):
        raise LookupError("modifiers")
    if order in ("relaxed", "acquire", "release", "acq_rel") and not scope and not is_atomic:
        raise LookupError("a memory order without a scope")
    if order in {"ld": ("release", "acq_rel"), "st": ("acquire", "acq_rel")}.get(kind, ()):
        raise LookupError("memory order")
    if (space is None and order != "volatile") or (space == "param" and kind != "ld"):
        raise LookupError("state space")
    size, wide = SIZES[type_], scope != "cta"
    releases, acquires = (wide and order in (one, "acq_rel") for one in ("release", "acquire"))
    values = [_SPACES.get(space, 2), size, type_[0] == "s", wide and order not in (None, "weak")]
    if is_atomic:
        operation = next((o for (name, of), o in _ATOMIC.items() if name in found and of == type_), None)
        if space != "global" or operation is None:
            raise LookupError("atomic operation")
        form = f"{size} = [8] {size}" if kind == "atom" else f"= [8] {size}"
        return "atom", form, [*values, releases, acquires, operation]
    many = "x4" if "v4" in found else "x2" if "v2" in found else ""
    registers, address = f"{max(size, 2)}+{many}", "[8]" if space in ("global", None) else "[48]"
    form = f"{registers} = {address}" if kind == "ld" else f"= {address} {registers}"
    return kind, form, [*values, releases or acquires]
