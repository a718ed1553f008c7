"""Roofs of this very device (copies, matrix products, exchanges), and the floor of a step that follows from them.
Every step of a recurrence needs the h of the step before from all programs: a store, a way through the L2 cache, a load.
Besides it the recurrent product of the step runs at the rate of matrix products, or the step's data passes through memory,
whichever takes longer: floor = one exchange + max(tensor, memory). Not counted: the product with the input (which can run
beside the exchange), launches, and what is saved for backward (which can be recomputed). The floor is a model.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lstm_triton import timing
from lstm_triton.kernels.device import fp32_precision

from .cases import GATES, Case
from .rows import Floor, Row

ASSUMED_EXCHANGE_US = 0.55  # where none was measured: a store, its way through the L2 cache of an H100, a load
LOCAL_EXCHANGE_US = 0.3  # all of W_hh in one SM: nothing leaves it. The latency of one step inside it, assumed
SHARED_MEMORY_BYTES = 227 * 1024
_STEPS = 500, 2000


def floor(case: Case, roofs: Mapping[str, float]) -> Floor | None:
    """The floor of a case by figures of the suite `roofs`, or None where no rate of its products is known. A stack of layers
    is counted as a wavefront: one exchange a step for all of them. Backward is a recurrence of its own, of twice the product
    (dh and, per step, its share of dW_hh)."""
    rate, copies = roofs.get(f"gemm_{case.dtype_name.replace(' ', '_')}_flops_per_s"), roofs.get("copy_bytes_per_s")
    if rate is None or copies is None:
        return None
    size, G = getattr(torch, case.dtype).itemsize, GATES[case.cell]
    passes, recurrences = (3, 2) if case.mode == "train" else (1, 1)
    H, R, B, D, I = case.hidden_size, case.output_size, case.batch, case.directions, case.input_size
    tensor_us = 2.0 * G * H * R * B * D * case.layers * passes / rate * 1e6
    # x in and y out in every step, weights once; backward reads x, y, dy and writes dx.
    rows = B * (I + R * D) * size
    weights = float(G) * H * D * size * (I + R + R * (D + 1) * (case.layers - 1))
    memory_us = (rows + weights / case.length) * passes / copies * 1e6
    exchange, source = ASSUMED_EXCHANGE_US, "exchange assumed"
    if case.length == 1:
        exchange, source = 0.0, "no exchange: one step"
    elif G * H * R * size <= SHARED_MEMORY_BYTES:
        exchange, source = LOCAL_EXCHANGE_US, f"exchange assumed: {LOCAL_EXCHANGE_US} us within one SM"
    elif "exchange_us" in roofs:
        exchange, source = roofs["exchange_us"], "exchange measured, between two programs"
    exchange *= recurrences
    return Floor(exchange + max(tensor_us, memory_us), exchange, tensor_us, memory_us, source)


def from_rows(rows: Iterable[Row], device: str) -> dict[str, float]:
    """Return the figures of a device's good rows of kind "roof"; later rows count."""
    of_device = (row for row in rows if (row.kind, row.status, row.device.name) == ("roof", "ok", device))
    return {name: value for row in of_device for name, value in (row.values or {}).items()}


def copy_rate(device: torch.device) -> dict[str, float]:
    """Measure bytes read plus bytes written per second, copying a buffer that no cache holds."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return {"copy_bytes_per_s": 2 * size / timing.median_us(lambda: target.copy_(source), timing.Clock(device)) * 1e6}


def gemm_rates(device: torch.device) -> dict[str, float]:
    """Measure the floating-point operations per second of torch's own square matrix products, by dtype."""
    found, on_gpu = {}, device.type == "cuda"
    matmul: Any = torch.backends.cuda.matmul
    for name in ("bfloat16", "float16", "float32_tf32", "float32_ieee") if on_gpu else ("float32_ieee",):
        dtype, _, precision = name.partition("_")
        size = (4096 if precision == "ieee" else 8192) if on_gpu else 512
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        with fp32_precision(matmul, precision or matmul.fp32_precision):
            call = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
            found[f"gemm_{name}_flops_per_s"] = 2e6 * size**3 / timing.median_us(call, timing.Clock(device))
    return found


def exchange_times(device: torch.device) -> dict[str, float]:
    """Measure, on a GPU, the microseconds of an exchange between two programs of one launch, and between as many as there are
    SMs. Each program stores a value that depends on the one it loaded before, and waits at the package's own barrier
    (kernels/grid_sync.py); that the last one is right is checked."""
    from .grid_latency import launch

    def time_of(programs: int, steps: int) -> float:
        if not (last := launch(programs, steps, device)).eq(steps).all():
            raise RuntimeError(f"the exchange lost a value: {last.tolist()} after {steps} steps")
        return timing.median_us(lambda: launch(programs, steps, device), timing.Clock(device), 10)

    sms = torch.cuda.get_device_properties(device).multi_processor_count
    few, many = _STEPS  # whose difference has no launch in it
    both = {"exchange_us": 2, f"exchange_p{sms}_us": sms}
    return {name: (time_of(n, many) - time_of(n, few)) / (many - few) for name, n in both.items()}


PARTS = {"copies": copy_rate, "matrix products": gemm_rates, "exchange": exchange_times}  # the providers of the suite
