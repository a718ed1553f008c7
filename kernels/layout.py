"""The memory order of tensors [T, B, ...]: time-major or batch-major, as the caller's input. Needs no triton."""

import torch
from torch import Tensor


def is_time_major(x: Tensor) -> bool:
    """Whether the memory of x [T, B, ...] is in that order; a batch-major one is [B, T, ...], transposed."""
    return x.stride(0) >= x.stride(1) or x.shape[0] == 1 or x.shape[1] == 1


def new_states(like: Tensor, time_major: bool, T: int, B: int, *rest: int) -> Tensor:
    """Uninitialised [T, B, *rest] with the dtype and device of `like`, its memory time-major or batch-major."""
    if time_major:
        return torch.empty((T, B, *rest), dtype=like.dtype, device=like.device)
    return torch.empty((B, T, *rest), dtype=like.dtype, device=like.device).transpose(0, 1)


def as_rows(t: Tensor, time_major: bool) -> Tensor:
    """[T, B, n] as a matrix of T * B rows, in memory order: a view for what `new_states` made."""
    return (t if time_major else t.transpose(0, 1)).flatten(0, 1)
