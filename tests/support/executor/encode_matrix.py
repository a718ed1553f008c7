"""The families of a warp or more: shuffles, matrix products, tensor memory."""

from __future__ import annotations

import re

from .encode import Encoder, family
from .ptx import Statement

_TYPES = {"bf16": 0, "f16": 1, "tf32": 2, "f64": 3}


@family(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _shuffle(e: Encoder, s: Statement, found: re.Match) -> None:
    result, *inputs, members = s.operands
    if members not in ("-1", "0xffffffff") or len(inputs) != 3:
        raise s.unsupported("operands")
    value, predicate = (*result.split("|"), None)[:2]
    places = [e.place(s, value, 4), *([e.place(s, predicate, 1)] if predicate else [])]
    mode = ("up", "down", "bfly", "idx").index(found[1])
    e.emit(s, "shfl.sync", [*places, *(e.place(s, o, 4) for o in inputs)], len(places), (mode,))


@family(r"elect\.sync")
def _elect(e: Encoder, s: Statement, found: re.Match) -> None:
    lane, _, predicate = s.operands[0].partition("|")
    if s.operands[1] != "-1":
        raise s.unsupported("operands")
    e.emit(s, "elect.sync", [e.place(s, lane, 4), e.place(s, predicate, 1)], 2)


@family(r"vote\.sync\.(any|all|ballot)\.(pred|b32)")
def _vote(e: Encoder, s: Statement, found: re.Match) -> None:
    if s.operands[2] != "-1" or (found[1] == "ballot") != (found[2] == "b32"):
        raise s.unsupported("operands")
    size = 4 if found[2] == "b32" else 1
    places = [e.place(s, s.operands[0], size), e.place(s, s.operands[1], 1)]
    e.emit(s, "vote.sync", places, 1, (("any", "all", "ballot").index(found[1]),))


@family(r"redux\.sync\.(add|min|max)(\.NaN)?\.(s32|u32|f32)")
def _reduce(e: Encoder, s: Statement, found: re.Match) -> None:
    if (found[3] == "f32" and found[1] == "add") or (found[2] and found[3] != "f32"):
        raise s.unsupported("modifiers")
    kind = ("s32", "u32", "f32").index(found[3]) + bool(found[2])
    places = [e.place(s, o, 4) for o in s.operands]
    e.emit(s, "redux.sync", places, 1, (kind, ("add", "min", "max").index(found[1])))


@family(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16")
def _matrix(e: Encoder, s: Statement, found: re.Match) -> None:
    loads = found[1] == "ld"
    registers, memory = s.operands if loads else s.operands[::-1]
    base, offset, _ = e.address(s, memory, (4,))
    places = e.places_of(s, registers, 4)
    if len(places) != int(found[2]):
        raise s.unsupported("registers")
    order = [*places, base] if loads else [base, *places]
    e.emit(s, f"{found[1]}matrix", order, len(places) if loads else 0, (offset, len(places), int(bool(found[3]))))


@family(r"mma\.sync\.aligned\.m(8|16)n8k(\d+)\.row\.col\.f(32|64)\.(bf16|f16|tf32|f64)\.\4\.f\3")
def _product(e: Encoder, s: Statement, found: re.Match) -> None:
    rows, k, size, type_ = int(found[1]), int(found[2]), int(found[3]) // 8, found[4]
    words = k // (1 if type_ in ("tf32", "f64") else 2) // 4
    parts, expected = [e.places_of(s, o, size) for o in s.operands], [rows // 4, words * rows // 8, words, rows // 4]
    known = words in (1, 2, 4) if type_ == "f64" else words in (1, 2) and rows == 16
    if not known or (size == 8) != (type_ == "f64") or [len(p) for p in parts] != expected:
        raise s.unsupported("operands")
    e.emit(s, "mma.sync", sum(parts, []), rows // 4, (_TYPES[type_], k, rows))


@family(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(bf16|f16|tf32)\.\3")
def _wgmma(e: Encoder, s: Statement, found: re.Match) -> None:
    columns = int(found[1])
    sums, a, b, add, negate_a, negate_b, *transposed = s.operands
    in_registers = a.startswith("{")
    expected = 0 if found[3] == "tf32" else 1 if in_registers else 2
    if (negate_a, negate_b) != ("1", "1") or len(transposed) != expected or (found[2] == "8") != (found[3] == "tf32"):
        raise s.unsupported("operands")
    result, left = e.places_of(s, sums, 4), e.places_of(s, a, 4 if in_registers else 8)
    if len(result) != columns // 2 or len(left) != (4 if in_registers else 1):
        raise s.unsupported("registers")
    places = [*result, *left, e.place(s, b, 8), e.place(s, add, 1)]
    a_transposed, b_transposed = ([0, 0] + [int(t) for t in transposed])[-2:]
    values = (_TYPES[found[3]], columns, int(in_registers), 0 if in_registers else a_transposed, b_transposed)
    e.emit(s, "wgmma.mma_async", places, len(result), values)


# ---- tensor memory ----


@family(r"tcgen05\.(alloc\.cta_group::1\.sync\.aligned\.shared::cta|dealloc\.cta_group::1\.sync\.aligned)\.b32")
def _allocate(e: Encoder, s: Statement, found: re.Match) -> None:
    where, count = s.operands
    place, offset = e.address(s, where, (4,))[:2] if where.startswith("[") else (e.place(s, where, 4), 0)
    e.emit(s, s.opcode, [place, e.place(s, count, 4)], 0, (offset,))


@family(r"tcgen05\.(ld|st)\.sync\.aligned\.(32x32b|16x32bx2)\.x(\d+)\.b32")
def _tensor_move(e: Encoder, s: Statement, found: re.Match) -> None:
    loads, split = found[1] == "ld", found[2] == "16x32bx2"
    operands = list(s.operands)
    registers = operands.pop(0 if loads else -1)
    base, offset, _ = e.address(s, operands[0], (4,))
    places = e.places_of(s, registers, 4)
    if len(operands) != 1 + split or len(places) != int(found[3]):
        raise s.unsupported("operands")
    apart = int(operands[1], 0) if split else -1
    order = [*places, base] if loads else [base, *places]
    e.emit(s, "tcgen05.ld/st", order, len(places) if loads else 0, (offset, len(places), apart, int(loads)))


@family(r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)")
def _tensor_product(e: Encoder, s: Statement, found: re.Match) -> None:
    destination, a, b, descriptor, add = s.operands
    base, offset, _ = e.address(s, destination, (4,))
    in_tensor = a.startswith("[")
    left, left_offset = e.address(s, a, (4,))[:2] if in_tensor else (e.place(s, a, 8), 0)
    places = [base, left, e.place(s, b, 8), e.place(s, descriptor, 4), e.place(s, add, 1)]
    e.emit(s, "tcgen05.mma", places, 0, (_TYPES[found[1]], offset, int(in_tensor), left_offset))


@family(
    r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(\.shared::cluster)?\.b64"
    r"|mbarrier\.(init|inval)\.shared::cta\.b64|mbarrier\.try_wait\.parity\.shared(::cta)?\.b64"
)
def _mbarrier(e: Encoder, s: Statement, found: re.Match) -> None:
    tests = s.opcode.startswith("mbarrier.try_wait")
    name = "tcgen05.commit" if "commit" in s.opcode else "mbarrier.try_wait.parity" if tests else s.opcode
    base, offset, bytes_ = e.address(s, s.operands[tests])
    result = [e.place(s, s.operands[0], 1)] if tests else []
    rest = [e.place(s, o, 4) for o in s.operands[1 + tests :]]
    if len(rest) != (1 if tests or "init" in s.opcode else 0):
        raise s.unsupported("operands")
    values = (offset, 0, 0, 0, 0, 0, 0, (bytes_ == 4) << tests)
    e.emit(s, name, [*result, base, *rest], int(tests), values)
