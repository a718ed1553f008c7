"""Errors against float64, and when a provider is wrong."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .cases import Case

# Half the distance between neighbouring numbers near 1: what one rounding costs, by how products take their operands.
ROUNDING = {
    "float32 tf32": 2.0**-11,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float64": 2.0**-53,
}

# A provider is wrong beyond so many times torch's own error on the same problem, plus so many roundings: far from what
# rounding in another order can do, and close enough that a misplaced row or step cannot hide. Whether a provider is as
# accurate as torch (twice its largest error) is another question, which the table of errors answers.
TIMES_TORCH = 8.0
ROUNDINGS = 16.0
ROUNDINGS_ALONE = 64.0  # where torch itself cannot compute it


def error(result: Tensor, true: Tensor) -> dict[str, float]:
    """Largest and RMS error in units of the largest true value; infinite where the result has a NaN."""
    if result.shape != true.shape:
        return {"max": math.inf, "rms": math.inf}
    if true.numel() == 0:
        return {"max": 0.0, "rms": 0.0}
    size = true.abs().max().item() or 1.0
    difference = (result.double() - true) / size
    if not difference.isfinite().all():
        return {"max": math.inf, "rms": math.inf}
    return {"max": difference.abs().max().item(), "rms": difference.square().mean().sqrt().item()}


def errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """`error` of every result, by name."""
    with torch.no_grad():
        return {name: error(result, truth[name]) for name, result in results.items()}


def rounding(case: Case) -> float:
    return ROUNDING.get(case.dtype_name) or ROUNDING[case.dtype]


def limit(case: Case, torchs: Mapping[str, Mapping[str, float]] | None, name: str) -> float:
    """The largest error of tensor `name` that is not wrong; torchs: torch's own errors, if it could compute the case."""
    if torchs is None or name not in torchs or not math.isfinite(torchs[name]["max"]):
        return ROUNDINGS_ALONE * rounding(case)
    return TIMES_TORCH * torchs[name]["max"] + ROUNDINGS * rounding(case)


def why_wrong(
    case: Case, found: Mapping[str, Mapping[str, float]], torchs: Mapping[str, Mapping[str, float]] | None
) -> str | None:
    """The worst offence in a sentence, or None."""
    worst = None
    for name, e in found.items():
        allowed = limit(case, torchs, name)
        if not e["max"] <= allowed and (worst is None or e["max"] / allowed > worst[1]):
            worst = name, e["max"] / allowed, e["max"], allowed
    if worst is None:
        return None
    name, _, size, allowed = worst
    beside = f", torch's {torchs[name]['max']:.1e}" if torchs and name in torchs else ""
    return f"wrong: {name} is off by {size:.1e} of its largest true value{beside}; the limit is {allowed:.1e}"
