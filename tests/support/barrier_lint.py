"""What the compiled code of a barrier between programs must look like: a lint of PTX and TTGIR."""

from __future__ import annotations

import re

from .aot import Report

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
