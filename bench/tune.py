"""`--tune`: try launch configurations beside the shipped ones, and print what would be worth pasting. Nothing is changed.

Each candidate is a provider: its results are compared with float64 before it is timed in turns with the shipped
configuration, in a process of its own, as every provider's are.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

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
    tasks = [t for kernel in PLACES for t in tasks_of(kernel, filters)]
    options = dataclasses.replace(options, folder=options.folder / "tune", names=None, seconds=0.3, anchors=False)
    progress = Progress(len(tasks))
    outcome = run.Runner(options, tasks, progress).run()
    progress.close()
    print(outcome.describe(options.folder, options.budget_s))
    print(table(read_all([options.folder])[0], torch.cuda.get_device_name(torch.device(options.device))))
    return 0


def tasks_of(kernel: str, filters: Any) -> Iterator[Task]:
    """The problems of a sweep, each with some of its candidates and the shipped configuration, number 0."""
    from lstm_triton.kernels.device import device_limits

    shape: dict[str, Any] = dict(form="cell", length=1) if kernel.startswith("cell") else dict(length=128)
    shape["mode"] = "train" if kernel.endswith("backward") else "forward"
    dtypes = filters.dtype or ("bfloat16", "float16", "float32")
    for H, B, dtype in itertools.product((768, 512, 1024, 256, 128, 2048), (16, 64, 1, 256), dtypes):
        if (filters.hidden or bool)(H) and (filters.batch or bool)(B):
            case = Case(kernel, H, B, dtype=dtype, precision="tf32", **shape)
            count = len(candidates(kernel, case, device_limits(torch.empty(0, device=filters.device).device)))
            for first in range(1, count, TOGETHER):
                numbers = (0, *range(first, min(first + TOGETHER, count)))
                part = dataclasses.replace(case, name=f"{kernel} {first}")
                yield Task("tune", part, providers=tuple(f"tune {kernel} {k}" for k in numbers))


def table(rows: Sequence[Row], gpu: str) -> str:
    """What to paste, as comments beside the numbers of the kernels' configurations: the best of each kernel and shape."""
    shipped = {row.case: row for row in rows if row.timing and row.provider.endswith(" 0")}
    best: dict[tuple, tuple[float, str]] = {}
    for row in rows:
        if row.timing and row.case in shipped:
            now, before = row.timing.p50_us, shipped[row.case].timing.p50_us  # type: ignore[union-attr]
            kernel = row.provider.removeprefix("tune ").rpartition(" ")[0]
            shape = f"H {row.case.hidden_size}, B {row.case.batch}, {row.case.dtype_name}"
            text = (
                f"# {kernel}, {shape}: {gpu}, {row.date[:10]}, {before / now - 1:+.1%} ({before:.4g} -> {now:.4g} us)"
            )
            best[kernel, shape] = max(
                best.get((kernel, shape), (0.0, "")), (before / now - 1, f"{text}\n#   {row.backend_reason}")
            )
    worth = [text for gain, text in best.values() if gain >= WORTH]
    head = f"Gains over the shipped configurations, {gpu}:" if worth else ""
    return (
        "\n".join([head, *worth]) if worth else f"No candidate beats a shipped configuration by {WORTH:.0%} on {gpu}."
    )
