"""Compile the sequence kernels as `kernels.layer` and `kernels.layer_backward` would launch them, for any NVIDIA GPU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton.language as tl

from lstm_triton.kernels import sequence, sequence_backward
from lstm_triton.kernels.config import uses_tensor_cores
from lstm_triton.kernels.launch import accumulator
from lstm_triton.kernels.sequence_config import (
    DeviceLimits,
    SequenceConfig,
    exchanged_row,
    sequence_backward_config,
    sequence_forward_config,
)

from .aot import SHARED_MEMORY_PER_BLOCK, Report, compile_ahead
from .barrier_lint import lint_grid_barrier, loads_behind_grid_barrier

# A GPU of each compute capability: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
_MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
LIMITS = {arch: DeviceLimits(n, SHARED_MEMORY_PER_BLOCK[arch], arch // 10) for arch, n in _MULTIPROCESSORS.items()}

_POINTEES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
# What is None without a feature; "training" is there by default.
_NEEDED_BY = {
    "resets_ptr": "resets",
    "reset_h_ptr": "resets",
    "reset_c_ptr": "resets",
    "lengths_ptr": "lengths",
    "dc_states_ptr": "cells",
    "dreset_c_ptr": "learned reset state",
    "c_ptr": "training",
    "gates_ptr": "training",
    "seed_ptr": "dropout",
    "dropped_ptr": "dropout",
}
SEGMENTS = ("resets", "lengths", "cells", "learned reset state")
_KERNELS = {
    "forward": sequence._lstm_sequence_forward_kernel,
    "backward": sequence_backward._lstm_sequence_backward_kernel,
}
_CONFIGURE = {"forward": sequence_forward_config, "backward": sequence_backward_config}


class Case(NamedTuple):
    """One launch. features: which of SEGMENTS, "dropout", and "training", which backward means nothing."""

    way: str  # "forward" or "backward"
    H: int
    B: int
    D: int
    dtype: torch.dtype
    precision: str
    features: tuple[str, ...] = ("training",)
    recompute: bool = False
    single_step: bool = False  # nothing to wait for


def configuration(case: Case, limits: DeviceLimits) -> SequenceConfig:
    return _CONFIGURE[case.way](case.B, case.H, case.D, case.dtype, case.precision, limits)


def compile_cases(cases: Iterable[Case], archs: Sequence[int]) -> Iterator[tuple[Case, SequenceConfig, Report]]:
    """Each kernel of these cases for each architecture of one generation, compiled once where the code is the same."""
    compiled: dict[tuple, dict[int, Report]] = {}
    for case, arch in itertools.product(cases, archs):
        config = configuration(case, LIMITS[arch])
        reports = compiled.setdefault((case._replace(B=0), replace(config, groups=0)), {})
        if arch in reports:
            continue
        if reports and case.dtype != torch.float64:
            reports[arch] = replace(next(iter(reports.values())), arch=arch)
        else:
            reports[arch] = compile_case(case, arch, config)
        yield case, config, reports[arch]


def compile_case(case: Case, arch: int, config: SequenceConfig | None = None) -> Report:
    """What runs on a GPU of this compute capability; by default in the configuration for the one in LIMITS."""
    config = config or configuration(case, LIMITS[arch])
    kernel = _KERNELS[case.way]
    waits = config.persistent and config.programs > 1 and not case.single_step
    constexprs = {
        "H": case.H,
        "D": case.D,
        "ACC": accumulator(case.dtype),
        "PRECISION": case.precision,
        "INDEX": tl.int32,
        "RESIDENT": config.persistent,
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "BLOCK_K": config.block_k,
        "IN_FLIGHT": config.in_flight,
    }
    if case.way == "forward":
        row = exchanged_row(case.H, case.dtype) if config.persistent else case.H
        constexprs |= {"ROW": row}
    else:
        constexprs |= {"SPLIT_K": config.split_k, "ACTIVATED": not case.recompute}
    options = {"launch_cooperative_grid": True} if waits else {}
    signature = {p.name: _type(p, case, waits) for p in kernel.params if p.name not in constexprs}
    return compile_ahead(kernel, signature, constexprs, arch=arch, **config.options, **options)


def _needed_by(name: str, case: Case) -> str | None:
    return None if case.way == "backward" and name in ("c_ptr", "gates_ptr") else _NEEDED_BY.get(name)


def _type(parameter, case: Case, waits: bool) -> str | None:
    """The type and hint that the JIT would find for an argument of this name."""
    name = parameter.name
    aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    hint = ":16" if aligned else ""
    if (
        (name in ("counters_ptr", "stall_ptr") and not waits)
        or (name == "w_reverse_ptr" and case.D == 1)
        or (_needed_by(name, case) not in (None, *case.features))
    ):
        return None
    if name in ("counters_ptr", "stall_ptr"):
        return "*i32:16"
    if name in ("lengths_ptr", "seed_ptr"):
        return "*i64" + hint
    if name == "resets_ptr":
        return "*u8" + hint
    if name.endswith("_ptr"):
        return f"*{_POINTEES[case.dtype]}{hint}"
    return "i32:1" if name == "stride_dy_h" else "i32"  # no other integer is specialised


def faults(case: Case, config: SequenceConfig, report: Report) -> Iterator[str]:
    """What is wrong with a kernel compiled for this case."""
    if report.local_memory_in_loops():
        yield f"{report.local_memory_in_loops()} accesses to local memory in loops"
    if report.shared_memory > LIMITS[report.arch].shared_memory:
        yield f"{report.shared_memory} bytes of shared memory"
    if uses_tensor_cores(case.dtype, case.precision):
        if not report.matrix_instructions():
            yield "no matrix instructions"
        wide = case.way == "forward" and 4 * config.block_h >= 64
        if report.arch == 90 and wide and not report.counts["HGMMA"]:
            yield "no wgmma"
    # The compiler lays operands out for the narrowest type loaded on the way to them: anything else costs a move per element.
    if other := set(re.findall(r"kWidth = (\d+)", report.ttgir)) - {str(max(4 // case.dtype.itemsize, 1))}:
        yield f"operands laid out for elements of another width: kWidth {other}"
    if not config.persistent:
        return
    # Two functions of the special function unit (exp2, reciprocal) an activation.
    activations = 1 if case.way == "backward" and not case.recompute else 5
    each = max(config.block_b * config.block_h // (32 * config.num_warps), 1)
    computed = sum(instruction.opcode == "MUFU" for instruction in report.in_loops)
    if case.dtype != torch.float64 and computed > 2 * activations * each:
        yield f"{computed} special functions, not {2 * activations * each}: is a unit computed by several threads?"
    waits = config.programs > 1 and not case.single_step
    if waits and report.tensor_memory * report.blocks_per_sm() > 512:
        yield f"{report.tensor_memory} columns of tensor memory, of which {report.blocks_per_sm()} blocks may share an SM's 512"
    exchanged, own = loads_of_a_step(case, config)
    exact = case.features == ("training",) and case.H % 16 == 0
    if waits:
        yield from lint_grid_barrier(report)
        # Features and odd rows make more loads of it, never fewer.
        loaded = loads_behind_grid_barrier(report)
        if sum(loaded) < exchanged[0] or (exact and sum(loaded) > exchanged[-1]):
            yield f"{sum(loaded)} loads between wait and arrive, not {' to '.join(map(str, exchanged))}"
        # Of a later round some loads precede the barrier before its place in shared memory is free, and the others follow it.
        rounds = config.rounds(case.H if case.way == "forward" else 4 * case.H)
        if case.features == ("training",) and (len(loaded) > 2 * rounds - 1 or loaded[0] < exchanged[0] // rounds):
            yield f"{loaded} loads at once, in more than {rounds} rounds"
    loads = [i.text for i in report.in_loops if i.opcode in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")]
    data = [text for text in loads if ".STRONG.GPU" not in text]
    polls = len(loads) - len(data)
    if polls > (2 if waits else 0):
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
    inner = case.H if case.way == "forward" else 4 * case.H
    chunks, rest = divmod(inner, depth)
    exchanged = chunks * loads(config.block_b * depth)
    # Of the last chunk what is past the end may be left out.
    exchanged = [exchanged + loads(config.block_b * n) for n in (rest, depth)] if rest else [exchanged]
    if case.way == "forward":
        return exchanged, loads(4 * own)  # the pre-activations
    # The gates, dh_n and the c before the step; and dy, of whose alignment nothing is known.
    return exchanged, loads(4 * own) + 2 * loads(own) + loads(own, case.dtype.itemsize)
