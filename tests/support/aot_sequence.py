"""The kernels that the search chooses for a problem on a device, compiled without a GPU, and what may be wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from lstm_triton.kernels import search
from lstm_triton.kernels.figures import figures
from lstm_triton.kernels.fragments import adjacent_words
from lstm_triton.kernels.sequence_config import Problem, SequenceConfig
from lstm_triton.kernels.specialization import POINTERS, TRAINING

from .aot import SHARED_MEMORY_PER_BLOCK, Report
from .fake_driver import fake_driver

# A GPU of each compute capability: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
_SMS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
DEVICES = {arch: figures(n, SHARED_MEMORY_PER_BLOCK[arch], divmod(arch, 10)) for arch, n in _SMS.items()}

SEGMENTS = ("resets", "lengths", "cells", "reset_gradients")


class Case(NamedTuple):
    """One launch. features: those of `specialization.POINTERS`, and "training" for those of `specialization.TRAINING`."""

    way: str  # "forward" or "backward"
    H: int
    B: int
    D: int
    dtype: torch.dtype
    precision: str
    features: tuple[str, ...] = ("training",)
    recompute: bool = False
    cell: str = "lstm"

    @property
    def problem(self) -> Problem:
        always = TRAINING[self.way] if "training" in self.features else set()
        features = always | set(POINTERS[self.way]).intersection(self.features)
        problem = Problem(self.way, self.B, self.H, self.D, self.dtype, self.precision, features=frozenset(features))
        return problem._replace(recompute=self.recompute, cell=self.cell)


class Choice(NamedTuple):
    """What the search chose, the kernel, and how many it compiled for that."""

    config: SequenceConfig
    report: Report
    compilations: int


def choose(case: Case, arch: int) -> Choice:
    """What would run on a GPU of this compute capability, that of `DEVICES`."""
    asking = mock.patch.object(search, "compile_for", wraps=search.compile_for)
    with fake_driver(arch, DEVICES[arch].sms), asking as compile_for:
        config = search.search(case.problem, DEVICES[arch])
        compilations = compile_for.call_count
        return Choice(config, Report(compile_for(case.problem, config), arch), compilations)


def faults(case: Case, config: SequenceConfig, report: Report, most_words: int = 8) -> Iterator[str]:
    """What is wrong with a kernel compiled for this case. most_words: of local memory that a thread may have."""
    yield from report.faults(case.problem.on_tensor_cores or None, most_words)
    if case.problem.on_tensor_cores:
        wide = case.way == "forward" and config.split_k == 1 and 4 * config.block_h >= 64
        if report.arch == 90 and wide and not report.counts["HGMMA"]:
            yield "no wgmma"
    # The compiler lays operands out for the narrowest type loaded on the way to them: anything else costs a move per element.
    width = max(4 // case.dtype.itemsize, 1) * (adjacent_words() if config.in_band else 1)
    if other := set(re.findall(r"kWidth = (\d+)", report.ttgir)) - {str(width)}:
        yield f"operands laid out for elements of another width: kWidth {other}"
    if not config.persistent:
        return
    # One exponential an activation.
    activations = 1 if case.way == "backward" and not case.recompute else 5
    expected = activations * max(config.block_b * config.block_h // (32 * config.num_warps), 1)
    computed = sum("MUFU.EX2" in instruction.text for instruction in report.in_loops)
    if case.dtype != torch.float64 and computed > expected:
        yield f"{computed} exponentials, not {expected}: is a unit computed by several threads?"
    if config.waits and report.tensor_memory * report.blocks_per_sm() > 512:
        yield f"{report.tensor_memory} columns of tensor memory, of which {report.blocks_per_sm()} blocks may share an SM's 512"
    exchanged, own = loads_of_a_step(case, config)
    exact = case.features == ("training",) and case.H % 16 == 0
    loads = [i.text for i in report.in_loops if i.opcode in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")]
    if config.in_band:
        # What is exchanged is loaded by strong loads, once; where there are features, resets and lengths are loaded as well.
        strong = [text for text in loads if ".128.STRONG.GPU" in text]
        if not exchanged[0] <= len(strong) <= exchanged[-1]:
            yield f"{len(strong)} loads of the exchanged state, not {' to '.join(map(str, exchanged))}"
        if any("RED" in i.opcode or "ATOM" in i.opcode for i in report.in_loops):
            yield "a barrier between programs beside an exchange that needs none"
        if exact and len(loads) - len(strong) != own:
            yield f"{len(loads) - len(strong)} loads in the time loop, not {own}: is W_hh among them?"
        return
    if config.waits:
        # Features and odd rows make more loads of it, never fewer.
        loaded = loads_behind_barrier(report.ptx)
        if sum(loaded) < exchanged[0] or (exact and sum(loaded) > exchanged[-1]):
            yield f"{sum(loaded)} loads between wait and arrive, not {' to '.join(map(str, exchanged))}"
        # Of a later round some loads precede the barrier before its place in shared memory is free, and the others follow it.
        rounds = config.rounds(case.problem.inner)
        if case.features == ("training",) and (len(loaded) > 2 * rounds - 1 or loaded[0] < exchanged[0] // rounds):
            yield f"{loaded} loads at once, in more than {rounds} rounds"
    data = [text for text in loads if ".STRONG.GPU" not in text]
    polls = len(loads) - len(data)
    if polls > (2 if config.waits else 0):
        yield f"{polls} polls"
    if exact and not exchanged[0] <= len(data) - own <= exchanged[-1]:
        yield f"{len(data)} loads in the time loop, not {own} + {' to '.join(map(str, exchanged))}: is W_hh among them?"


def loads_of_a_step(case: Case, config: SequenceConfig) -> tuple[list[int], int]:
    """Of the exchanged state of all units, fewest and most; and of what belongs to the program's own units and rows."""

    def loads(elements, most_bytes=16):
        """By each thread."""
        return max(elements * case.dtype.itemsize // (most_bytes * 32 * config.num_warps), 1)

    own = config.block_b * config.block_h
    depth = config.split_k * config.block_k
    chunks, rest = divmod(case.problem.inner, depth)
    exchanged = chunks * loads(config.block_b * depth)
    # Of the last chunk what is past the end may be left out.
    exchanged = [exchanged + loads(config.block_b * n) for n in (rest, depth)] if rest else [exchanged]
    if case.way == "forward":
        return exchanged, loads(4 * own)  # the pre-activations
    # The gates, dh_n and the c before the step; and dy, of whose alignment nothing is known.
    return exchanged, loads(4 * own) + 2 * loads(own) + loads(own, case.dtype.itemsize)


_CTA_BARRIER = re.compile(r"(bar|barrier|barrier\.cta)\.sync\b")
_RELEASE = re.compile(r"(atom|red|st)\S*\.(release|acq_rel)\b")
_ACQUIRE = re.compile(r"(atom|ld)\S*\.(acquire|acq_rel)\b")
_LOAD = re.compile(r"ld\S*\.global\b|cp\.async\S*\.shared\S*\.global\b")


def loads_behind_barrier(ptx: str) -> list[int]:
    """Global loads on the paths from an acquire to the next release: how many with no bar.sync between them.

    What the programs exchange is loaded there and nowhere else: fewer loads than that takes have moved above the wait, where
    they read what need not be written yet. The assembler moves no load across an acquire or up across a bar.sync.
    """
    code, labels = _parsed(ptx)
    to_visit = [position for position, (_, instruction) in enumerate(code) if _ACQUIRE.match(instruction)]
    seen: set[int] = set()
    while to_visit:
        position = to_visit.pop()
        if position in seen or position >= len(code) or _RELEASE.match(code[position][1]):
            continue
        seen.add(position)
        guarded, instruction = code[position]
        jump = re.match(r"bra\S*\s+(\S+)", instruction)
        to_visit += [labels[jump[1]]] if jump else []
        if guarded or not (jump or re.match(r"(ret|exit|trap)\b", instruction)):
            to_visit.append(position + 1)
    rounds = [0]
    for position in sorted(seen):
        instruction = code[position][1]
        if _CTA_BARRIER.match(instruction):
            rounds.append(0)
        elif _LOAD.match(instruction) and not _ACQUIRE.match(instruction):
            rounds[-1] += 1
    return [number for number in rounds if number]


def _parsed(ptx: str) -> tuple[list[tuple[bool, str]], dict[str, int]]:
    """(whether it is predicated, the instruction without its predicate) in order, and the position of every label."""
    code, labels = [], {}
    for statement in re.split(r"[;\n{}]|(?<=:)\s", re.sub(r"//.*", "", ptx)):
        predicate, instruction = re.match(r"\s*(@!?\S+)?\s*(.*?)\s*$", statement, re.DOTALL).groups()
        if instruction.endswith(":"):
            labels[instruction[:-1]] = len(code)
        elif instruction and not instruction.startswith("."):
            code.append((predicate is not None, instruction))
    return code, labels
