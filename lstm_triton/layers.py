"""One LSTM layer over a sequence, in one or two directions: checks, choice of the backend, and the call."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import (
    casting,
    dispatch,
    filler_steps,
    measurements,
    operators,
    projection,
    reference,
    reference_ops,
    shapes,
    torch_ops,
)
from .kernels.cell_equations import probabilities_of, step_of
from .kernels.device import matmul_precision
from .kernels.inputs import Direction, LayerInputs, LayerOptions, Segments, split_weights
from .modes import any_requires_grad, is_batched, is_jit_tracing
from .segments import checked_segments


def lstm(  # noqa: PLR0913
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
    """Compute one layer of torch.nn.LSTM over a sequence, in one direction (D = 1) or both (D = 2).

    Args:
        x: [T, B, I], T at least 1.
        hx: (h0, c0), each [D, B, H]; None for zeros.
        weights: w_ih [4H, I] and w_hh [4H, H], with biases also b_ih and b_hh [4H], of the forward direction, then for D = 2
            those of the reverse direction. Gates are in the order i, f, g, o. All tensors have one floating-point dtype and
            device; under autocast they are cast to its dtype.
        resets: [T, B] bool. resets[t, b] starts a new segment of batch row b at t: the result equals that of the segments run
            one by one, in both directions. No gradient passes from one segment to another.
        reset_state: (h, c), to which a reset sets the state instead of zeros, each broadcastable to [T, D, B, H]. A direction
            takes the entry of the step at which it enters the segment.
        lengths: [B] integers, 0 ... T: the steps of each batch row. Outputs and cell states past them are zero, h_n and c_n are
            those of each row's last step, and the reverse direction starts there.
        return_cell_states: also return c of every step. recompute: keep y and c for the backward, but compute the gates (4/7
            of the memory where I = H) again by GEMMs. On a CPU, where torch's own kernels run, it changes nothing.
        precision: of float32 products on a GPU: "ieee", "tf32", "tf32x3", or None for the setting of torch.backends.cudnn.rnn
            ("tf32" unless you changed it).
        backend: "auto", "triton" (one launch where it fits, else one per step), "triton-persistent" (one launch, or an
            error), "triton-stepwise" (one per step), "cudnn", "reference" (plain PyTorch).

    Returns:
        y [T, B, D * H], (h_n, c_n) each [D, B, H], and with return_cell_states c [T, B, D * H], in the dtype of x (or of
        autocast). Twice differentiable, except through cuDNN, which raises an error.

    Raises:
        ValueError: x of a wrong rank; unknown precision or backend; reset_state without resets; lengths on the CPU below 0 or
            above T (on a GPU they are clamped, because a check would wait for it).
        TypeError: resets that are not bool, lengths that are not integers, no tensor where one is expected.
        RuntimeError: T = 0; sizes, dtypes or devices that do not fit; a named backend that cannot run the call.
    """
    dispatch.check_precision(precision)
    for t in (x, *weights):
        if not isinstance(t, Tensor):
            raise TypeError(f"lstm(): x and weights must be Tensors, not {type(t).__name__}")
    if x.dim() != 3:
        raise ValueError(f"LSTM: Expected input to be 3D, got {x.dim()}D instead")
    if len(weights) < 2 or any(w.dim() != 2 for w in weights[:2]):
        raise RuntimeError("lstm() needs w_ih and w_hh, and b_ih and b_hh where there are biases, of each direction")
    if hx is not None:
        check_pair(hx)
    check_device(x.device)
    x, hx, reset_state, weights = autocast(x, hx, reset_state, weights)
    (T, B, _), H = x.shape, weights[1].shape[1]
    directions = 2 if len(weights) > 4 or (len(weights) == 4 and weights[2].dim() == 2) else 1
    if hx is None:
        hx = (x.new_zeros(directions, B, H),) * 2
    _check(x, hx, weights, directions)
    (by_direction,) = split_weights(weights, 1, directions)
    segments = checked_segments(x, (T, directions, B), (H, H), resets, reset_state, lengths)
    features = shapes.features(resets, reset_state, lengths, return_cell_states)
    plain = not features and not (recompute and x.is_cuda)

    def shape() -> shapes.Shape:
        sizes = shapes.Shape(x.shape[2], H, 1, directions, 0, B, features)
        return shapes.with_numbers(sizes, x, weights, precision, recompute)

    measured = measurements.for_call(backend, shape, T, x.device)
    is_long = dispatch.is_long(T, x.device)
    chosen = dispatch.layer_backend(backend, x.device, x.dtype, plain, is_long, precision, False, measured)
    if chosen == "cudnn" or (chosen == "torch" and plain):
        # In evaluation mode cuDNN cannot run backward. Without dropout the mode changes nothing else.
        bias, train = by_direction[0].b_ih is not None, torch.is_grad_enabled()
        y, h_n, c_n = torch_ops.lstm(x, hx, weights, torch_ops.Options(bias, 1, 0.0, train, directions == 2, precision))
        return y, (h_n, c_n)
    options = LayerOptions(precision, 0.0, return_cell_states, recompute, chosen == "triton-stepwise")
    y, h_n, c_n, c, *_ = run(chosen, x, hx, by_direction, segments, options)
    return (y, (h_n, c_n), c) if return_cell_states else (y, (h_n, c_n))


def run(
    chosen: str,
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    directions: Sequence[Direction],
    segments: Segments,
    options: LayerOptions,
    draws: bool = False,
) -> Sequence[Any]:
    """Run one layer through the kernels or the reference, from checked arguments. Returns y, h_n, c_n, c, and perhaps more.

    draws: whether the cell's masks, if it has any, are random.
    """
    B, H = x.shape[1], directions[0].w_ih.shape[0] // 4
    if not 0 <= options.dropout <= 1:  # set after construction
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {options.dropout}")
    if chosen == "torch" and options.cell == "lstm" and B and H and filler_steps.can_serve(x, segments):
        found = filler_steps.lstm_layer(x, *hx, directions, segments, options.return_cells)
        if found is not None:
            return _dropped(found[0], options.dropout), *found[1:]
    if chosen in ("reference", "torch") or B == 0 or H == 0:
        return _by_reference(x, hx, directions, segments, options, draws)
    if chosen == "triton-persistent":
        tensors = x, *hx, *segments, *(w for direction in directions for w in direction)
        is_recorded = torch.is_grad_enabled() and any_requires_grad(tensors)
        given = [name for name in ("resets", "lengths") if getattr(segments, name) is not None]
        given += ["random"] * draws
        if is_recorded and any(t is not None and t.requires_grad for t in (segments.reset_h, segments.reset_c)):
            given.append("reset_gradients")
        plans(chosen, x, (len(x), B, H, len(directions)), given, options, is_recorded)
    if directions[0].w_hr is not None:
        y, *rest = projection.lstm_layer(x, hx, directions, segments, options)
        return _dropped(y, options.dropout), *rest
    seed = random_seed(x) if options.dropout or draws else None
    if seed is None or not is_batched(seed):
        return operators.lstm_layer(LayerInputs.of(x, hx, directions, segments, seed), options)
    if draws:
        return _by_reference(x, hx, directions, segments, options, draws)
    y, *states = operators.lstm_layer(LayerInputs.of(x, hx, directions, segments), options)
    return _dropped(y, options.dropout), *states


def _by_reference(
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    directions: Sequence[Direction],
    segments: Segments,
    options: LayerOptions,
    draws: bool,
) -> Sequence[Any]:
    D, B, H = hx[0].shape
    masks = random_masks(x, probabilities_of(options.cell), (x.shape[0], B, D * H)) if draws else None
    if reference_ops.is_recorded():
        y, *states = reference_ops.lstm_layer(x, hx, directions, segments, options.cell, masks)
    else:
        y, *states = reference.lstm_layer(x, *hx, directions, segments, step=step_of(options.cell), masks=masks)
    return _dropped(y, options.dropout), *states


def random_masks(x: Tensor, probabilities: Sequence[float], shape: Sequence[int]) -> Tensor:
    """Draw [n, *shape] of 0 and 1 from torch's generator; under vmap as `random_seed`."""
    like = x.new_empty(shape) if is_jit_tracing() else torch.empty(shape, dtype=x.dtype, device=x.device)
    return torch.stack([torch.bernoulli(like, p) for p in probabilities])


def _dropped(y: Tensor, p: float) -> Tensor:
    return torch.nn.functional.dropout(y, p) if p else y


def random_seed(x: Tensor) -> Tensor:
    """Draw [1] int64 from torch's generator, so that the kernels' random numbers follow torch.manual_seed, without a wait.

    Under vmap with randomness="different" each call draws its own.
    """
    if is_jit_tracing():  # a saved trace may be loaded on another device
        return torch.randint_like(x.new_empty(1, dtype=torch.int64), 2**63 - 1)
    return torch.randint(2**63 - 1, (1,), device=x.device)


def autocast(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, reset_state: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor]
) -> tuple:
    """Cast all tensors but float64 ones to the dtype of the autocast, if there is one, as torch's does."""
    device_type = x.device.type
    if not casting.is_autocast(device_type):
        return x, hx, reset_state, weights
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensors):
        return None if tensors is None else [casting.cast(t, dtype) for t in tensors]

    return cast([x])[0], cast(hx), cast(reset_state), cast(weights)


def plans(
    chosen: str,
    x: Tensor,
    sizes: tuple[int, int, int, int],
    given: Sequence[str],
    options: LayerOptions,
    is_recorded: bool,
) -> dict[str, Any]:
    """Return the configurations of the kernels: forward, and backward if gradients are recorded. This may compile kernels.

    Args:
        x: gives dtype and device. sizes: T, B, H, D. given: "resets", "lengths", "random", "reset_gradients", where present.

    Raises:
        RuntimeError: chosen is "triton-persistent", and they would not all be one launch.
    """
    from .kernels import interpreter, layer
    from .kernels.sequence_config import Problem
    from .kernels.specialization import features

    T, B, H, D = sizes
    precision = matmul_precision(x.dtype, options.precision, recurrent=True)
    found = features(**dict.fromkeys(given, True), dropout=options.dropout > 0, cells=options.return_cells)
    found |= features(random=options.dropout > 0)
    problem = Problem("forward", B, H, D, x.dtype, precision, options.stepwise, found, options.recompute)
    problem = problem._replace(cell=options.cell)
    configs = layer.training_plans(problem, T, x.device) if is_recorded else {}
    configs = configs or {"forward": layer.plan(problem._replace(recompute=False), T, x.device)}
    for way, config in configs.items():
        if chosen != "triton-persistent" or config.persistent or T == 1:
            continue
        if not interpreter.programs_can_wait():
            raise RuntimeError(
                "backend='triton-persistent' cannot serve: Triton's interpreter runs programs one after the other, and here"
                f" one would have to wait for another in the {way}"
            )
        raise RuntimeError(
            f"backend='triton-persistent' cannot serve: for H = {H}, B = {B}, {D} direction(s) in {x.dtype} the programs of one"
            f" launch do not all fit on this device, with W_hh in their shared memory or registers, in the {way}"
        )
    return configs


def _check(x: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor], directions: int) -> None:
    """Check the arguments; the first wrong one raises with torch's own message where torch has one."""
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


def check_pair(hx: Any) -> None:
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"LSTM: hx must be a tuple of two Tensors, not a {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    for state in hx:
        if not isinstance(state, Tensor):
            raise TypeError(f"LSTM: hx must be a tuple of two Tensors, not of {type(state).__name__}")


def check_device(device: torch.device) -> None:
    """Raise RuntimeError if a kernel timed out, before a call to a device whose CUDA context is lost."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return
    if stall := sys.modules.get(f"{__package__}.kernels.stall"):  # imported with the first launch
        stall.check()


def check_alike(x: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless all have the dtype and device of x."""
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
            casting.check_alike("Input", x, [(name, t)])
