"""Caches for results that Triton's interpreter computes at each operation; `interpreter` installs them."""

from collections.abc import Callable
from typing import Any


def once_a_type(get_np_dtype: Callable) -> Callable:
    """Cache NumPy's dtype for Triton's, for which Triton builds a table at each use."""
    known: dict[str, Any] = {}

    def get(dtype):
        name = dtype.scalar.name
        found = known.get(name)
        if found is None:
            found = known[name] = get_np_dtype(dtype)
        return found

    return get


def once_a_shape(init: Callable) -> Callable:
    """Cache the attributes of block types by elements and shape. Equal shapes become one object."""
    known: dict[tuple, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}

    def repaired(self, element_ty, shape):
        key = element_ty.name, *shape
        found = known.get(key)
        if found is None:
            init(self, element_ty, shape)
            self.shape = shapes.setdefault(tuple(self.shape), self.shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(found)

    return repaired


def once_a_block(init: Callable) -> Callable:
    """Cache the attributes of tensors, which except for the handle follow from the type."""
    known: dict[str, dict[str, Any]] = {}

    def repaired(self, handle, type):
        found = known.get(type.name)
        if found is None:
            init(self, handle, type)
            known[type.name] = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
        else:
            vars(self).update(found, handle=handle, type=type)

    return repaired


def unless_alike(broadcast: Callable) -> Callable:
    """Skip the broadcast of blocks of the same shape."""

    def repaired(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        return (lhs, rhs) if a.is_block() and b.is_block() and a.shape is b.shape else broadcast(self, lhs, rhs)

    return repaired
