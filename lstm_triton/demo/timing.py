"""A short comparison on this machine: this package's LSTM and cell and torch's, over the same sequence."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lstm_triton import LSTM, LSTMCell, explain

OUR_LSTM = "lstm_triton.LSTM"
OURS = "lstm_triton.LSTMCell"
TORCH_CELL = "torch.nn.LSTMCell"
TORCH_LSTM = "torch.nn.LSTM"


@dataclass(frozen=True)
class Timing:
    """Microseconds per timestep of one provider, over interleaved rounds."""

    provider: str
    mode: str  # "inference" or "training step"
    median: float
    low: float  # 20th and
    high: float  # 80th percentile
    rounds: int


@dataclass(frozen=True)
class TimingReport:
    """Timings and what they were taken on."""

    label: str
    note: str
    rows: tuple[Timing, ...]


def measure(device: torch.device, seconds: float, batch: int = 32, size: int = 256, length: int = 32) -> TimingReport:
    """Time a sequence of `length` steps, stepped through the cells and given whole to the LSTMs, for about `seconds`.

    All hold the same weights and take float32 products at full precision. Rounds are interleaved, so that a drift
    of the machine touches all alike.
    """
    runs = {
        mode: _providers(device, batch, size, length, mode == "training step")
        for mode in ("inference", "training step")
    }
    rnn: Any = torch.backends.cudnn.rnn
    matmul: Any = torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision
    rnn.fp32_precision = matmul.fp32_precision = "ieee"
    times: dict[tuple[str, str], list[float]] = {}
    try:
        for warmup in (True, False):
            begin = time.perf_counter()
            while True:
                for mode, providers in runs.items():
                    for name, run in providers.items():
                        elapsed = _seconds(run, device)
                        if not warmup:
                            times.setdefault((mode, name), []).append(elapsed * 1e6 / length)
                if time.perf_counter() - begin >= (0.2 if warmup else 0.8) * seconds:
                    break
    finally:
        rnn.fp32_precision, matmul.fp32_precision = before
    rows = []
    for (mode, name), values in times.items():
        low, high = _percentile(values, 20), _percentile(values, 80)
        rows.append(Timing(name, mode, statistics.median(values), low, high, len(values)))
    shape = f"batch {batch}, input and hidden size {size}, {length} steps, float32 (no TF32)"
    return TimingReport(f"{_device_name(device)} · {shape}", _note(device), tuple(rows))


def table(report: TimingReport) -> str:
    """The timings as text."""
    lines = [
        f"Time per timestep · {report.label}",
        f"{'µs, median (20 to 80%)':<24}" + f"{'inference':>28}{'training step':>28}",
    ]
    for name in dict.fromkeys(row.provider for row in report.rows):
        cells = []
        for mode in ("inference", "training step"):
            row = next(r for r in report.rows if (r.provider, r.mode) == (name, mode))
            cells.append(f"{row.median:.1f} ({row.low:.1f} to {row.high:.1f})")
        lines.append(f"{name:<24}" + "".join(f"  {cell:>26}" for cell in cells))
    return "\n".join([*lines, report.note])


def _providers(device: torch.device, B: int, H: int, T: int, training: bool) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    lstm = nn.LSTM(H, H, device=device)
    cells = {OURS: LSTMCell(H, H, device=device), TORCH_CELL: nn.LSTMCell(H, H, device=device)}
    for cell in cells.values():
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    x = torch.randn(T, B, H, device=device, requires_grad=training)
    grad = torch.randn(T, B, H, device=device)
    zeros = torch.zeros(B, H, device=device)

    def steps(cell: nn.Module) -> Tensor:
        state = (zeros, zeros)
        outputs = []
        for x_t in x.unbind(0):
            state = cell(x_t, state)
            outputs.append(state[0])
        return torch.stack(outputs)

    def runner(module: nn.Module, forward: Callable[[nn.Module], Tensor]) -> Callable[[], Any]:
        module.train(training)
        if not training:
            return torch.no_grad()(lambda: forward(module))
        parameters = [x, *module.parameters()]
        return lambda: torch.autograd.grad(forward(module), parameters, grad)

    runs = {name: runner(cell, steps) for name, cell in cells.items()}
    our_lstm = LSTM(H, H, device=device)
    our_lstm.load_state_dict(lstm.state_dict())
    for name, module in ((OUR_LSTM, our_lstm), (TORCH_LSTM, lstm)):
        runs[name] = runner(module, lambda module: module(x)[0])
    return runs


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def _percentile(values: list[float], percent: int) -> float:
    ranked = sorted(values)
    return ranked[round((len(ranked) - 1) * percent / 100)]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _note(device: torch.device) -> str:
    if device.type == "cuda":
        backend = explain(LSTM(8, 8, device=device), steps=32)
        return (
            "torch.nn.LSTM is cuDNN. The LSTMs see the whole sequence at once; the cells are called step by step from Python.\n"
            f"{backend}"
        )
    return (
        "On this CPU lstm_triton calls torch's own kernels, so the two should differ by noise alone; the LSTMs see the whole "
        "sequence at once.\nThese are CPU times: they say nothing about the speed of either on a GPU."
    )
