"""The reference in more than float64: a truth by which float64 results themselves can be judged.

`lstm_triton.reference` is written in torch functions; `Extended` answers those with numpy's long double (64 or more bits of
mantissa on x86 and Arm Linux), so the equations are not written a second time.
"""

from __future__ import annotations

import numpy as np
import torch

assert np.finfo(np.longdouble).eps < np.finfo(np.float64).eps / 256, "numpy's long double is no wider than float64 here"


class Extended(np.ndarray):
    """An array, of long doubles as a rule, with the few tensor operations of the reference."""

    def __new__(cls, values: np.ndarray) -> Extended:
        return np.asarray(values).view(cls)

    @staticmethod
    def of(t: torch.Tensor | None) -> Extended | None:
        return None if t is None else Extended(t.detach().cpu().double().numpy().astype(np.longdouble))

    @property
    def values(self) -> np.ndarray:
        return self.view(np.ndarray)

    def t(self):
        return self.T

    def chunk(self, n, dim):
        return np.split(self, n, axis=dim)

    def sum(self, dim, keepdim=False):
        return Extended(self.values.sum(axis=dim, keepdims=keepdim))

    def rounded(self) -> torch.Tensor:
        return torch.from_numpy(self.values.astype(np.float64))

    @classmethod
    def __torch_function__(cls, function, _types, args=(), kwargs=None):
        return _FUNCTIONS[function](*args, **(kwargs or {}))


def _softmax(x: Extended, dim: int) -> Extended:
    e = np.exp(x - x.max(axis=dim, keepdims=True))
    return e / e.sum(dim, keepdim=True)


_FUNCTIONS = {
    torch.sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    torch.tanh: np.tanh,
    torch.softmax: _softmax,
    torch.cat: lambda parts, dim: Extended(np.concatenate(parts, axis=dim)),
}
