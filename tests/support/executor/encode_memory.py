"""The families of one thread: branches, barriers and waits; loads, stores, atomics and copies of memory."""

from __future__ import annotations

import re

from .encode import Encoder, family
from .ptx import SIZES, Statement

# ---- control ----


@family(r"bra(\.uni)?")
def _branch(e: Encoder, s: Statement, found: re.Match) -> None:
    e.emit(s, "bra", [], 0, target=e.kernel.target(s))


@family(
    r"ret|exit|trap|membar\.sys|fence\.proxy\.async\.shared::cta|cp\.async\.commit_group"
    r"|wgmma\.(fence|commit_group)\.sync\.aligned|tcgen05\.(relinquish_alloc_permit\.cta_group::1|wait::(ld|st))\.sync\.aligned|tcgen05\.fence::(before|after)_thread_sync"
)
def _without_operands(e: Encoder, s: Statement, found: re.Match) -> None:
    if s.operands:
        raise s.unsupported("operands")
    e.emit(s, "ret" if s.opcode == "exit" else s.opcode, [], 0)


@family(r"bar(rier)?(\.cta)?\.sync(\.aligned)?|bar\.warp\.sync")
def _barrier(e: Encoder, s: Statement, found: re.Match) -> None:
    of_warp = s.opcode == "bar.warp.sync"
    if s.operands not in ([("-1",), ("0xffffffff",)] if of_warp else [("0",)]):
        raise s.unsupported("operands")
    alone = e.kernel.threads == 32  # then the barrier of the warp is the program's
    e.emit(s, "bar.warp.sync" if of_warp and not alone else "bar.sync", [], 0)


@family(r"(cp\.async|wgmma)\.wait_group(\.sync\.aligned)?|cp\.async\.wait_all")
def _wait_group(e: Encoder, s: Statement, found: re.Match) -> None:
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
def _load_parameter(e: Encoder, s: Statement, found: re.Match) -> None:
    register = e.register(s, s.operands[0])
    base, offset, bytes_ = e.address(s, s.operands[1])
    if register is None or SIZES[found[1]] > register.size:
        raise s.unsupported("operands")
    values = (offset, SIZES[found[1]], int(found[1][0] == "s"), 0, 0, 0, 0, (bytes_ == 4) << 1 | register.size << 16)
    e.emit(s, "ld.param", [e.place_of_register(register), base], 1, values)


@family(r"(ld|st)\..*")
def _load_or_store(e: Encoder, s: Statement, found: re.Match) -> None:
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
        SIZES[type_] if strong else 0,
        int(releases or acquires),
        (bytes_ == 4) << position | size << 16,
    )
    e.emit(s, s.opcode[:2], [*places, base] if loads else [base, *places], count if loads else 0, values)


@family(r"(atom|red)\..*")
def _atomic(e: Encoder, s: Statement, found: re.Match) -> None:
    modifiers, type_, _, releases, acquires = _modifiers(s, {"add", "inc"})
    operations = {"u32": 0, "s32": 0, "u64": 0, "f32": 1} if "add" in modifiers else {"u32": 2}
    if "global" not in modifiers or len(modifiers & {"add", "inc"}) != 1 or type_ not in operations:
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
        (offset, 0, SIZES[type_], int(returns), operations[type_], int(releases), int(acquires)),
    )


@family(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global")
def _copy(e: Encoder, s: Statement, found: re.Match) -> None:
    to, to_offset, bytes_ = e.address(s, s.operands[0])
    source, source_offset, _ = e.address(s, s.operands[1], (8,))
    size = int(s.operands[2], 0)
    if size not in (4, 8, 16) or len(s.operands) > 4:
        raise s.unsupported("operands")
    sizes = [e.place(s, o, 4) for o in s.operands[3:]]
    e.emit(s, "cp.async", [to, source, *sizes], 0, (to_offset, source_offset, size, 0, 0, 0, 0, int(bytes_ == 4)))


@family(r"mov\.b(32|64)")
def _pack(e: Encoder, s: Statement, found: re.Match) -> None:
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
