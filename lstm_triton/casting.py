"""Autocast: whether tensors are cast, and their casts, one of each parameter for all the steps of a graph."""

import contextlib

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .modes import sees_operators

# Of a parameter: what it was when it was cast, and the cast. Only graphs hold casts, so a backward that frees them leaves none.
_casts = WeakTensorKeyDictionary()


def is_autocast(device_type: str) -> bool:
    """Whether tensors on such devices are cast; a device type without autocast (meta) may be asked for too."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else contextlib.nullcontext()


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t as torch's own autocast gives it: float64 and integers stay what they are.

    torch keeps the casts of parameters until the autocast ends. Here one is reused as long as some graph holds it.
    """
    if t.dtype == dtype or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    if not _is_reusable(t):
        return t.to(dtype)
    # A cast on one stream is not ready on another.
    stream = torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
    state = (dtype, t._version, t.data_ptr(), stream)
    before, reference = _casts.get(t, (None, None))
    found = reference() if before == state else None
    if found is None:
        found = t.to(dtype)
        _casts[t] = state, TensorWeakRef(found)
    return found


def _is_reusable(t: Tensor) -> bool:
    """What torch asks of casts that it keeps; and nothing that records operators, to run them again without this one."""
    return (
        not sees_operators(t)
        and torch.is_grad_enabled()
        and t.requires_grad
        and t.is_leaf
        and torch.is_autocast_cache_enabled()
        and not t.is_inference()
        and not (t.is_cuda and torch.cuda.is_current_stream_capturing())
    )
