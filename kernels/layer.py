"""The forward of one LSTM layer over a whole sequence, in one or two directions: a cuBLAS GEMM, then the sequence kernel.

The GEMM computes the pre-activations of all steps and directions, the kernel the recurrence. A small launch before them copies
W_ih and the biases from gate-major order to the unit-major order [H, 4] of the pre-activations (`input_weights`).
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import cells, device, grid_sync, layer_step, search, stall
from .cell_equations import states_of
from .device import matmul_precision, torch_products
from .dropout import probability
from .input_weights import input_weights
from .inputs import LayerInputs, LayerOptions, LayerOutputs
from .launch import Launcher, accumulator, accumulator_dtype
from .layer_step import OneStep, layer_step_forward
from .layout import as_rows, is_time_major, new_states
from .sequence import _lstm_sequence_forward_kernel
from .sequence_config import Problem, SequenceConfig, exchanged_row
from .specialization import POINTERS, TRAINING, features

_forward = Launcher(_lstm_sequence_forward_kernel)

# Arrival counters are int32: steps times programs of a group are at most this.
_MAX_ARRIVALS = 2**31 - 1


def aligned(t: Tensor) -> Tensor:
    """Return t, contiguous and beginning at a multiple of 16 bytes, copied if need be; else it would need another kernel."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def reset_state(resets: Tensor | None, state: Tensor | None, initial: Tensor) -> Tensor | None:
    """Return `state`, which is reset_h or reset_c, as a kernel takes it; zeros where there are resets without one.

    The rows of the result lie at multiples of their length from a 16-byte boundary: `state` itself, or else a copy, broadcast
    again. initial: h0 or c0.
    """
    if resets is None:
        return None
    row = initial.shape[2]
    if state is None:
        return initial.new_zeros(row).expand(resets.shape[0], *initial.shape)
    is_dense = state.stride(3) == 1 and all(n == 1 or s % row == 0 for n, s in zip(state.shape[:3], state.stride()))
    if state.data_ptr() % 16 == 0 and is_dense:
        return state
    once = state[tuple(slice(None if s else 1) for s in state.stride()[:3])]
    return once.clone(memory_format=torch.contiguous_format).expand(state.shape)


def padded(state: Tensor, units: int) -> Tensor:
    """Return a state or matrix [..., H] with rows of `units` units, zeros past H. Broadcast dimensions remain broadcast."""
    if state.shape[-1] == units:
        return state
    once = state[tuple(slice(None if s else 1) for s in state.stride()[:-1])]
    return torch.nn.functional.pad(once, (0, units - state.shape[-1])).expand(*state.shape[:-1], units)


def plan(problem: Problem, T: int, on: torch.device) -> SequenceConfig | OneStep:
    """Return the configuration for T steps on this device. The first call for a problem may compile kernels."""
    if layer_step.serves(T, problem.features, problem.recompute):
        return OneStep(problem.D)
    return sequence_plan(problem, T, on)


def sequence_plan(problem: Problem, T: int, on: torch.device) -> SequenceConfig:
    """Return `plan` for the sequence kernels."""
    figures = device.device_figures(on)
    figures = figures._replace(sms=max(figures.sms - device.FREE_MULTIPROCESSORS, 1))
    # A single step is one launch either way, and reads W_hh once.
    config = search.choose(problem._replace(stepwise=problem.stepwise or T == 1), figures, on)
    if config.waits and not config.in_band and T * config.programs > _MAX_ARRIVALS:
        return search.choose(problem._replace(stepwise=True), figures, on)
    return config


def training_plans(problem: Problem, T: int, on: torch.device) -> dict[str, SequenceConfig | OneStep]:
    """Return `plan` of a call that records gradients, forward and backward. problem: of either pass; TRAINING is added."""
    found = {way: problem.features & set(POINTERS[way]) | TRAINING[way] for way in TRAINING}
    found["forward"] -= {"gates"} if problem.recompute else set()
    forward = problem._replace(way="forward", features=found["forward"], recompute=False)
    backward = problem._replace(way="backward", features=found["backward"])
    return {"forward": plan(forward, T, on), "backward": plan(backward, T, on)}


def launch(launcher: Launcher, config: SequenceConfig, on: torch.device, arguments: dict[str, Any]) -> None:
    """Launch a sequence kernel for the steps in its arguments. Counters, stall word and first group are added here."""
    # No program of a launch of one step waits, so the launch need not be cooperative.
    waits = config.waits and arguments["last_step"] - arguments["first_step"] > 1
    counters = stalled = None
    if waits:
        stalled = stall.word(launcher.kernel.__name__, on.type == "cuda")
        if not config.in_band:
            counters = grid_sync.counters(config.groups, on)
    programs = config.programs * config.groups_at_once
    try:
        for first in range(0, config.groups, config.groups_at_once):
            groups = min(config.groups_at_once, config.groups - first)
            launcher(
                (config.programs * groups, 1, 1),
                config,
                arguments | {"counters_ptr": counters, "stall_ptr": stalled, "first_group": first},
                launch_cooperative_grid=waits,  # a grid that cannot all be resident is refused, not hung
            )
    except RuntimeError as error:
        grid_sync.forget_counters()
        if not waits or not any(words in str(error) for words in ("cooperative launch", "operation not supported")):
            raise
        # The GPU's properties do not show that a green context, MPS or virtualisation leaves this process only a part of it.
        raise RuntimeError(
            f"{launcher.kernel.__name__} needs {programs} programs that run at the same time, and this process may use fewer"
            " SMs, or may not launch cooperatively: set LSTM_TRITON_FREE_MULTIPROCESSORS to the number it may not use, or take"
            " backend='triton-stepwise'"
        ) from error


def mark_as_absent(exchanged: Tensor, config: SequenceConfig) -> None:
    """Fill the tensor through which programs will exchange their state without a barrier: set all its bits (`exchange`)."""
    if config.in_band and exchanged.shape[0] > 1:
        exchanged.view({2: torch.int16, 4: torch.int32}[exchanged.itemsize]).fill_(-1)


def index_type(*tensors: Tensor | None) -> tl.dtype:
    """Return the integer type of offsets within one timestep of tensors [T, B, ...], in elements."""
    last = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:])) for t in tensors if t is not None)
    return tl.int32 if last < 2**31 else tl.int64


def state_strides(name: str, state: Tensor | None) -> dict[str, int]:
    """Return the arguments stride_<name>_t, _d and _b of a reset state [T, D, B, n], in rows."""
    t, d, b = (0, 0, 0) if state is None else (s // state.shape[3] for s in state.stride()[:3])
    return {f"stride_{name}_t": t, f"stride_{name}_d": d, f"stride_{name}_b": b}


def shared_arguments(
    problem: Problem, inputs: LayerInputs, dropout: float, states: Tensor, reset_c: Tensor | None
) -> dict[str, Any]:
    """Return the arguments that both sequence kernels take.

    states: [T, B, D * row], the h of every step. W_hh is copied once for all steps unless it is contiguous, begins at a
    multiple of 16 bytes and has rows of `row` elements; those past H are zero.
    """
    T, B, size = states.shape
    row, (flags, _, _, lengths) = size // problem.D, inputs.segments
    w, w_reverse = (None if w is None else aligned(padded(w, row)) for w in (inputs.w_hh, inputs.w_hh_reverse))
    pointers = dict(w_ptr=w, w_reverse_ptr=w_reverse, reset_c_ptr=reset_c, seed_ptr=inputs.seed)
    pointers["resets_ptr"] = None if flags is None else flags.view(torch.uint8)  # integers that a kernel can load
    pointers["lengths_ptr"] = None if lengths is None else lengths.contiguous()
    p_hi, p_lo = probability(dropout)
    stride_t, stride_b = (stride // size for stride in states.stride()[:2])
    resets_t, resets_b = (0, 0) if flags is None else flags.stride()
    sizes = dict(T=T, B=B, p_hi=p_hi, p_lo=p_lo, stride_t=stride_t, stride_b=stride_b, H=problem.H, D=problem.D)
    strides = dict(stride_resets_t=resets_t, stride_resets_b=resets_b, **state_strides("reset_c", reset_c))
    cell = dict(FORWARD=cells.forward_of(problem.cell), STATES=states_of(problem.cell))
    return pointers | sizes | strides | cell | dict(ACC=accumulator(problem.dtype), PRECISION=problem.precision)


def pre_activations(x: Tensor, w: Tensor, b: Tensor | None, D: int) -> Tensor:
    """Compute x W_ih^T + b_ih + b_hh of x [T, B, I] for all steps in one GEMM: [T, B, D, H, 4]. w, b: from `input_weights`."""
    T, B, _ = x.shape
    time_major = is_time_major(x)
    rows = as_rows(x, time_major)
    z = rows @ w.t() if b is None else torch.addmm(b, rows, w.t())
    return z.view(T, B, D, -1, 4) if time_major else z.view(B, T, D, -1, 4).transpose(0, 1)


def lstm_layer_forward(inputs: LayerInputs, options: LayerOptions = LayerOptions(), save: bool = False) -> LayerOutputs:
    """Run one layer.

    Args:
        inputs: tensors of one floating-point dtype and device, T and B at least 1. The outputs are time-major or batch-major in
            memory as x is; x in any other order is copied.
        save: also return what `lstm_layer_backward` needs.
    """
    precision = matmul_precision(inputs.x.dtype, options.precision, recurrent=True)
    with stall.names_the_kernel, torch_products(inputs.x.dtype, precision):
        x, directions, segments = inputs.x, inputs.directions, inputs.segments
        given = features(resets=segments.resets, lengths=segments.lengths, random=inputs.seed)
        if layer_step.serves(len(x), given):
            return layer_step_forward(inputs, options, precision, save)
        # Pre-activations are recomputed for some steps at a time, which are contiguous where y is time-major.
        x = x.contiguous() if save and options.recompute else x
        (T, B, _), (D, _, H), dtype, on = x.shape, inputs.h0.shape, x.dtype, x.device
        pre = pre_activations(x, *input_weights(directions), D)
        time_major = is_time_major(pre)
        drops = inputs.seed is not None and options.dropout > 0
        dropped = new_states(x, time_major, T, B, D * H) if drops else None
        c = new_states(x, time_major, T, B, D * inputs.c0.shape[2]) if save or options.return_cells else None
        gates = new_states(x, time_major, T, B, D, H, 4) if save and not options.recompute else None
        is_long = index_type(pre, c) == tl.int64
        found = given | features(dropout=dropped, cells=c, gates=gates)
        problem = Problem(
            "forward", B, H, D, dtype, precision, options.stepwise, found, long_offsets=is_long, cell=options.cell
        )
        config = sequence_plan(problem, T, on)
        row = exchanged_row(H, dtype) if config.persistent else H
        h = new_states(x, time_major, T, B, D * row)
        mark_as_absent(h, config)
        h0, c0 = aligned(inputs.h0), aligned(inputs.c0)
        h_n = torch.empty_like(h0) if segments.lengths is None else h0.clone()
        c_n = torch.empty_like(c0)
        reset_h = reset_state(segments.resets, segments.reset_h, h0)
        both_zero = segments.reset_h is None and segments.reset_c is None and c0.shape == h0.shape
        reset_c = reset_h if both_zero else reset_state(segments.resets, segments.reset_c, c0)
        h0, reset_h = padded(h0, row), None if reset_h is None else padded(reset_h, row)
        arguments = shared_arguments(problem, inputs, options.dropout, h, reset_c)
        arguments |= dict(pre_ptr=pre, h0_ptr=h0, reset_h_ptr=reset_h, y_ptr=h, h_n_ptr=h_n, c_ptr=c, gates_ptr=gates)
        arguments |= dict(dropped_ptr=dropped, ROW=row, **state_strides("reset_h", reset_h))
        arguments["INDEX"] = index_type(pre, h, c)  # h is the longer one where H = 1
        for step, stop, c_in, c_out in launches(config, c0, c_n, 0, T):
            steps = dict(first_step=step, last_step=stop, c_in_ptr=c_in, c_out_ptr=c_out)
            launch(_forward, config, on, arguments | steps)
        if row != H:
            exchanged, h = h, new_states(x, time_major, T, B, D * H)
            h.unflatten(2, (D, H)).copy_(exchanged.unflatten(2, (D, row))[..., :H])
        if dropped is None:
            return LayerOutputs(h, h_n, c_n, c, gates)
        return LayerOutputs(dropped, h_n, c_n, c, gates, h)


def launches(config: SequenceConfig, state_in: Tensor | None, state_out: Tensor, first: int, last: int) -> list[tuple]:
    """Return (first step, last step, state in, state out) of each launch. Between launches the state is not rounded."""
    if config.persistent or last - first == 1:
        return [(first, last, state_in, state_out)]
    kept = torch.empty_like(state_out, dtype=accumulator_dtype(state_out.dtype))
    return [
        (step, step + 1, state_in if step == first else kept, state_out if step == last - 1 else kept)
        for step in range(first, last)
    ]
