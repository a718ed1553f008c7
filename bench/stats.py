"""Statistics of timings: percentiles, and a confidence interval of the median that assumes nothing of their distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the ranked values, as numpy's default."""
    ranked = sorted(values)
    position = (len(ranked) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


@dataclass(frozen=True)
class Interval:
    """The true median lies between these with this probability, if the samples are independent."""

    low: float
    high: float
    confidence: float


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The narrowest interval between ranked samples k and n + 1 - k that reaches the confidence.

    Each sample lies below the median with probability 1/2, so the probability that at most k - 1 do is binomial. With too few
    samples (fewer than six for 0.95) no interval reaches it: from the least to the largest, with the confidence that has.
    """
    ranked = sorted(values)
    n = len(ranked)
    best, reached, outside = 1, 0.0, 0.0
    for k in range(1, n // 2 + 1):
        outside += math.comb(n, k - 1) / 2**n  # fewer than k samples below the median
        if k > 1 and 1 - 2 * outside < confidence:
            break
        best, reached = k, 1 - 2 * outside
    return Interval(ranked[best - 1], ranked[n - best], reached)


def is_settled(values: Sequence[float], relative: float) -> bool:
    """Whether the median is known to this relative half-width, at CONFIDENCE."""
    if len(values) < 6:
        return False
    interval = median_interval(values)
    middle = percentile(values, 50)
    return interval.confidence >= CONFIDENCE and (interval.high - interval.low) / 2 <= relative * middle
