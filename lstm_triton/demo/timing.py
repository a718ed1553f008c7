"""A short comparison on this machine: this package's LSTM and cell and torch's, over the same sequence."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lstm_triton import LSTM, explain
from lstm_triton.bench import choice, problem, rows, timing
from lstm_triton.bench.built import Built
from lstm_triton.bench.cases import Case, Mode
from lstm_triton.bench.measure import Judge
from lstm_triton.bench.precision import precision

# By the name shown: bench's provider, and whether it gets the sequence whole or step by step.
PROVIDERS: dict[str, tuple[str, Any]] = {
    "lstm_triton.LSTM": ("lstm_triton auto", "layer"),
    "lstm_triton.LSTMCell": ("lstm_triton auto", "loop"),
    "torch.nn.LSTMCell": ("torch.nn.LSTMCell", "layer"),
    "torch.nn.LSTM": ("torch.nn.LSTM", "layer"),
}
NAMES: dict[Mode, str] = {"forward": "inference", "train": "training step"}
_ON_CPU = """On this CPU lstm_triton calls torch's own kernels, so the two should differ by noise alone; the LSTMs see the whole
sequence at once. These are CPU times: they say nothing about the speed of either on a GPU."""
_ON_GPU = "torch.nn.LSTM is cuDNN. The LSTMs see the whole sequence at once; Python calls the cells step by step. "


@dataclass(frozen=True)
class Report:
    """Timings by mode and provider, and what they were taken on."""

    label: str
    note: str
    timings: dict[tuple[Mode, str], rows.Timing]


def measure(device: torch.device, seconds: float, batch: int = 32, size: int = 256, length: int = 32) -> Report:
    """Compare a sequence of `length` steps with float64, then time it in turns, for about `seconds`; raises RuntimeError
    where a result is wrong. All have the same weights, and float32 products at full precision.
    """
    clock = timing.clock(device)
    found: dict[tuple[Mode, str], rows.Timing] = {}
    for mode in NAMES:
        case = Case("demo", size, batch, length, dtype="float32", precision="ieee", mode=mode)
        with precision(case), torch.set_grad_enabled(mode == "train"):
            judge, calls = Judge(problem.make(case, device)), {}
            judge.ask(choice.provider("torch.nn.LSTM"))
            for name, (provider, form) in PROVIDERS.items():
                built = Built(choice.provider(provider), problem.make(replace(case, form=form), device))
                if reason := judge.why_wrong(judge.errors(built)):
                    raise RuntimeError(f"{name}: {reason}")
                calls[name] = built.call
            samples = timing.interleaved(calls, clock, seconds / len(NAMES) / len(calls))
        found |= {(mode, name): s.summary(length, clock.name) for name, s in samples.items()}
    threads, gpu = torch.get_num_threads(), device.type == "cuda"
    on = torch.cuda.get_device_name(device) if gpu else f"CPU, {threads} thread{'s' * (threads > 1)}"
    label = f"{on} · batch {batch}, input and hidden size {size}, {length} steps, float32 (no TF32)"
    return Report(label, _ON_GPU + explain(LSTM(8, 8, device=device), steps=32) if gpu else _ON_CPU, found)


def per_step(t: rows.Timing) -> tuple[float, float, float]:
    """Microseconds per step: the median, the 20th and the 80th percentile."""
    return t.us_per_step, t.p20_us * t.us_per_step / t.p50_us, t.p80_us * t.us_per_step / t.p50_us


def table(report: Report) -> str:
    """The timings as text."""
    head = f"{'µs, median (20 to 80%)':<24}" + "".join(f"{name:>28}" for name in NAMES.values())
    lines = [f"Time per timestep · {report.label}", head]
    for name in PROVIDERS:
        cells = ("{:.1f} ({:.1f} to {:.1f})".format(*per_step(report.timings[mode, name])) for mode in NAMES)
        lines.append(f"{name:<24}" + "".join(f"  {cell:>26}" for cell in cells))
    return "\n".join([*lines, report.note])
