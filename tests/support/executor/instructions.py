"""The instructions beside arithmetic: their opcodes, the machine's operation that executes each, and its operands.

Arithmetic stands in arithmetic.h, with the opcode as a whole. Here each line is an operation, the opcodes that it executes, and
a form of their operands, results in front of "=":

    4          a register of so many bytes (1: a predicate), or a constant
    2+         a register of at least so many bytes
    4x8, 4x{0} so many of them, in braces; {0} is the first group of the opcode
    [4], [48]  an address in a register of so many bytes, or of either
    !-1        this number
    #, #4|8    a number, or one of these
    label      where a branch goes

What is captured from an opcode, and behind that the numbers that # stands for, are the operation's values.
"""

from __future__ import annotations

import functools
import re

from .ptx import SIZES

_WITHOUT_OPERANDS = (
    r"trap|membar\.sys|fence\.proxy\.async\.shared::cta|cp\.async\.commit_group|wgmma\.(?:fence|commit_group)\.sync\.aligned"
    r"|tcgen05\.(?:relinquish_alloc_permit\.cta_group::1|wait::(?:ld|st))\.sync\.aligned"
    r"|tcgen05\.fence::(?:before|after)_thread_sync"
)
_MATRICES = r"matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16"
_COLUMNS = r"\.sync\.aligned\.(32x32b|16x32bx2)\.x(\d+)\.b32"
_WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)"
_TENSOR = r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)"
_COPY = r"cp\.async\.c[ag]\.shared(?:::cta)?\.global"
# An opcode of several lines has the form of one of them. Without an operation in front, it is the opcode's.
_INSTRUCTIONS = [
    ("", _WITHOUT_OPERANDS, "="),
    ("ret", r"ret|exit", "="),
    ("bra", r"bra(?:\.uni)?", "= label"),
    ("bar.sync", r"bar(?:rier)?(?:\.cta)?\.sync(?:\.aligned)?", "= !0"),
    ("bar.warp.sync", r"bar\.warp\.sync", "= !-1"),
    ("", r"prmt\.b32", "4 = 4 4 4"),
    *(
        ("mov.pack", rf"mov\.b{8 * whole}", f"{whole} = {part}x{whole // part}")
        for whole, part in ((4, 2), (8, 4), (8, 2))
    ),
    *(
        ("mov.unpack", rf"mov\.b{8 * whole}", f"{part}x{whole // part} = {whole}")
        for whole, part in ((4, 2), (8, 4), (8, 2))
    ),
    ("cp.async", _COPY, "= [48] [8] #4|8|16"),
    ("cp.async", _COPY, "= [48] [8] #4|8|16 4"),
    ("", r"(?:cp\.async|wgmma)\.wait_group(?:\.sync\.aligned)?", "= #"),
    ("shfl.sync", r"shfl\.sync\.(up|down|bfly|idx)\.b32", "4 = 4 4 4 !-1"),
    ("elect.sync", r"elect\.sync", "4 1 = !-1"),
    ("vote.sync", r"vote\.sync\.(any|all)\.pred", "1 = 1 !-1"),
    ("vote.sync", r"vote\.sync\.(ballot)\.b32", "4 = 1 !-1"),
    ("redux.sync", r"redux\.sync\.(add|min|max)()\.(s32|u32)", "4 = 4 4"),
    ("redux.sync", r"redux\.sync\.(min|max)(\.NaN)?\.(f32)", "4 = 4 4"),
    ("ldmatrix", "ld" + _MATRICES, "4x{0} = [4]"),
    ("stmatrix", "st" + _MATRICES, "= [4] 4x{0}"),
    ("mma.sync", r"mma\.sync\.aligned\.m(16)n8k(16)\.row\.col\.f32\.(bf16|f16)\.\3\.f32", "4x4 = 4x4 4x2 4x4"),
    ("mma.sync", r"mma\.sync\.aligned\.m(16)n8k(8)\.row\.col\.f32\.(tf32)\.tf32\.f32", "4x4 = 4x4 4x2 4x4"),
    ("mma.sync", r"mma\.sync\.aligned\.m(16)n8k(16)\.row\.col\.f64\.(f64)\.f64\.f64", "8x4 = 8x8 8x4 8x4"),
    ("mma.sync", r"mma\.sync\.aligned\.m(8)n8k(4)\.row\.col\.f64\.(f64)\.f64\.f64", "8x2 = 8x1 8x1 8x2"),
    ("wgmma.mma_async", _WGMMA + r"k16\.f32\.(bf16|f16)\.\2", "4x{0}/2 = 8 8 1 !1 !1 #0|1 #0|1"),
    ("wgmma.mma_async", _WGMMA + r"k16\.f32\.(bf16|f16)\.\2", "4x{0}/2 = 4x4 8 1 !1 !1 #0|1"),
    ("wgmma.mma_async", _WGMMA + r"k8\.f32\.(tf32)\.tf32", "4x{0}/2 = 8 8 1 !1 !1"),
    ("wgmma.mma_async", _WGMMA + r"k8\.f32\.(tf32)\.tf32", "4x{0}/2 = 4x4 8 1 !1 !1"),
    ("tcgen05.alloc", r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32", "= [4] 4"),
    ("tcgen05.dealloc", r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32", "= 4 4"),
    ("tcgen05.ld", r"tcgen05\.ld" + _COLUMNS, "4x{1} = [4]"),
    ("tcgen05.ld", r"tcgen05\.ld" + _COLUMNS, "4x{1} = [4] #"),
    ("tcgen05.st", r"tcgen05\.st" + _COLUMNS, "= [4] 4x{1}"),
    ("tcgen05.st", r"tcgen05\.st" + _COLUMNS, "= [4] # 4x{1}"),
    ("tcgen05.mma", _TENSOR, "= [4] 8 8 4 1"),
    ("tcgen05.mma", _TENSOR, "= [4] [4] 8 4 1"),
    ("tcgen05.commit", r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?:\.shared::cluster)?\.b64", "= [48]"),
    ("mbarrier.init", r"mbarrier\.init\.shared::cta\.b64", "= [48] 4"),
    ("mbarrier.inval", r"mbarrier\.inval\.shared::cta\.b64", "= [48]"),
    ("mbarrier.try_wait.parity", r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64", "1 = [48] 4"),
]

# What C calls the values of groups; another group is 1 where it is there, and 0 where it is not.
_VALUES = {
    name: value
    for names in (
        "bf16 f16 tf32 f64",
        "up down bfly idx",
        "any all ballot",
        "add min max",
        "s32 u32 f32",
        "32x32b 16x32bx2",
    )
    for value, name in enumerate(names.split())
}


@functools.cache
def forms(opcode: str) -> list[tuple[str, str, list[int]]]:
    """The operation, the operands and the values of each form that an opcode may have.

    Raises LookupError for modifiers that are not known.
    """
    if opcode.partition(".")[0] in ("ld", "st", "atom", "red"):
        return [_access(opcode)]
    found = []
    for operation, pattern, form in _INSTRUCTIONS:
        if match := re.fullmatch(pattern, opcode):
            values = [int(g) if g and g.isdigit() else _VALUES.get(g, int(bool(g))) for g in match.groups()]
            found.append((operation or opcode, form.format(*match.groups()), values))
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
    if space is None and order != "volatile":
        raise LookupError("no state space")
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
