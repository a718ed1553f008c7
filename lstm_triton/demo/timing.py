"""A short comparison on this machine, by the benchmark: this package's LSTM and cell and torch's, over the same sequence."""

from collections.abc import Iterator
from itertools import product

import torch

from lstm_triton import LSTM, explain, timing
from lstm_triton.bench import measure as bench
from lstm_triton.bench.cases import MODES, Case, Task
from lstm_triton.bench.device import RowMaker
from lstm_triton.bench.providers import CUDNN, OURS, TORCH_CELL
from lstm_triton.bench.rows import Row, summary

PROVIDERS = {"layer": (OURS, CUDNN), "loop": (OURS, TORCH_CELL)}  # of the whole sequence, and called step by step
_ON_CPU = "On a CPU both are torch's own kernels, which differ by noise alone, and say nothing about speed on a GPU."


def measure(device: torch.device, rows: list[Row], seconds: float, batch=32, size=256, length=32) -> Iterator[str]:
    """Compare a sequence of `length` steps with float64, then time it in turns, for about `seconds`: what was found, in words.

    All have the same weights, and float32 products at full precision. A wrong result has no time. `rows` receives the rows.
    """
    gpu, threads = device.type == "cuda", torch.get_num_threads()
    on = torch.cuda.get_device_name(device) if gpu else f"CPU, {threads} thread{'s' * (threads > 1)}"
    yield f'Time per timestep, median · {on} · "loop": Python calls the cells step by step; else the sequence whole'
    context = bench.Context(RowMaker(device, "lstm-triton demo", "demo"), timing.Clock(device), seconds / 8)
    for mode, (form, providers) in product(MODES, PROVIDERS.items()):
        case = Case("demo", size, batch, length, form, dtype="float32", precision="ieee", mode=mode)  # type: ignore[arg-type]
        task, first = Task("demo", case, providers=providers), len(rows)
        bench.measure(task, context, rows.append)
        yield summary(rows[first:])
    yield f"torch.nn.LSTM is cuDNN. {explain(LSTM(8, 8, device=device), steps=length)}" if gpu else _ON_CPU
