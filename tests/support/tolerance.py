"""Results judged by the rule of `lstm_triton.tolerance`, with a truth of float64 or of more."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lstm_triton.kernels.device import fp32_precision
from lstm_triton.tolerance import Errors, Tf32Products, misses, neighbours, worst

from .extended import Extended

__all__ = ["Errors", "assert_as_accurate", "errors", "neighbours", "torchs_products", "worst"]


@contextlib.contextmanager
def torchs_products(precision: str | None) -> Iterator[None]:
    """Within, torch's float32 products are full ones on a GPU too, or for "tf32" `Tf32Products`."""
    tf32 = Tf32Products() if precision == "tf32" else contextlib.nullcontext()
    with fp32_precision(torch.backends.cuda.matmul, "ieee"), fp32_precision(torch.backends.cudnn.rnn, "ieee"), tf32:
        yield


def errors(actual: Tensor, truth: Tensor | Extended) -> Errors:
    """The errors of `actual`, infinite if it holds a NaN. The truth: float64 or `Extended`, finite."""
    true = truth.values if isinstance(truth, Extended) else truth.detach().cpu().numpy()
    assert true.dtype in (np.float64, np.longdouble) and np.isfinite(true).all(), "no truth"
    assert actual.shape == true.shape, f"{tuple(actual.shape)} is not {true.shape}"
    difference = actual.detach().cpu().double().numpy() - true  # rounded only once
    return Errors.of(*(torch.from_numpy(values.astype(np.float64)) for values in (difference, true)))


def assert_as_accurate(actual: Tensor, truth: Tensor | Extended, torchs: Errors, name: str = "result") -> None:
    """`actual` is as close to the truth as torch, whose errors in this dtype are `torchs`, up to the rule."""
    assert math.isfinite(torchs.largest), f"{name}: torch's own result is not finite"
    missed = misses(errors(actual, truth), torchs, actual.dtype)
    assert not missed, f"{name}: {'; '.join(missed)}"
