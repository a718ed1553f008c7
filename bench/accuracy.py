"""Errors against float64, and when a provider is wrong."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .cases import Case
from .rows import Error

# Half the distance between neighbouring numbers near 1: what one rounding costs, by how products take their operands.
ROUNDING = {
    "float32 tf32": 2.0**-11,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float64": 2.0**-53,
}

# A provider is wrong beyond so many times torch's own error on the same problem, plus so many roundings: far from what
# rounding in another order can do, and close enough that a misplaced batch row or step cannot hide. Whether a provider is as
# accurate as torch (twice its largest error) is another question, which the table of errors answers.
TIMES_TORCH = 8.0
ROUNDINGS = 16.0
ROUNDINGS_ALONE = 64.0  # where torch itself cannot compute it


def error(result: Tensor, true: Tensor) -> Error:
    """Largest and RMS error in units of the largest true value; infinite where the shapes differ or the result has a NaN."""
    if result.shape != true.shape:
        return Error(math.inf, math.inf)
    if true.numel() == 0:
        return Error(0.0, 0.0)
    difference = (result.double() - true) / (true.abs().max().item() or 1.0)
    if not difference.isfinite().all():
        return Error(math.inf, math.inf)
    return Error(difference.abs().max().item(), difference.square().mean().sqrt().item())


@torch.no_grad()
def errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Error]:
    """`error` of every result, by name."""
    return {name: error(result, truth[name]) for name, result in results.items()}


def rounding(case: Case) -> float:
    return ROUNDING.get(case.dtype_name) or ROUNDING[case.dtype]


def why_wrong(case: Case, found: Mapping[str, Error], torchs: Mapping[str, Error] | None) -> str | None:
    """The worst offence in a sentence, or None. torchs: torch's own errors, if it could compute the case."""
    worst, reason = 1.0, None
    for name, e in found.items():
        own = torchs.get(name) if torchs else None
        limit = ROUNDINGS_ALONE * rounding(case)
        if own is not None and math.isfinite(own.max):
            limit = TIMES_TORCH * own.max + ROUNDINGS * rounding(case)
        if not e.max <= limit * worst:
            worst, beside = e.max / limit, f", torch's {own.max:.1e}" if own else ""
            reason = f"wrong: {name} is off by {e.max:.1e} of its largest true value{beside}; the limit is {limit:.1e}"
    return reason
