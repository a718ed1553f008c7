"""One LSTM layer over a sequence, in one or two directions: checks, choice of backend, call."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import casting, dispatch, layer_ops, projection, reference, torch_ops


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    return_cell_states: bool = False,
    recompute: bool = False,
    precision: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """One layer of torch.nn.LSTM over a sequence, in one direction (D = 1) or both (D = 2).

    Args:
        x: [T, B, I], T at least 1.
        hx: (h0, c0), each [D, B, H]; None for zeros.
        weights: w_ih [4H, I] and w_hh [4H, H], with biases also b_ih and b_hh [4H], of the forward direction, then for D = 2
            those of the reverse one. Gates in the order i, f, g, o. One floating-point dtype and device for all; under
            autocast all are cast to its dtype.
        resets: [T, B] bool. resets[t, b] starts a new segment of row b at t: the result equals that of the segments run one
            by one, in both directions. No gradient passes from one segment to another.
        reset_state: (h, c), what a reset sets the state to instead of zero, each broadcastable to [T, D, B, H]: that of the
            step at which the direction enters the segment.
        lengths: [B] integers, 0 ... T: the steps of each row. Outputs and cell states past them are zero, h_n and c_n are those
            of each row's last step, and the reverse direction starts there.
        return_cell_states: also return c of every step.
        recompute: hold y and c for the backward, but not the gates, 4/7 of the memory; it costs a GEMM to rebuild them.
        precision: how float32 products are computed on a GPU: "ieee", "tf32", "tf32x3", or None for what
            torch.backends.cudnn.rnn says ("tf32" unless you changed it).
        backend: "auto", "triton" (one launch where it fits, else one per step), "triton-persistent" (one launch, or an
            error), "triton-stepwise" (one per step), "cudnn", "reference" (plain PyTorch).

    Returns:
        y [T, B, D * H], (h_n, c_n) each [D, B, H], and with return_cell_states c [T, B, D * H]. Twice differentiable, except
        through cuDNN, which raises an error there.

    Raises:
        ValueError: x of a wrong rank; unknown precision or backend; reset_state without resets; lengths below 0 or above T,
            if on the CPU (on a GPU they are clamped, as checking would wait for it).
        TypeError: resets that are not bool, lengths that are not integers.
        RuntimeError: T = 0; sizes, dtypes or devices that do not fit; a forced backend that cannot serve.
    """
    if precision not in dispatch.PRECISIONS:
        raise ValueError(f"precision must be one of 'ieee', 'tf32', 'tf32x3' or None, got {precision!r}")
    if x.dim() != 3:
        raise ValueError(f"LSTM: Expected input to be 3D, got {x.dim()}D instead")
    if len(weights) < 2:
        raise RuntimeError("lstm() needs w_ih and w_hh, and b_ih and b_hh where there are biases, of each direction")
    x, hx, reset_state, weights = autocast(x, hx, reset_state, weights)
    (T, B, _), H = x.shape, weights[1].shape[1]
    directions = 2 if len(weights) > 4 or (len(weights) == 4 and weights[2].dim() == 2) else 1
    if hx is None:
        zeros = x.new_zeros(directions, B, H)
        hx = (zeros, zeros)
    _check(x, hx, weights, directions)
    segments = checked_segments(x, (T, directions, B), (H, H), resets, reset_state, lengths)
    plain = resets is None and lengths is None and not return_cell_states and not recompute
    chosen = dispatch.layer_backend(backend, x.device, x.dtype, plain, dispatch.is_long(T, x.device), precision)
    bias = len(weights) // directions == 4
    if chosen in ("torch", "cudnn"):
        # In evaluation mode cuDNN cannot run backward. Without dropout the mode changes nothing else.
        with cudnn_precision(x, precision):
            y, h_n, c_n = torch_ops.lstm(x, hx, weights, bias, 1, 0.0, torch.is_grad_enabled(), directions == 2)
        return y, (h_n, c_n)
    y, h_n, c_n, c = run(
        chosen, x, hx, weights, directions, bias, segments, return_cell_states, recompute, precision
    )  # fmt: skip
    return (y, (h_n, c_n)) if c is None or not return_cell_states else (y, (h_n, c_n), c)


class Segments(NamedTuple):
    """Checked resets, reset states [T, D, B, H] and lengths, each on the device of the input, or None."""

    resets: Tensor | None
    reset_h: Tensor | None
    reset_c: Tensor | None
    lengths: Tensor | None

    def of_rows(self, rows: slice) -> "Segments":
        """Those of some of the D layers and directions."""
        reset_h, reset_c = (None if s is None else s[:, rows] for s in (self.reset_h, self.reset_c))
        return Segments(self.resets, reset_h, reset_c, self.lengths)


def run(
    chosen: str,
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    directions: int,
    bias: bool,
    segments: Segments,
    return_cells: bool,
    recompute: bool,
    precision: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n, c) of one layer through the kernels or the reference, from arguments that have been checked.

    weights: w_ih, w_hh, with bias b_ih and b_hh, and with projection w_hr, of each direction.
    """
    (T, B, _), H = x.shape, weights[1].shape[0] // 4
    if chosen == "reference" or B == 0 or H == 0:
        n = len(weights) // directions
        by_direction = []
        for d in range(directions):
            w = weights[d * n : (d + 1) * n]
            by_direction.append((*w[:2], *(w[2:4] if bias else (None, None)), *w[4 if bias else 2 :]))
        return reference.lstm_layer(x, *hx, by_direction, *segments)
    if chosen == "triton-persistent":
        given = (x, *hx, *weights, segments.reset_h, segments.reset_c)
        is_recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        _require_persistent(T, B, H, directions, x, precision, is_recorded)
    stepwise = chosen == "triton-stepwise"
    if len(weights) // directions not in (2, 4):
        return projection.lstm_layer(
            x, *hx, weights, directions, *segments, precision, return_cells, recompute, stepwise
        )
    return layer_ops.lstm_layer(x, *hx, weights, directions, *segments, precision, return_cells, recompute, stepwise)


def autocast(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, reset_state: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor]
) -> tuple:
    """All of them in the dtype of the autocast, if there is one; float64 stays what it is, as in torch's own."""
    device_type = x.device.type
    if not casting.is_autocast(device_type):
        return x, hx, reset_state, weights
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensors):
        if tensors is None:
            return None
        return [casting.cast(t, dtype) for t in tensors]

    return cast([x])[0], cast(hx), cast(reset_state), cast(weights)


def cudnn_precision(x: Tensor, precision: str | None) -> contextlib.AbstractContextManager:
    """cuDNN's recurrent layers on float32 inside: in this precision, if one is given."""
    if precision is None or not x.is_cuda or x.dtype != torch.float32:
        return contextlib.nullcontext()
    return _cudnn_precision(precision)


@contextlib.contextmanager
def _cudnn_precision(precision: str) -> Iterator[None]:
    rnn: Any = torch.backends.cudnn.rnn
    before, rnn.fp32_precision = rnn.fp32_precision, precision
    try:
        yield
    finally:
        rnn.fp32_precision = "none"  # as inherited from other settings, which it would no longer follow
        if rnn.fp32_precision != before:
            rnn.fp32_precision = before


def _require_persistent(
    T: int, B: int, H: int, directions: int, x: Tensor, precision: str | None, is_recorded: bool
) -> None:
    """Raise RuntimeError if it would not be one launch: the forward, and where gradients are recorded the backward."""
    from .kernels import interpreter, layer, sequence_config

    ways = {"forward": sequence_config.sequence_forward_config}
    if is_recorded:
        ways["backward"] = sequence_config.sequence_backward_config
    for way, configure in ways.items():
        if layer.is_persistent(T, B, H, directions, x.dtype, precision, x.device, configure):
            continue
        if not interpreter.programs_can_wait():
            raise RuntimeError(
                "backend='triton-persistent' cannot serve: Triton's interpreter runs programs one after the other, and here"
                f" one would have to wait for another in the {way}"
            )
        raise RuntimeError(
            f"backend='triton-persistent' cannot serve: for H = {H}, B = {B}, {directions} direction(s) in {x.dtype} the"
            f" programs of one launch do not all fit on this device together with W_hh in the {way}"
        )


def _check(x: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor], directions: int) -> None:
    """Good arguments pass; the first fault raises with torch's own words where it has some."""
    (T, B, I), H = x.shape, weights[1].shape[1]
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    n, remainder = divmod(len(weights), directions)
    if remainder or n not in (2, 4):
        raise RuntimeError("weights must be w_ih and w_hh, and b_ih and b_hh where there are biases, of each direction")
    if I != weights[0].shape[-1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {weights[0].shape[-1]}, got {I}")
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    for k, w in enumerate(weights):
        if w.shape != shapes[k % n]:
            raise RuntimeError(f"weights[{k}] must have size {shapes[k % n]}, got {list(w.shape)}")
    for k, state in enumerate(hx):
        if state.shape != (directions, B, H):
            raise RuntimeError(f"Expected hidden[{k}] size {(directions, B, H)}, got {list(state.shape)}")
    check_alike(x, hx, weights)


def check_alike(x: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor]) -> None:
    """All have the dtype and device of x, or RuntimeError."""
    dtype, device = x.dtype, x.device
    for k, t in enumerate((*hx, *weights)):
        if t.dtype != dtype or t.device != device:
            if t.device != device:
                kind = "hidden" if k < 2 else "parameter"
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {device} and {kind} tensor"
                    f" at {t.device}"
                )
            name = f"hx[{k}]" if k < 2 else f"weights[{k - 2}]"
            raise RuntimeError(f"Input and {name} must have the same dtype, got {dtype} and {t.dtype}")


def checked_segments(
    x: Tensor,
    rows: tuple[int, int, int],
    sizes: tuple[int, int],
    resets: Tensor | None,
    reset_state: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
) -> Segments:
    """Good arguments, with reset states expanded to [T, D, B, size]; rows is (T, D, B), sizes those of h and c."""
    T, _, B = rows
    reset_h = reset_c = None
    check_resets(resets, reset_state, T, B)
    if lengths is not None and not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    if resets is not None:
        resets = sent(resets, x.device)
        if reset_state is not None:
            reset_h, reset_c = (_broadcast(s, (*rows, size), x) for s, size in zip(reset_state, sizes))
    elif reset_state is not None:
        raise ValueError("reset_state without resets: there is no step at which it would be used")
    if lengths is not None:
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got {lengths.dtype}")
        if lengths.shape != (B,):
            raise RuntimeError(f"Expected lengths size {(B,)}, got {list(lengths.shape)}")
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and B:
            if int(lengths.min()) < 0 or int(lengths.max()) > T:
                raise ValueError(f"lengths must lie in 0 ... {T}, got {int(lengths.min())} ... {int(lengths.max())}")
        lengths = sent(lengths, x.device).to(torch.int64).clamp(0, T)
    return Segments(resets, reset_h, reset_c, lengths)


def check_resets(resets: Tensor | None, reset_state: tuple[Tensor, Tensor] | None, T: int, B: int) -> None:
    """TypeError or RuntimeError where resets are no [T, B] bool tensor, or reset_state is no pair of tensors."""
    if reset_state is not None:
        is_pair = not isinstance(reset_state, Tensor) and len(reset_state) == 2
        if not is_pair or not all(isinstance(s, Tensor) for s in reset_state):
            raise TypeError("reset_state must be a pair of tensors (h, c)")
    if resets is None:
        return
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets must be a tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets must be bool, got {resets.dtype}")
    if resets.shape != (T, B):
        raise RuntimeError(f"Expected resets size {(T, B)}, got {list(resets.shape)}")


def sent(t: Tensor, device: torch.device) -> Tensor:
    """t on this device. From the CPU without waiting for what the GPU has yet to do.

    A copy of pageable memory may wait, one of the caller's pinned memory would read what that holds when the GPU gets there: it
    goes through pinned memory of its own, which torch's allocator gives to nobody else before the copy is done. A captured copy
    would be repeated from there at each replay: torch refuses the plain one.
    """
    is_plain = device.type != "cuda" or t.device.type != "cpu" or torch.compiler.is_compiling()
    if is_plain or torch.cuda.is_current_stream_capturing():
        return t.to(device)
    return torch.empty_like(t, pin_memory=True).copy_(t).to(device, non_blocking=True)


def _broadcast(state: Tensor, shape: tuple[int, int, int, int], x: Tensor) -> Tensor:
    """As a view of this shape, except that the units become contiguous."""
    if state.dtype != x.dtype or state.device != x.device:
        raise RuntimeError(
            f"Input and reset_state must have the same dtype and device, got {x.dtype} on {x.device} and {state.dtype} on"
            f" {state.device}"
        )
    try:
        state = state.expand(*state.shape[:-1], shape[-1]) if state.dim() else state.expand(shape[-1])
        return state.contiguous().expand(shape) if state.stride(-1) != 1 else state.expand(shape)
    except RuntimeError:
        raise RuntimeError(f"reset_state of size {list(state.shape)} cannot be broadcast to {list(shape)}") from None
