"""Check `resets`, `reset_state` and `lengths` of a call, and bring them to the device of the input."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import casting
from .kernels.inputs import Segments
from .modes import has_values


def checked_segments(
    x: Tensor,
    rows: tuple[int, int, int],
    sizes: tuple[int, int],
    resets: Tensor | None,
    reset_state: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
) -> Segments:
    """Check the arguments; return them with reset states expanded to [T, D, B, size]. rows: (T, D, B); sizes: of h and c."""
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
        lengths = lengths.to(torch.int64)
        if lengths.device.type == "cpu" and B and has_values(lengths):
            if int(lengths.min()) < 0 or int(lengths.max()) > T:
                raise ValueError(f"lengths must lie in 0 ... {T}, got {int(lengths.min())} ... {int(lengths.max())}")
        lengths = sent(lengths, x.device).clamp(0, T)
    return Segments(resets, reset_h, reset_c, lengths)


def check_resets(resets: Tensor | None, reset_state: tuple[Tensor, Tensor] | None, T: int, B: int) -> None:
    """Raise TypeError or RuntimeError unless resets are a [T, B] bool tensor and reset_state is a pair of tensors."""
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


def check_packed(module: torch.nn.RNNBase, packed: PackedSequence) -> None:
    """Raise RuntimeError where a padded input would: torch's own forward omits these checks, and its kernels then ignore
    surplus elements or read past the end of tensors."""
    data: Any = packed.data
    batch_sizes = packed.batch_sizes
    if not isinstance(data, Tensor):
        return
    if data.dim() != 2 or data.shape[1] != module.input_size:
        module.check_input(data, batch_sizes)
    # The current weight, under functional_call too; a parametrized weight is not computed again.
    weight = module._parameters.get("weight_ih_l0")
    casting.check_alike("PackedSequence", data, [("weight_ih_l0", weight)], dtypes=False)
    if has_values(data) and has_values(batch_sizes) and data.shape[0] != (rows := int(batch_sizes.sum())):
        raise RuntimeError(f"a PackedSequence of these batch_sizes has {rows} rows, got {data.shape[0]}")


def sent(t: Tensor, device: torch.device) -> Tensor:
    """Return t on this device, copied from the CPU without waiting for the GPU's pending work.

    A copy from pageable memory may wait, and one from the caller's pinned memory would read what that holds when the GPU gets
    there. So t goes through pinned memory of its own, which torch's allocator does not reuse before the copy is done. During a
    capture the copy is a plain one, which torch refuses, because a replay would repeat it from that memory.
    """
    is_plain = device.type != "cuda" or t.device.type != "cpu" or torch.compiler.is_compiling()
    if is_plain or torch.cuda.is_current_stream_capturing():
        return t.to(device)
    return torch.empty_like(t, pin_memory=True).copy_(t).to(device, non_blocking=True)


def _broadcast(state: Tensor, shape: tuple[int, int, int, int], x: Tensor) -> Tensor:
    """Return the state expanded to this shape, as a view unless its units are not contiguous."""
    casting.check_alike("Input", x, [("reset_state", state)])
    try:
        state = state.expand(*state.shape[:-1], shape[-1]) if state.dim() else state.expand(shape[-1])
        return state.contiguous().expand(shape) if state.stride(-1) != 1 else state.expand(shape)
    except RuntimeError:
        raise RuntimeError(f"reset_state of size {list(state.shape)} cannot be broadcast to {list(shape)}") from None


def packed_rows(batch_sizes: Tensor, B: int) -> Tensor:
    """Return for each row of packed data its index t * B + b in the padded [T, B]."""
    padded = range_of(batch_sizes.shape[0] * B).view(-1, B)
    return padded[range_of(B) < batch_sizes[:, None]]


def range_of(n: int) -> Tensor:
    """Return range(n) on the CPU, where batch sizes are, whatever torch's default device is."""
    return torch.arange(n, device="cpu")
