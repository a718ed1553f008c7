"""Programs of one launch that wait for each other, at a barrier or without one: what their tests share."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from lstm_triton.kernels import interpreter, search

from . import layers
from .aot import KINDS

FORWARD, BACKWARD = "_lstm_sequence_forward_kernel", "_lstm_sequence_backward_kernel"
SEGMENTS = {"resets": True, "reset_state": "stored", "lengths": True, "cells": True}

marks = [
    pytest.mark.long,
    pytest.mark.skipif(not interpreter.programs_can_wait(), reason="the interpreter runs one program after the other"),
]

# What the search may choose so that small layers are shared by several programs, as large ones are. At the barrier of 8 units
# each, and 16 rows a group; in the exchange of 16 units each, on CUDA cores 4, and 8 rows a group.
BARRIER = {"_TILES": [(16, 8, 8)], "_IN_BAND": (False,)}
EXCHANGE = {"_TILES": [(8, 16, 4)], "_TILES_ON_CUDA_CORES": [(8, 4, 4)], "_IN_BAND": (True,)}


@contextlib.contextmanager
def searching(**limits: Any) -> Iterator[None]:
    """Within, the search chooses from these alone, and remembers nothing from before."""
    with mock.patch.multiple(search, **limits, remembered={}):
        yield


def draw(kind: str, *shape: int, **options: Any) -> layers.Problem:
    """A layer of this dtype and precision: T, B, I, H and the number of directions."""
    dtype, precision = KINDS[kind]
    return layers.draw(*shape, dtype=dtype, precision=precision, **options)
