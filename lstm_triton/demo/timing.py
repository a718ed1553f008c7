"""A short comparison on this machine, by the benchmark: this package's LSTM and cell and torch's, over the same sequence."""

from collections.abc import Iterator
from itertools import product

import torch

from lstm_triton import LSTM, explain, timing
from lstm_triton.bench import device as devices
from lstm_triton.bench import measure as bench
from lstm_triton.bench import run
from lstm_triton.bench.cases import MODES, Case, Task
from lstm_triton.bench.providers import CUDNN, OURS, TORCH_CELL
from lstm_triton.bench.rows import Row

PROVIDERS = {"layer": (OURS, CUDNN), "loop": (OURS, TORCH_CELL)}  # of the whole sequence, and called step by step
_ON_CPU = "On this CPU lstm_triton calls torch's own kernels, so the two should differ by noise alone. "
_ON_CPU += "These are CPU times: they say nothing about the speed of either on a GPU."


def measure(device: torch.device, seconds: float, batch: int = 32, size: int = 256, length: int = 32) -> Iterator[str]:
    """Compare a sequence of `length` steps with float64, then time it in turns, for about `seconds`: what was found, in words.

    All have the same weights, and float32 products at full precision. A result that is wrong has no time.
    """
    gpu, threads = device.type == "cuda", torch.get_num_threads()
    on = torch.cuda.get_device_name(device) if gpu else f"CPU, {threads} thread{'s' * (threads > 1)}"
    yield f'Time per timestep, median · {on} · "step by step": Python calls the cells; else the sequence whole'
    each, maker = seconds / 8, devices.RowMaker(device, "lstm-triton demo", "demo")
    context = bench.Context(device, maker, timing.Clock(device), each)
    for mode, (form, providers) in product(MODES, PROVIDERS.items()):
        case = Case("demo", size, batch, length, form, dtype="float32", precision="ieee", mode=mode)  # type: ignore[arg-type]
        rows: list[Row] = []
        task = Task("demo", case, providers=providers)
        bench.measure(task, context, rows.append)
        yield run.summary(task, rows)
    yield f"torch.nn.LSTM is cuDNN. {explain(LSTM(8, 8, device=device), steps=length)}" if gpu else _ON_CPU
