"""The rule that judges all results: no worse than torch in the same dtype, both against the truth.

For every tensor of n elements, with errors taken against the truth (float64, or more for float64 results),

    largest error of ours <= 2 * largest error of torch + 2 ulp
    RMS error of ours     <= 1.25 * (1 + 3 / sqrt(2n)) * RMS error of torch + 1/4 ulp

* torch computes in the same dtype and with the same input precision of float32 products. In TF32 that is the specification in
  plain PyTorch, its products truncated as by tensor cores (`Tf32Products`), because cuBLAS and cuDNN use TF32 differently from
  size to size, from rounding to nearest to full float32. Its error is the worst on this
  problem and on a few next to it (`neighbours`), because on one problem torch is often right, or wrong, by luck. Moving the
  inputs by a few ulps redraws most roundings and keeps every cancellation; moving them by some three percent also redraws
  those of a nearly saturated 1 - sigmoid.
* Two is the project's bar. A largest error is one draw from the tail of a distribution, so no smaller factor can be asked
  of it; the RMS is what shows a systematic loss. 1.25 is room for another order of the same roundings. An RMS estimated from
  n errors has a relative standard deviation of 1 / sqrt(2n): three of these are left to chance in small tensors.
* ulp is the dtype's epsilon times the largest true value of the tensor. The floors stand for the rounding of the result
  itself, at most 1/2 ulp and 1/4 in RMS, and for the few before it; they matter where torch's error is near zero.

Nothing can be tuned per case. A result that fails has lost accuracy, or torch computed in another precision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FACTOR = 2.0
RMS_FACTOR = 1.25
MAX_FLOOR_ULPS = 2.0
RMS_FLOOR_ULPS = 0.25
NEIGHBOURS = 8


@dataclass(frozen=True)
class Errors:
    """Largest and RMS error of n elements against the truth, in units of its largest value."""

    n: int
    largest: float
    rms: float

    @staticmethod
    def of(difference: Tensor, truth: Tensor) -> "Errors":
        """Return the errors of difference = result - truth, both in float64; infinite if it holds a NaN."""
        if difference.numel() == 0:
            return Errors(0, 0.0, 0.0)
        if difference.isnan().any():
            return Errors(difference.numel(), math.inf, math.inf)
        relative = difference / (truth.abs().max().item() or 1.0)
        return Errors(relative.numel(), relative.abs().max().item(), relative.square().mean().sqrt().item())


def worst(of: Sequence[Errors]) -> Errors:
    return Errors(max(e.n for e in of), max(e.largest for e in of), max(e.rms for e in of))


def neighbours(tensors: Sequence[Tensor | None], seed: int = 0) -> list[list[Tensor | None]]:
    """Return the inputs, and NEIGHBOURS - 1 times the same moved a little (see above)."""
    generator = torch.Generator().manual_seed(seed)

    def moved(t: Tensor | None, ulps: bool) -> Tensor | None:
        if t is None:
            return None
        steps = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        steps *= 4 * torch.finfo(t.dtype).eps if ulps else 0.03
        return (t.detach().cpu().double() * (1 + steps)).to(t.dtype).to(t.device)

    return [list(tensors), *([moved(t, ulps=k % 2 == 0) for t in tensors] for k in range(NEIGHBOURS - 1))]


def misses(ours: Errors, torchs: Errors, dtype: torch.dtype, floors: float = 1.0) -> list[str]:
    """Return a sentence for each part of the rule that `ours` misses. `floors` multiplies both floors."""
    ulp = floors * torch.finfo(dtype).eps
    chance = 1 + 3 / math.sqrt(2 * max(ours.n, 1))
    return [
        f"{kind} error {error:.3g}, torch's {torch_error:.3g}, limit {limit:.3g}"
        for kind, error, torch_error, limit in (
            ("largest", ours.largest, torchs.largest, MAX_FACTOR * torchs.largest + MAX_FLOOR_ULPS * ulp),
            ("RMS", ours.rms, torchs.rms, RMS_FACTOR * chance * torchs.rms + RMS_FLOOR_ULPS * ulp),
        )
        if not error <= limit or math.isinf(error)  # NaN and infinity miss whatever torch does
    ]


class Tf32Products(torch.overrides.TorchFunctionMode):
    """`@` reads the 19 high bits of its float32 operands, as a tensor core does, and so does its backward; on any device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            return _Tf32Product.apply(*args)
        return function(*args, **(kwargs or {}))


class _Tf32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return _tf32(a).mm(_tf32(b))

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return _tf32(grad).mm(_tf32(b).t()), _tf32(a).t().mm(_tf32(grad))


def _tf32(t: Tensor) -> Tensor:
    return (t.contiguous().view(torch.int32) & -(2**13)).view(torch.float32)
