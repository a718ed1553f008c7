"""Tell whether torch is compiling, tracing or transforming around a call, which decides how the call runs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_jit_tracing() -> bool:
    """Return whether torch.jit.trace records operators. The trace must hold for calls with and without gradients."""
    return torch._C._get_tracing_state() is not None


def is_batched(t: Tensor) -> bool:
    """Return whether t stands for several tensors, one for each call under torch.func.vmap."""
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            return True
        t = _functorch.get_unwrapped(t)
    return False


def sees_operators(*tensors: Tensor | None) -> bool:
    """Return whether the dispatcher has to see the operator; elsewhere a kernel may take the memory of the tensors as it is.

    It has to for compilers, torch.jit.trace, dispatch modes (fake tensors), torch.func and what it leaves behind, tensor
    subclasses, and tensors whose elements are negated when read (the imaginary part of a conjugate).
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or _functorch.is_functorch_wrapped_tensor(t)):
            return True
    return False


def has_values(t: Tensor) -> bool:
    """Return whether the host can read values of t: no compiler, tracer, fake tensor or transform prevents it."""
    return not (
        torch.compiler.is_compiling()
        or is_jit_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(t) not in _PLAIN
        or _functorch.is_functorch_wrapped_tensor(t)
    )


def takes_reference(*gradients: Tensor | None, watched: bool = True) -> bool:
    """Return whether only the reference can run: under torch.func.vmap and jvp, forward-mode AD, batched gradients.

    watched: the result of `sees_operators`, if known.
    """
    if not watched:
        return forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    for g in gradients:
        if g is not None and _functorch.is_legacy_batchedtensor(g):
            return True
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(i.key() != _functorch.TransformType.Grad for i in _functorch.get_interpreter_stack())


def any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False
