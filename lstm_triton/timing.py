"""Timing, for `lstm-triton tune` and the benchmark: interleaved and shuffled rounds, CUDA events and the host's clock."""

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Call = Callable[[], Any]
K = TypeVar("K", bound=Hashable)

LEAST_SAMPLES, MOST_SAMPLES = 10, 200
SETTLED = 0.01  # half-width of the median's confidence interval, relative to it, at which sampling may stop
MOST_CALLS = 2000  # in one sample
CONFIDENCE = 0.95


class Clock:
    """CUDA events around the calls, and the host's clock until the device is done; on a CPU, or with `host`, the host's alone.

    Without flushing, a call finds in the L2 cache what the one before left there, as in a training loop. With it, a buffer
    larger than the cache is written before each call, outside of its events.
    """

    def __init__(self, device: torch.device, flush: bool = False, host: bool = False) -> None:
        gpu = device.type == "cuda"
        self._events, self._buffer = gpu and not host, None
        self._synchronize = (lambda: torch.cuda.synchronize(device)) if gpu else lambda: None
        self.name, self.sample_seconds = ("cuda events", 2e-3) if self._events else ("host", 5e-3)
        self.l2 = ("flushed" if flush else "warm") if self._events else None
        if self._events and flush:
            size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**27
            self._buffer = torch.empty(2 * size, dtype=torch.int8, device=device)

    def sample(self, call: Call, n: int) -> tuple[float, float]:
        """Return the microseconds per call of n calls, on the device and by the host until the device is done."""
        if self._buffer is None:
            return self._between_events(call, n)
        found = []
        for _ in range(n):
            self._buffer.zero_()
            found.append(self._between_events(call, 1))
        return sum(d for d, _ in found) / n, sum(w for _, w in found) / n

    def _between_events(self, call: Call, n: int) -> tuple[float, float]:
        self._synchronize()
        start = time.perf_counter()
        if not self._events:  # on a GPU: what a call costs before the device has done it
            for _ in range(n):
                call()
            elapsed = (time.perf_counter() - start) * 1e6 / n
            return elapsed, elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(n):
            call()
        end.record()
        self._synchronize()
        return begin.elapsed_time(end) * 1e3 / n, (time.perf_counter() - start) * 1e6 / n


def median_us(call: Call, clock: Clock, samples: int = 20, calls: int = 1) -> float:
    """Return the median microseconds of a call, without the first two samples, which compile and allocate."""
    return statistics.median([clock.sample(call, calls)[0] for _ in range(samples + 2)][2:])


@dataclass
class Samples:
    """Microseconds per call, one value for each sample of `calls` calls."""

    calls: int
    device_us: list[float] = field(default_factory=list)
    wall_us: list[float] = field(default_factory=list)


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return the narrowest interval between ranked samples k and n + 1 - k that holds the true median with this confidence.

    Each sample lies below the median with probability 1/2, so the probability that at most k - 1 do is binomial. With too few
    samples (fewer than six for 0.95) no interval reaches it: from the least to the largest, with the confidence that has.
    """
    ranked, n = sorted(values), len(values)
    best, reached, outside = 1, 0.0, 0.0
    for k in range(1, n // 2 + 1):
        outside += math.comb(n, k - 1) / 2**n  # fewer than k samples below the median
        if k > 1 and 1 - 2 * outside < confidence:
            break
        best, reached = k, 1 - 2 * outside
    return ranked[best - 1], ranked[n - best], reached


def is_settled(values: Sequence[float]) -> bool:
    """Return whether the median is known to SETTLED at CONFIDENCE."""
    low, high, confidence = median_interval(values)
    return confidence >= CONFIDENCE and (high - low) / 2 <= SETTLED * statistics.median(values)


class Failed(RuntimeError):
    """A call raised while it was timed. `key` names the call; the cause is its error."""

    def __init__(self, key: Hashable) -> None:
        super().__init__(str(key))
        self.key: Any = key


def interleaved(
    calls: Mapping[K, Call],
    clock: Clock,
    seconds: float,
    turn: Callable[[K], None] = lambda key: None,
    after: Callable[[Mapping[K, Samples]], None] = lambda found: None,
) -> dict[K, Samples]:
    """Sample all calls in turn, in a new random order each round, for about `seconds` each.

    turn: is told whose turn it is; after: what there is after each round.

    Sampling ends when every median is settled, or time is up; each call has at least LEAST_SAMPLES samples, unless that would
    take ten times as long. Raises Failed from whatever a call raises.
    """
    generator, order = random.Random(0), list(calls)
    found: dict[K, Samples] = {}
    key: Any = None
    try:
        for key in order:
            turn(key)
            found[key] = Samples(_calls_per_sample(calls[key], clock))
        begin, budget = time.perf_counter(), seconds * len(order)
        for rounds in range(1, MOST_SAMPLES + 1):
            generator.shuffle(order)
            for key in order:
                turn(key)
                device_us, wall_us = clock.sample(calls[key], found[key].calls)
                found[key].device_us.append(device_us)
                found[key].wall_us.append(wall_us)
            after(found)
            elapsed = time.perf_counter() - begin
            if rounds >= 3 and elapsed >= 10 * budget:
                break
            if rounds >= LEAST_SAMPLES and (elapsed >= budget or all(is_settled(s.device_us) for s in found.values())):
                break
    except Exception as error:
        raise Failed(key) from error
    return found


def _calls_per_sample(call: Call, clock: Clock) -> int:
    """Warm up, and return how many calls make a sample long enough for the clock."""
    clock.sample(call, 1)  # compiles, allocates
    n = 1
    for _ in range(2):  # one call alone waits for its own end: many in a row are faster
        _, each_us = clock.sample(call, n)
        n = max(1, min(MOST_CALLS, math.ceil(clock.sample_seconds * 1e6 / max(each_us, 1e-3))))
        if n == 1:
            break
    return n
