"""The roofs of this very device: copies, matrix products, and how long programs of one launch need to see each other's data."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from . import stats, timing
from .cases import Task

if TYPE_CHECKING:
    from .measure import Context, Emit

NAME = "this device"
_STEPS = 2000


def measure(task: Task, context: "Context", emit: "Emit", skip: Collection[tuple[str, str]]) -> None:
    """One row: copy_bytes_per_s, gemm_*_flops_per_s, and on a GPU with Triton barrier_p*_us and exchange_us."""
    from .measure import brief, reraise_fatal

    if (NAME, "eager") in skip:
        return
    values: dict[str, float] = {}
    problems: list[str] = []
    parts: list[tuple[str, Callable[..., dict[str, float]]]] = [("copy", copy_rate), ("products", gemm_rates)]
    if context.device.type == "cuda":
        parts.append(("barrier", barrier_times))
    for what, part in parts:
        context.stage(NAME, "eager", what)
        try:
            values |= part(context.device)
        except Exception as error:
            problems.append(f"{what}: {brief(error)}")
            if "copy_bytes_per_s" in values:  # keep what was found before the device may be lost
                emit(context.rows.make(task, NAME, "eager", "ok", "; ".join(problems), values=values))
                reraise_fatal(error)
                return
            reraise_fatal(error)
    if "copy_bytes_per_s" in values:
        emit(context.rows.make(task, NAME, "eager", "ok", "; ".join(problems) or None, values=values))
    else:
        emit(context.rows.make(task, NAME, "eager", "failed", "; ".join(problems)))


def _median_us(call: Callable[[], Any], device: torch.device, samples: int = 20) -> float:
    clock = timing.clock(device, flush=False)
    clock.sample(call, 2)
    return stats.percentile([clock.sample(call, 1)[0] for _ in range(samples)], 50)


def copy_rate(device: torch.device, size: int | None = None) -> dict[str, float]:
    """Bytes read plus bytes written per second, copying a buffer that no cache holds."""
    size = size or (2**30 if device.type == "cuda" else 2**26)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return {"copy_bytes_per_s": 2 * size / _median_us(lambda: target.copy_(source), device) * 1e6}


def gemm_rates(device: torch.device, n: int | None = None) -> dict[str, float]:
    """Floating-point operations per second of torch's own square matrix products, by dtype."""
    found = {}
    on_gpu = device.type == "cuda"
    kinds = (
        [("bfloat16", ""), ("float16", ""), ("float32", "tf32"), ("float32", "ieee")]
        if on_gpu
        else [("float32", "ieee")]
    )
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for dtype, precision in kinds:
        size = n or ((4096 if precision == "ieee" else 8192) if on_gpu else 512)
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        try:
            matmul.fp32_precision = precision or before
            us = _median_us(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)  # type: ignore[misc]
        finally:
            matmul.fp32_precision = before
        name = f"{dtype}_{precision}" if precision else dtype
        found[f"gemm_{name}_flops_per_s"] = 2.0 * size**3 / us * 1e6
    return found


def barrier_times(device: torch.device) -> dict[str, float]:
    """Microseconds of one barrier between P programs of one launch, and of one exchange between two.

    The barrier is the package's own (kernels/grid_sync.py). In an exchange each program stores a value that depends on the one
    it loaded before; that the last one is right is checked.
    """
    from .grid_latency import launch

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    found = {}
    for programs in sorted({2, 4, 8, 16, 32, 64, multiprocessors}):
        if programs <= multiprocessors:
            found[f"barrier_p{programs}_us"] = _per_step(launch, programs, False, device)
    found["exchange_us"] = _per_step(launch, 2, True, device)
    return found


def _per_step(launch: Callable[..., torch.Tensor], programs: int, exchange: bool, device: torch.device) -> float:
    last = launch(programs, _STEPS, exchange, device)
    if exchange and not last.eq(_STEPS).all():
        raise RuntimeError(f"the exchange lost a value: {last.tolist()} after {_STEPS} steps")
    times = [
        _median_us(lambda steps=steps: launch(programs, steps, exchange, device), device, 10)  # type: ignore[misc]
        for steps in (_STEPS // 4, _STEPS)
    ]
    return (times[1] - times[0]) / (_STEPS - _STEPS // 4)  # launches and allocations cancel
