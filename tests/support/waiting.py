"""Programs of one launch that wait for each other: what the tests of a barrier and of the exchange without one share."""

import re
from collections.abc import Iterable

import pytest
import torch

from lstm_triton.kernels import interpreter

FORWARD, BACKWARD = "_lstm_sequence_forward_kernel", "_lstm_sequence_backward_kernel"
FP16 = {"dtype": torch.float16}
BF16 = {"dtype": torch.bfloat16}
FP32, TF32, TF32X3 = ({"dtype": torch.float32, "precision": precision} for precision in ("ieee", "tf32", "tf32x3"))
SEGMENTS = {"resets": True, "reset_state": "stored", "lengths": True, "cells": True}

marks = [
    pytest.mark.long,
    pytest.mark.skipif(not interpreter.programs_can_wait(), reason="the interpreter runs one program after the other"),
]


def change(executed, kernel: str, changes: Iterable[tuple]) -> None:
    """From here on this kernel is executed with patterns in its PTX replaced, each of which must be there."""
    if executed is None:
        pytest.skip("the executor reports mutants; a GPU would wait, or compute anything")

    def changed(name: str, ptx: str) -> str:
        for pattern, replacement in changes if name == kernel else ():
            ptx, found = re.subn(pattern, replacement, ptx)
            assert found, pattern
        return ptx

    executed.change = changed
