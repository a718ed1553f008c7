"""Timing: interleaved and shuffled rounds, CUDA events on a GPU and the host's clock beside them."""

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from . import stats

Call = Callable[[], Any]
K = TypeVar("K", bound=Hashable)

LEAST_SAMPLES, MOST_SAMPLES = 10, 200
SETTLED = 0.01  # half-width of the median's confidence interval, relative to it, at which sampling may stop
MOST_CALLS = 2000  # in one sample


class Clock(Protocol):
    """Times n calls. name goes into the rows; sample_seconds is how long a sample should last."""

    @property
    def name(self) -> str: ...

    @property
    def l2(self) -> str | None: ...

    @property
    def sample_seconds(self) -> float: ...

    def sample(self, call: Call, n: int) -> tuple[float, float]:
        """(microseconds per call on the device, microseconds per call by the host until the device is done)."""
        ...


class HostClock:
    """Where results are there when a call returns: a CPU."""

    name = "host"
    l2 = None
    sample_seconds = 5e-3

    def sample(self, call: Call, n: int) -> tuple[float, float]:
        begin = time.perf_counter()
        for _ in range(n):
            call()
        elapsed = (time.perf_counter() - begin) * 1e6 / n
        return elapsed, elapsed


class CudaClock:
    """CUDA events around the calls, and the host's clock until the device is done.

    Without flushing, a call finds in the L2 cache what the one before left there, as in a training loop. With it, a buffer
    larger than the cache is written before each call, outside of its events.
    """

    name = "cuda events"
    sample_seconds = 2e-3

    def __init__(self, device: torch.device, flush: bool = False, events: Any = None) -> None:
        self._new_event = events or (lambda: torch.cuda.Event(enable_timing=True))
        self._synchronize = lambda: torch.cuda.synchronize(device)
        self._buffer = None
        self.l2 = "flushed" if flush else "warm"
        if flush:
            size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**27
            self._buffer = torch.empty(2 * size, dtype=torch.int8, device=device)

    def sample(self, call: Call, n: int) -> tuple[float, float]:
        if self._buffer is not None:
            return self._flushed(call, n)
        begin, end = self._new_event(), self._new_event()
        self._synchronize()
        start = time.perf_counter()
        begin.record()
        for _ in range(n):
            call()
        end.record()
        self._synchronize()
        wall = (time.perf_counter() - start) * 1e6 / n
        return begin.elapsed_time(end) * 1e3 / n, wall

    def _flushed(self, call: Call, n: int) -> tuple[float, float]:
        assert self._buffer is not None
        total = wall = 0.0
        for _ in range(n):
            self._buffer.zero_()
            begin, end = self._new_event(), self._new_event()
            self._synchronize()
            start = time.perf_counter()
            begin.record()
            call()
            end.record()
            self._synchronize()
            wall += (time.perf_counter() - start) * 1e6
            total += begin.elapsed_time(end) * 1e3
        return total / n, wall / n


def clock(device: torch.device, flush: bool) -> "CudaClock | HostClock":
    return CudaClock(device, flush) if device.type == "cuda" else HostClock()


@dataclass
class Samples:
    """Microseconds per call, one value for each sample of `calls` calls."""

    calls: int
    device_us: list[float] = field(default_factory=list)
    wall_us: list[float] = field(default_factory=list)

    def to_json(self, steps: int, clock: Clock) -> dict[str, Any]:
        """The "timing" of a row; steps: of the sequence that one call runs through."""
        p20, p50, p80 = (stats.percentile(self.device_us, p) for p in (20, 50, 80))
        interval = stats.median_interval(self.device_us)
        return {
            "p20_us": p20,
            "p50_us": p50,
            "p80_us": p80,
            "us_per_step": p50 / steps,
            "wall_p50_us": stats.percentile(self.wall_us, 50),
            "ci_low_us": interval.low,
            "ci_high_us": interval.high,
            "confidence": round(interval.confidence, 4),
            "samples": len(self.device_us),
            "calls_per_sample": self.calls,
            "clock": clock.name,
        }


class Failed(RuntimeError):
    """A call raised while it was timed; `key` says whose, the cause says what."""

    def __init__(self, key: Hashable) -> None:
        super().__init__(str(key))
        self.key = key


def interleaved(calls: Mapping[K, Call], clock: Clock, seconds: float, seed: int = 0) -> dict[K, Samples]:
    """Sample all calls in turn, in a new random order each round, for about `seconds` each.

    Sampling ends when every median is settled, or time is up; each call has at least LEAST_SAMPLES samples, unless that would
    take ten times as long. Raises Failed from whatever a call raises.
    """
    generator = random.Random(seed)
    samples = {key: Samples(_calls_per_sample(key, call, clock)) for key, call in calls.items()}
    order = list(calls)
    begin = time.perf_counter()
    budget = seconds * len(order)
    while order:
        generator.shuffle(order)
        for key in order:
            try:
                device_us, wall_us = clock.sample(calls[key], samples[key].calls)
            except Exception as error:
                raise Failed(key) from error
            samples[key].device_us.append(device_us)
            samples[key].wall_us.append(wall_us)
        rounds = len(samples[order[0]].device_us)
        elapsed = time.perf_counter() - begin
        settled = all(stats.is_settled(s.device_us, SETTLED) for s in samples.values())
        if rounds >= MOST_SAMPLES or (rounds >= LEAST_SAMPLES and (settled or elapsed >= budget)):
            break
        if rounds >= 3 and elapsed >= 10 * budget:
            break
    return samples


def _calls_per_sample(key: Hashable, call: Call, clock: Clock) -> int:
    """Warm up, and find how many calls make a sample long enough for the clock."""
    try:
        clock.sample(call, 1)  # compiles, allocates
        _, once = clock.sample(call, 1)
        n = max(1, min(MOST_CALLS, math.ceil(clock.sample_seconds * 1e6 / max(once, 1e-3))))
        if n > 1:  # one call alone waits for its own end: many in a row are faster
            _, each = clock.sample(call, n)
            n = max(1, min(MOST_CALLS, math.ceil(clock.sample_seconds * 1e6 / max(each, 1e-3))))
        return n
    except Exception as error:
        raise Failed(key) from error


def graphed(call: Call) -> tuple[Call, Any]:
    """A CUDA graph of a call: the function that replays it, and what the call returned, which every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = call()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
    return graph.replay, result
