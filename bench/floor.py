"""The least time of one step that the roofs of a device allow: one exchange + max(tensor, memory).

Every step of a recurrence needs the h of the step before from all programs: a store, a way through the L2 cache, a load.
Besides it the recurrent product of the step runs at the rate of matrix products, or the step's data passes through memory,
whichever takes longer. Not counted: the product with the input (which can run beside the exchange), launches, and what is
saved for backward (which can be recomputed). A row's distance is its time over this floor; the floor is a model.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .cases import Case

# Where none was measured: a store, its way through the L2 cache of an H100, a load.
ASSUMED_EXCHANGE_US = 0.55
# All of W_hh in one multiprocessor: nothing leaves it. The latency of one step inside it, assumed.
LOCAL_EXCHANGE_US = 0.3
SHARED_MEMORY_BYTES = 227 * 1024

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Roofs:
    """What a device can do at most.

    copy_bytes_per_s: both directions added. flops_per_s: of matrix products, by dtype ("float32 tf32", "float32 ieee", ...).
    exchange_us: one store, seen and loaded by another program; None where it was not measured.
    """

    copy_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    exchange_us: float | None


@dataclass(frozen=True)
class Floor:
    """Microseconds per step, and its parts."""

    us_per_step: float
    exchange_us: float
    tensor_us: float
    memory_us: float
    roofs: str  # where the parts come from

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def floor(case: Case, roofs: Roofs) -> Floor | None:
    """The floor of a case, or None where no rate of its products is known.

    A stack of layers is counted as a wavefront: one exchange a step for all of them. Backward is a recurrence of its own, of
    twice the product (dh and, per step, its share of dW_hh).
    """
    rate = roofs.flops_per_s.get(case.dtype_name)
    if rate is None:
        return None
    size = _BYTES[case.dtype]
    passes = 3 if case.mode == "train" else 1
    recurrences = 2 if case.mode == "train" else 1
    H, B = case.hidden_size, case.batch
    flops = 8.0 * H * case.output_size * B * case.directions * case.layers
    tensor_us = flops * passes / rate * 1e6
    # x in and y out in every step, weights once; backward reads x, y, dy and writes dx.
    rows = B * (case.input_size + case.output_size * case.directions) * size
    weights = 4.0 * H * (case.input_size + case.output_size) * case.directions * size
    weights += 4.0 * H * (case.output_size * (case.directions + 1)) * case.directions * (case.layers - 1) * size
    memory_us = (rows + weights / case.length) * passes / roofs.copy_bytes_per_s * 1e6
    if case.length == 1:
        exchange, source = 0.0, "no exchange: one step"
    elif 4 * H * case.output_size * size <= SHARED_MEMORY_BYTES:
        exchange, source = LOCAL_EXCHANGE_US, f"exchange assumed: {LOCAL_EXCHANGE_US} us within one multiprocessor"
    elif roofs.exchange_us is not None:
        exchange, source = roofs.exchange_us, "exchange measured, between two programs"
    else:
        exchange, source = ASSUMED_EXCHANGE_US, "exchange assumed"
    exchange *= recurrences
    return Floor(exchange + max(tensor_us, memory_us), exchange, tensor_us, memory_us, source)


def from_rows(rows: list[Mapping[str, Any]], device: str) -> Roofs | None:
    """The roofs of a device from its good rows of kind "roof", later rows first; None where there are none."""
    values: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "roof" and row["status"] == "ok" and row["device"]["name"] == device:
            values |= row["values"] or {}
    copy = values.get("copy_bytes_per_s")
    if copy is None:
        return None
    prefix, suffix = "gemm_", "_flops_per_s"
    rates = {
        name[len(prefix) : -len(suffix)].replace("_", " "): value
        for name, value in values.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }
    return Roofs(copy, rates, values.get("exchange_us"))
