"""Casts of tensors under autocast, kept for parameters until it ends; and checks of devices and dtypes."""

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .modes import sees_operators

# For each device the cast that torch's own cache holds for this module, as long as that block of autocast lasts.
_held: dict[torch.device, TensorWeakRef] = {}


def is_autocast(device_type: str) -> bool:
    """Return whether autocast is on for this device type; False for types without autocast (meta)."""
    if not torch._C._is_any_autocast_enabled():
        return False
    try:  # torch.amp.is_autocast_available would break the graph of torch.compile in torch 2.11
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:
        return False


def dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype in which a call with x computes: the dtype of the autocast, if there is one, except for float64."""
    is_cast = is_autocast(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype


def without_autocast(device_type: str):
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else contextlib.nullcontext()


def check_alike(name: str, x: Tensor, others: Iterable[tuple[str, Tensor | None]], dtypes: bool = True) -> None:
    """Raise RuntimeError for the first of the others on another device than x, called `name`, or (dtypes) of another dtype."""
    for other, t in others:
        if t is not None and t.device != x.device:
            where = f"{name} is on {x.device} and {other} on {t.device}"
            raise RuntimeError(f"Expected all tensors to be on the same device, but {where}")
        if t is not None and dtypes and t.dtype != x.dtype:
            raise RuntimeError(f"{name} and {other} must have the same dtype, but got {x.dtype} and {t.dtype}")


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast t as torch's autocast does, which leaves float64 and integers alone.

    As in torch, the casts of parameters are kept until the outermost autocast ends.
    """
    if t.dtype == dtype or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    if not _is_reusable(t):
        return t.to(dtype)
    # A cast on one stream is not ready on another.
    stream = torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
    state = (dtype, t._version, t.data_ptr(), stream)
    casts = kept(t.device)
    before, found = casts.get(id(t), (None, None))  # the graph of a cast holds t: nothing else gets its id
    if found is None or before != state:
        found = t.to(dtype)
        casts[id(t)] = state, found
    return found


def kept(device: torch.device) -> dict:
    """Return the casts made since the outermost autocast began. They are an attribute of a cast in torch's own cache.

    Torch has no callback for the end of an autocast, but it drops that cast then, and its attribute with it.
    """
    reference = _held.get(device)
    ours = None if reference is None else reference()
    if ours is None:
        parameter = _parameter(device)
        # A product with no columns, which computes nothing: it casts the parameter and saves the cast.
        product: Any = torch.mm(parameter, parameter[:, :0]).grad_fn
        ours = product._saved_self
        ours.casts = {}
        _held[device] = TensorWeakRef(ours)
    return ours.casts


@functools.cache
def _parameter(device: torch.device) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.float32, device=device, requires_grad=True)


def _is_reusable(t: Tensor) -> bool:
    """Return whether a cast may be kept: under torch's own conditions, and if nothing records operators to run them later."""
    return (
        not sees_operators(t)
        and torch.is_grad_enabled()
        and t.requires_grad
        and t.is_leaf
        and torch.is_autocast_cache_enabled()
        and not t.is_inference()
        and not (t.is_cuda and torch.cuda.is_current_stream_capturing())
    )
