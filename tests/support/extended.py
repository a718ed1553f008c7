"""The reference in more than float64: a truth by which float64 results themselves can be judged.

`lstm_triton.reference` is written in torch functions; `Extended` answers those with numpy's long double (64 or more bits of
mantissa on x86 and Arm Linux), so the equations are not written a second time.
"""

from __future__ import annotations

import numpy as np
import torch

assert np.finfo(np.longdouble).eps < np.finfo(np.float64).eps / 256, "numpy's long double is no wider than float64 here"


class Extended:
    """An array, of long doubles as a rule, with the few tensor operations of the reference."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = np.asarray(values)

    @staticmethod
    def of(t: torch.Tensor | None) -> Extended | None:
        return None if t is None else Extended(t.detach().cpu().double().numpy().astype(np.longdouble))

    def __add__(self, other):
        return Extended(self.values + _values(other))

    def __mul__(self, other):
        return Extended(self.values * _values(other))

    def __sub__(self, other):
        return Extended(self.values - _values(other))

    def __rsub__(self, other):
        return Extended(_values(other) - self.values)

    def __matmul__(self, other):
        return Extended(self.values @ other.values)

    def t(self):
        return Extended(self.values.T)

    def chunk(self, n, dim):
        return [Extended(part) for part in np.split(self.values, n, axis=dim)]

    def sum(self, dim, keepdim=False):
        return Extended(self.values.sum(axis=dim, keepdims=keepdim))

    def rounded(self) -> torch.Tensor:
        return torch.from_numpy(self.values.astype(np.float64))

    @classmethod
    def __torch_function__(cls, function, _types, args=(), kwargs=None):
        return _FUNCTIONS[function](*args, **(kwargs or {}))


def _values(x):
    return x.values if isinstance(x, Extended) else x


def difference(actual: torch.Tensor, truth: Extended) -> torch.Tensor:
    """actual - truth, rounded only once."""
    return torch.from_numpy((actual.detach().cpu().double().numpy() - truth.values).astype(np.float64))


def _softmax(x: Extended, dim: int) -> Extended:
    e = np.exp(x.values - x.values.max(axis=dim, keepdims=True))
    return Extended(e / e.sum(axis=dim, keepdims=True))


_FUNCTIONS = {
    torch.sigmoid: lambda x: Extended(1 / (1 + np.exp(-x.values))),
    torch.tanh: lambda x: Extended(np.tanh(x.values)),
    torch.softmax: _softmax,
    torch.cat: lambda parts, dim: Extended(np.concatenate([part.values for part in parts], axis=dim)),
}
