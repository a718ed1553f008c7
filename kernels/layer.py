"""One LSTM layer over a whole sequence, in one or two directions: the forward kernel and the GEMM of the library before it.

One GEMM gives the pre-activations of all steps and directions, one launch the recurrence. Rows of W_ih are reordered once per
call, from gate-major to the unit-major order [H, 4] of the pre-activations.
"""

import itertools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import interpreter, launch, stall
from .dropout import Dropout, kernel_arguments
from .grid_sync import COUNTER_STRIDE
from .launch import Launcher, accumulator, device_limits, matmul_precision, torch_matmul_precision
from .sequence import _lstm_sequence_forward_kernel
from .sequence_config import DeviceLimits, SequenceConfig, exchanged_row, sequence_forward_config

_forward = Launcher(_lstm_sequence_forward_kernel)

# Arrival counters are int32: steps times programs of a group stay below this.
_MAX_ARRIVALS = 2**31 - 1


class Direction(NamedTuple):
    """The weights of one direction: w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H] or None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class Segments(NamedTuple):
    """Where rows start, stop and restart.

    resets: [T, B] bool or None; reset_h, reset_c: [T, D, B, H] of any strides but a last one of 1, or None for zeros;
    lengths: [B] integers in 0 ... T, or None.
    """

    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    lengths: Tensor | None = None


class Forward(NamedTuple):
    """y [T, B, D * H]; h_n, c_n [D, B, H]; c [T, B, D * H] and gates [T, B, D, H, 4] or None.

    h: y before dropout, or None where there was none.
    """

    y: Tensor
    h_n: Tensor
    c_n: Tensor
    c: Tensor | None
    gates: Tensor | None
    h: Tensor | None = None


def new_states(like: Tensor, time_major: bool, T: int, B: int, *rest: int) -> Tensor:
    """Uninitialised [T, B, *rest], its memory in the order of `like`: time-major or batch-major."""
    if time_major:
        return torch.empty((T, B, *rest), dtype=like.dtype, device=like.device)
    return torch.empty((B, T, *rest), dtype=like.dtype, device=like.device).transpose(0, 1)


def as_rows(t: Tensor, time_major: bool) -> Tensor:
    """[T, B, n] as a matrix of T * B rows, in memory order: a view for what `new_states` made."""
    return (t if time_major else t.transpose(0, 1)).flatten(0, 1)


def unit_major(w: Tensor) -> Tensor:
    """Rows gate * H + unit -> 4 * unit + gate."""
    return w.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


def is_time_major(x: Tensor) -> bool:
    return x.stride(0) >= x.stride(1) or x.shape[0] == 1 or x.shape[1] == 1


def aligned(t: Tensor) -> Tensor:
    """Contiguous, from a 16-byte boundary on: elsewhere, as one layer's part of all states may be, it takes another kernel."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def reset_state(segments: Segments, state: Tensor | None, h0: Tensor) -> Tensor | None:
    """`state`, reset_h or reset_c, as a kernel takes it; zeros where there are resets without one.

    Its rows lie at multiples of H from a 16-byte boundary: as it is, or else a copy, broadcast again.
    """
    if segments.resets is None:
        return None
    H = h0.shape[2]
    if state is None:
        return h0.new_zeros(H).expand(segments.resets.shape[0], *h0.shape)
    if state.data_ptr() % 16 == 0 and all(n == 1 or s % H == 0 for n, s in zip(state.shape[:3], state.stride())):
        return state
    once = state[tuple(slice(None if s else 1) for s in state.stride()[:3])]
    return once.clone(memory_format=torch.contiguous_format).expand(state.shape)


def padded(state: Tensor, units: int) -> Tensor:
    """A state [..., H] with rows of `units` units, those past H zero; what is broadcast stays so."""
    if state.shape[-1] == units:
        return state
    once = state[tuple(slice(None if s else 1) for s in state.stride()[:-1])]
    return torch.nn.functional.pad(once, (0, units - state.shape[-1])).expand(*state.shape[:-1], units)


def plan(configure, T: int, B: int, H: int, D: int, dtype, precision: str, device, stepwise: bool) -> SequenceConfig:
    multiprocessors, *others = device_limits(device)
    limits = DeviceLimits(max(multiprocessors - launch.FREE_MULTIPROCESSORS, 1), *others)
    config = configure(B, H, D, dtype, precision, limits)
    waits = _waits(config, T)
    if stepwise or (waits and (T * config.programs > _MAX_ARRIVALS or not interpreter.programs_can_wait())):
        return configure(B, H, D, dtype, precision, limits, stepwise=True)
    return config


def _waits(config: SequenceConfig, steps: int) -> bool:
    """Whether programs of a launch of so many steps wait for each other: not in one, which any CUDA graph may then hold."""
    return config.persistent and config.programs > 1 and steps > 1


def is_persistent(
    T: int,
    B: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    precision: str | None,
    device: torch.device,
    configure=sequence_forward_config,
) -> bool:
    """Whether T steps of B rows, H units, D directions would be one launch: forward, or what `configure` is for."""
    precision = matmul_precision(dtype, precision, recurrent=True)
    return T == 1 or plan(configure, T, B, H, D, dtype, precision, device, False).persistent


def run(
    launcher: Launcher, config: SequenceConfig, tensors, T: int, B: int, first: int, last: int, strides, constants
) -> None:
    waits = _waits(config, last - first)
    # A grid that cannot all be resident is refused, not hung.
    options = {"launch_cooperative_grid": True} if waits else {}
    counters = stalled = None
    if waits:
        device = next(t for t in tensors if t is not None).device
        stalled = stall.word(launcher.kernel.__name__, device.type == "cuda")
        counters = torch.zeros(config.groups * COUNTER_STRIDE.value, dtype=torch.int32, device=device)
    programs = config.programs * config.groups
    try:
        launcher(
            (programs, 1, 1), (*tensors, counters, stalled), (T, B, first, last, *strides), constants, config, **options
        )
    except RuntimeError as error:
        if not waits or not any(words in str(error) for words in ("cooperative launch", "operation not supported")):
            raise
        # A part of a GPU that its properties do not tell: of a green context, or a client of MPS; or a virtual one.
        raise RuntimeError(
            f"{launcher.kernel.__name__} needs {programs} programs that run at the same time, and this process may use fewer"
            " multiprocessors, or launch none so: set LSTM_TRITON_FREE_MULTIPROCESSORS to the number it may not use, or take"
            " backend='triton-stepwise'"
        ) from error


def index_type(*tensors: Tensor | None) -> tl.dtype:
    """The integer type of offsets within one timestep of tensors [T, B, ...], in elements."""
    last = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:])) for t in tensors if t is not None)
    return tl.int32 if last < 2**31 else tl.int64


def segment_strides(flags: Tensor | None, *states: Tensor | None) -> tuple[int, ...]:
    """Of flags in elements, of states in rows."""
    resets = (0, 0) if flags is None else flags.stride()
    rows = ((0, 0, 0) if t is None else tuple(s // t.shape[3] for s in t.stride()[:3]) for t in states)
    return (*resets, *itertools.chain(*rows))


def recurrent_weights(directions: list[Direction]) -> tuple[Tensor, Tensor | None]:
    """W_hh of each direction: the kernels know one layout, and what does not have it is copied, once for all steps."""
    return aligned(directions[0].w_hh), aligned(directions[1].w_hh) if len(directions) == 2 else None


def reset_flags(resets: Tensor | None) -> Tensor | None:
    """Resets as integers that a kernel can load."""
    return None if resets is None else resets.view(torch.uint8)


def pre_activations(x: Tensor, directions: list[Direction], precision: str) -> Tensor:
    """x W_ih^T + b_ih + b_hh of x [T, B, I] for all steps: [T, B, D, H, 4], in one GEMM."""
    T, B, I = x.shape
    H = directions[0].w_hh.shape[1]
    time_major = is_time_major(x)
    w = torch.cat([unit_major(d.w_ih) for d in directions]) if len(directions) > 1 else unit_major(directions[0].w_ih)
    rows = as_rows(x, time_major)
    biases = [b for d in directions for b in (d.b_ih, d.b_hh) if b is not None]
    with torch_matmul_precision(x.dtype, precision):
        if biases:
            b = torch.stack(biases).unflatten(0, (len(directions), -1)).sum(1)
            z = torch.addmm(b.unflatten(1, (4, H)).transpose(1, 2).flatten(), rows, w.t())
        else:
            z = rows @ w.t()
    z = z.view(T, B, len(directions), H, 4) if time_major else z.view(B, T, len(directions), H, 4).transpose(0, 1)
    return z


@stall.names_the_kernel
def lstm_layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    directions: list[Direction],
    segments: Segments = Segments(),
    *,
    dropout: Dropout | None = None,
    precision: str | None = None,
    save_cells: bool = False,
    save_gates: bool = False,
    stepwise: bool = False,
) -> Forward:
    """Run one layer.

    Args:
        x: [T, B, I], T and B at least 1; memory time-major or batch-major (others are copied), which the outputs then follow.
        h0, c0: [D, B, H].
        directions: the weights of the forward direction and, where D = 2, of the reverse one. One floating-point dtype and
            device for all.
        dropout: of y, for the layer that follows.
        precision: of float32 products: "ieee", "tf32", "tf32x3", or None for torch's setting of cuDNN's recurrent layers.
        save_cells, save_gates: also return what the caller or `lstm_layer_backward` wants.
        stepwise: one launch per step, even where one launch could run them all.
    """
    (T, B, _), H, D = x.shape, h0.shape[2], len(directions)
    precision = matmul_precision(x.dtype, precision, recurrent=True)
    pre = pre_activations(x, directions, precision)
    time_major = is_time_major(pre)
    # Rows of any other width would be exchanged element by element; for a single step it is not worth the copies.
    row = exchanged_row(H, x.dtype)
    stepwise |= T == 1 and row != H
    config = plan(sequence_forward_config, T, B, H, D, x.dtype, precision, x.device, stepwise)
    row = row if config.persistent else H

    h = new_states(x, time_major, T, B, D * row)
    dropped = None if dropout is None else new_states(x, time_major, T, B, D * H)
    c = new_states(x, time_major, T, B, D * H) if save_cells else None
    gates = new_states(x, time_major, T, B, D, H, 4) if save_gates else None
    h0, c0 = aligned(h0), aligned(c0)
    h_n = torch.empty_like(h0) if segments.lengths is None else h0.clone()
    c_n = torch.empty_like(c0)
    seed, p = kernel_arguments(dropout)
    constants = (H, row, D, accumulator(x.dtype), precision, index_type(pre, h), config.persistent, config.block_b,
                 config.block_h, config.block_k, config.in_flight)  # fmt: skip
    flags = reset_flags(segments.resets)
    reset_h = reset_state(segments, segments.reset_h, h0)
    both_zero = segments.reset_h is None and segments.reset_c is None
    reset_c = reset_h if both_zero else reset_state(segments, segments.reset_c, h0)
    h0, reset_h = padded(h0, row), None if reset_h is None else padded(reset_h, row)
    strides = (h.stride(0) // (D * row), h.stride(1) // (D * row), *segment_strides(flags, reset_h, reset_c))
    weights = recurrent_weights(directions)
    for first, last, c_in, c_out in launches(config, c0, c_n, 0, T):
        tensors = (pre, *weights, h0, c_in, flags, reset_h, reset_c, segments.lengths,
                   h, h_n, c_out, c, gates, seed, dropped)  # fmt: skip
        run(_forward, config, tensors, T, B, first, last, (*p, *strides), constants)
    if row != H:
        exchanged, h = h, new_states(x, time_major, T, B, D * H)
        h.unflatten(2, (D, H)).copy_(exchanged.unflatten(2, (D, row))[..., :H])
    return Forward(h, h_n, c_n, c, gates) if dropped is None else Forward(dropped, h_n, c_n, c, gates, h)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which c and dc are kept between launches: that of the accumulator."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def launches(config: SequenceConfig, state_in: Tensor | None, state_out: Tensor, first: int, last: int) -> list[tuple]:
    """(first step, last step, state in, state out) of each launch; between launches the state is kept unrounded."""
    if config.persistent or last - first == 1:
        return [(first, last, state_in, state_out)]
    kept = torch.empty_like(state_out, dtype=accumulator_dtype(state_out.dtype))
    return [
        (step, step + 1, state_in if step == first else kept, state_out if step == last - 1 else kept)
        for step in range(first, last)
    ]
