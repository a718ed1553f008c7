"""The memory order of tensors [T, B, ...]: time-major or batch-major, as the caller's input. This module needs no triton."""

import torch
from torch import Tensor


def is_time_major(x: Tensor) -> bool:
    """Return whether x [T, B, ...] is in this order in memory; a batch-major x is [B, T, ...], transposed."""
    return x.stride(0) >= x.stride(1) or x.shape[0] == 1 or x.shape[1] == 1


def new_states(like: Tensor, time_major: bool, T: int, B: int, *rest: int) -> Tensor:
    """Return an uninitialised [T, B, *rest] of the dtype and device of `like`, time-major or batch-major in memory."""
    if time_major:
        return torch.empty((T, B, *rest), dtype=like.dtype, device=like.device)
    return torch.empty((B, T, *rest), dtype=like.dtype, device=like.device).transpose(0, 1)


def as_rows(t: Tensor, time_major: bool) -> Tensor:
    """Return [T, B, n] as a matrix of T * B rows in memory order, a view if `new_states` made t."""
    return (t if time_major else t.transpose(0, 1)).flatten(0, 1)
