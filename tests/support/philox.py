"""Philox-4x32-10 (Salmon et al., 2011) in numpy, and with it the random masks that kernels draw."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import torch
from torch import Tensor

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(seed: int, *counter) -> tuple:
    """The four numbers at a counter of four numbers, or of arrays of these."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    key, mask = [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        k0, k1 = map(np.uint64, key)
        c0, c1, c2, c3 = (b >> _HALF) ^ c1 ^ k0, b & _LOW, (a >> _HALF) ^ c3 ^ k1, a & _LOW
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c0, c1, c2, c3


def uniform(seed: int, shape: Sequence[int], number: int = 0) -> np.ndarray:
    """[T, B, N] in [0, 1]: of the four numbers of each draw this one, as kernels draw them for step, row and unit."""
    step, row, unit = np.ogrid[tuple(slice(n) for n in shape)]
    found = np.broadcast_to(philox(seed, unit, row, step, 0)[number], shape)
    return np.minimum(found, _LOW - found) / 2.0**31


def masks(seed: int, probabilities: Sequence[float], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[n, T, B, N]: those of a cell."""
    drawn = [uniform(seed, shape, number) < p for number, p in enumerate(probabilities, 1)]
    return torch.from_numpy(np.stack(drawn)).to(dtype)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, layers and cells take the masks of this seed and the next ones, a layer each, whatever computes them."""
    seeds = itertools.count(seed)

    def next_masks(x: Tensor, probabilities: Sequence[float], shape: Sequence[int]) -> Tensor:
        rows = (1,) * (3 - len(shape)) + tuple(shape)
        return masks(next(seeds), probabilities, rows, x.dtype).view(-1, *shape).to(x.device)

    with (
        mock.patch("lstm_triton.layers.random_seed", lambda x: torch.tensor([next(seeds)], device=x.device)),
        mock.patch("lstm_triton.layers.random_masks", next_masks),
    ):
        yield
