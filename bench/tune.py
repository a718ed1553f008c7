"""`--tune`: try launch configurations beside the shipped ones, and print what would be worth pasting. Nothing is changed.

Each candidate is a provider: its results are compared with float64 before it is timed in turns with the shipped
configuration, in a process of its own, as every provider's are.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lstm_triton.kernels.device import device_figures
from lstm_triton.kernels.figures import DeviceFigures

from . import run
from .candidates import PLACES, candidates
from .cases import Case, Task
from .device import UsageError
from .progress import Progress
from .rows import Row, read_all

TOGETHER = 8  # candidates that are timed in turns with one another and the shipped configuration
WORTH = 0.02  # a gain below this is noise, or not worth a number in the source


def main(options: run.Options, filters: Any) -> int:
    """Sweep; raises UsageError without a GPU."""
    if options.device == "cpu":
        raise UsageError("--tune needs an NVIDIA GPU; a CPU says nothing about launch configurations")
    device = torch.empty(0, device=options.device).device  # with its index
    tasks = [task for kernel in PLACES for task in _tasks(kernel, filters, device_figures(device))]
    options = dataclasses.replace(options, folder=options.folder / "tune", names=None, seconds=0.3, anchors=False)
    outcome = run.Runner(options, tasks, Progress(len(tasks), options.budget_s)).run()
    print(outcome.describe(options.folder, options.budget_s))
    print(table(read_all([options.folder])[0], torch.cuda.get_device_name(device)))
    return 0


def _tasks(kernel: str, filters: Any, figures: DeviceFigures) -> Iterator[Task]:
    """The problems of a sweep, each with some of its candidates and the shipped configuration, number 0."""
    shape: dict[str, Any] = dict(form="cell", length=1) if kernel.startswith("cell") else dict(length=128)
    shape["mode"] = "train" if kernel.endswith("backward") else "forward"
    dtypes = filters.dtype or ("bfloat16", "float16", "float32")
    for H, B, dtype in itertools.product((768, 512, 1024, 256, 128, 2048), (16, 64, 1, 256), dtypes):
        if filters.hidden(H) and filters.batch(B):
            case = Case(kernel, H, B, dtype=dtype, precision="tf32", **shape)
            count = len(candidates(kernel, case, figures))
            for first in range(1, count, TOGETHER):
                names = (f"tune {kernel} {k}" for k in (0, *range(first, min(first + TOGETHER, count))))
                part = dataclasses.replace(case, name=f"{kernel} {first}")
                yield Task("tune", part, providers=tuple(names))


def table(rows: Sequence[Row], gpu: str) -> str:
    """What to paste, as comments beside the numbers of the kernels' configurations: the best of each kernel and shape."""
    shipped = {row.case: row.timing for row in rows if row.timing and row.provider.endswith(" 0")}
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        if row.timing and (before := shipped.get(row.case)):
            kernel, gain = row.provider.removeprefix("tune ").rpartition(" ")[0], before.p50_us / row.timing.p50_us - 1
            shape = f"H {row.case.hidden_size}, B {row.case.batch}, {row.case.dtype_name}"
            times = f"{gain:+.1%} ({before.p50_us:.4g} -> {row.timing.p50_us:.4g} us)"
            text = f"# {kernel}, {shape}: {gpu}, {row.date[:10]}, {times}\n#   {row.backend_reason}"
            best[kernel, shape] = max(best.get((kernel, shape), (0.0, "")), (gain, text))
    worth = [text for gain, text in best.values() if gain >= WORTH]
    none = f"No candidate beats a shipped configuration by {WORTH:.0%} on {gpu}."
    return "\n".join([f"Gains over the shipped configurations, {gpu}:", *worth]) if worth else none
