"""Compile a sequence kernel for a problem and a configuration without a launch, and what its code depends on."""

from typing import Any

import torch
import triton.language as tl
from triton.runtime.errors import OutOfResources

from .cell_equations import states_of
from .cells import backward_of, forward_of
from .launch import accumulator, accumulator_dtype
from .sequence import _lstm_sequence_forward_kernel
from .sequence_backward import _lstm_sequence_backward_kernel
from .sequence_config import Problem, SequenceConfig, exchanged_row

KERNELS: dict[str, Any] = {"forward": _lstm_sequence_forward_kernel, "backward": _lstm_sequence_backward_kernel}

# The pointers that are None unless a call has the feature. The backward always has gates and c.
_SEGMENTS = {"resets": {"resets_ptr", "reset_h_ptr", "reset_c_ptr"}, "lengths": {"lengths_ptr"}, "random": {"seed_ptr"}}
_FORWARD = {"dropout": {"dropped_ptr"}, "cells": {"c_ptr"}, "gates": {"gates_ptr"}}
_GRADIENTS = {"dy": {"dy_ptr"}, "dh_n": {"dh_n_ptr"}, "dc_n": {"dc_in_ptr"}, "reset_gradients": {"dreset_c_ptr"}}
_BACKWARD = {"cells": {"dc_states_ptr"}, **_GRADIENTS}
POINTERS = {"forward": {**_SEGMENTS, **_FORWARD}, "backward": {**_SEGMENTS, **_BACKWARD}}
# The features of a call that records gradients, whatever else it has.
TRAINING = {"forward": frozenset({"cells", "gates"}), "backward": frozenset({"dy", "dh_n", "dc_n"})}

_INT32 = dict.fromkeys(("counters_ptr", "stall_ptr"), torch.int32)
_STATES = ("c_in_ptr", "c_out_ptr", "dc_in_ptr", "dc_out_ptr")
_DTYPES = {"resets_ptr": torch.uint8, **_INT32, **dict.fromkeys(("lengths_ptr", "seed_ptr"), torch.int64)}


def features(**given: Any) -> frozenset[str]:
    """Return the names of the arguments that are neither None nor False, as `Problem.features`."""
    return frozenset(name for name, value in given.items() if value is not None and value is not False)


def compile_for(problem: Problem, config: SequenceConfig) -> Any | None:
    """Return Triton's compiled kernel for a launch on the current device, or None if it cannot be loaded there."""
    options = {"launch_cooperative_grid": True} if config.waits else {}
    compiled = KERNELS[problem.way].warmup(*_stand_ins(problem, config), grid=(1,), **config.options, **options)
    try:
        compiled._init_handles()  # for n_regs and n_spills, as in Triton's tutorial 02
    except OutOfResources:
        return None
    return compiled


def _stand_ins(problem: Problem, config: SequenceConfig) -> list[Any]:
    """Return stand-ins for the arguments of a launch: a dtype for an aligned tensor, 2 for an unspecialised integer.

    With one launch per step it is one between the first and the last, with the state in the accumulator's dtype.
    """
    pointers = POINTERS[problem.way].items()
    absent = {name for feature, names in pointers if feature not in problem.features for name in names}
    absent |= set() if problem.D == 2 else {"w_reverse_ptr"}
    absent |= set() if config.waits else {"stall_ptr"}
    absent |= set() if config.waits and not config.in_band else {"counters_ptr"}
    values = dict(
        stride_dy_h=0 if "dy_ptr" in absent else 1,
        FORWARD=forward_of(problem.cell),
        BACKWARD=backward_of(problem.cell),
        STATES=states_of(problem.cell),
        H=problem.H,
        ROW=exchanged_row(problem.H, problem.dtype) if config.persistent else problem.H,
        D=problem.D,
        ACC=accumulator(problem.dtype),
        PRECISION=problem.precision,
        INDEX=tl.int64 if problem.long_offsets else tl.int32,
        ACTIVATED=not problem.recompute,
        **config.constants,
        **dict.fromkeys(absent),
    )

    if not config.persistent:
        values |= dict.fromkeys(_STATES, accumulator_dtype(problem.dtype))

    def stand_in(name: str) -> Any:
        return _DTYPES.get(name, problem.dtype) if name.endswith("_ptr") else 2

    return [values.get(name, stand_in(name)) for name in (p.name for p in KERNELS[problem.way].params)]
