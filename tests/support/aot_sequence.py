"""Compile the sequence kernels as `kernels.layer` and `kernels.layer_backward` would launch them, for any NVIDIA GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from lstm_triton.kernels import sequence, sequence_backward
from lstm_triton.kernels.launch import accumulator
from lstm_triton.kernels.sequence_config import (
    DeviceLimits,
    SequenceConfig,
    sequence_backward_config,
    sequence_forward_config,
)

from .aot import SHARED_MEMORY_PER_BLOCK, Report, compile_ahead

# A GPU of each compute capability: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
_MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
LIMITS = {arch: DeviceLimits(n, SHARED_MEMORY_PER_BLOCK[arch]) for arch, n in _MULTIPROCESSORS.items()}

_POINTEES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
_OF_SEGMENTS = {"resets_ptr", "reset_h_ptr", "reset_c_ptr", "lengths_ptr", "dc_states_ptr", "dreset_c_ptr"}
_KERNELS = {
    "forward": sequence._lstm_sequence_forward_kernel,
    "backward": sequence_backward._lstm_sequence_backward_kernel,
}
_CONFIGURE = {"forward": sequence_forward_config, "backward": sequence_backward_config}


class Case(NamedTuple):
    """One launch. segments: with resets, reset_state, lengths and gradients of cell states; else none of them."""

    way: str  # "forward" or "backward"
    H: int
    B: int
    D: int
    dtype: torch.dtype
    precision: str
    segments: bool = False
    recompute: bool = False
    aligned: bool = True  # pointers and strides; torch's own allocations are


def configuration(case: Case, limits: DeviceLimits) -> SequenceConfig:
    return _CONFIGURE[case.way](case.B, case.H, case.D, case.dtype, case.precision, limits)


def compile_case(case: Case, arch: int, config: SequenceConfig | None = None) -> Report:
    """What runs on a GPU of this compute capability; by default in the configuration for the one in LIMITS."""
    config = config or configuration(case, LIMITS[arch])
    kernel = _KERNELS[case.way]
    waits = config.persistent and config.programs > 1
    constexprs = {
        "H": case.H, "D": case.D, "ACC": accumulator(case.dtype), "PRECISION": case.precision, "INDEX": tl.int32,
        "RESIDENT": config.persistent, "BLOCK_B": config.block_b, "BLOCK_H": config.block_h, "BLOCK_K": config.block_k,
    }  # fmt: skip
    if case.way == "backward":
        constexprs |= {"SPLIT_K": config.split_k, "ACTIVATED": not case.recompute}
    options = {"maxnreg": config.max_registers} if config.max_registers else {}
    if waits:
        options["launch_cooperative_grid"] = True
    signature = {name: _type(name, case, waits) for name in kernel.arg_names if name not in constexprs}
    return compile_ahead(
        kernel, signature, constexprs, arch=arch, num_warps=config.num_warps, num_stages=config.num_stages, **options
    )


def _type(name: str, case: Case, waits: bool) -> str | None:
    """The type and hint that the JIT would find for an argument of this name."""
    hint = ":16" if case.aligned else ""
    if (
        (name in ("counters_ptr", "stall_ptr") and not waits)
        or (name == "w_reverse_ptr" and case.D == 1)
        or (name in _OF_SEGMENTS and not case.segments)
    ):
        return None
    if name in ("counters_ptr", "stall_ptr"):
        return "*i32:16"
    if name == "lengths_ptr":
        return "*i64" + hint
    if name == "resets_ptr":
        return ("*i32" if case.dtype == torch.float64 else "*u8") + hint
    if name.endswith("_ptr"):
        return f"*{_POINTEES[case.dtype]}{hint}"
    if name in ("stride_w_k", "stride_w_reverse_k", "stride_dy_h"):
        return "i32:1"
    # stride_t, stride_b, sizes and steps are not specialised; other strides are multiples of H, or of B.
    free = ("T", "B", "first_step", "last_step", "gates_t", "gates_reverse_t", "stride_t", "stride_b")
    if name in free or name.startswith("stride_resets"):
        return "i32"
    return "i32:16" if case.aligned and case.H % 16 == 0 else "i32"
