"""Errors of the fused cell, forward and every gradient, against the float64 reference, beside torch's own cell.

Every error is divided by the largest true value of its tensor. Each shape is judged as the test suite judges, by
`tolerance`: largest and RMS error beside those of torch.nn.LSTMCell in the same dtype and on the same device; in TF32 beside
those of plain PyTorch, its products as a tensor core takes them.

The floors are wider in float64 alone. There the reference rounds as much as the results it judges, and in the same places as
torch's cell, which therefore looks better than it is. The test suite judges float64 against numpy's long double, which not
every platform has and which is too slow for the shapes of a GPU. The faults to find here, such as a sum or product in float32,
are off by 1e8 ulp.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lstm_triton import environment, tolerance
from lstm_triton.tolerance import Errors

QUANTITIES = ("h", "c", "dx", "dh", "dc", "dW_ih", "dW_hh", "db_ih", "db_hh")
FLOAT64_FLOORS = 16  # times those of `tolerance`

# (B, I, H, scale of the inputs): none a multiple of a tile; inputs of scale 4 saturate the gates.
SMALL_SHAPES = ((1, 5, 9, 1.0), (17, 20, 21, 1.0), (3, 33, 17, 4.0))  # a few seconds in the interpreter
LARGE_SHAPES = ((37, 200, 500, 1.0), (130, 1000, 333, 4.0))


@dataclass(frozen=True)
class Row:
    """One quantity in one dtype, over all shapes: largest and RMS error of this package and of torch."""

    dtype: str
    quantity: str
    max_error: float
    rms_error: float
    torch_max_error: float
    torch_rms_error: float
    failures: tuple[str, ...]  # the shapes that missed the bar


@dataclass(frozen=True)
class Report:
    """The result of a check: the device's label, the number of shapes, and a row for each quantity and dtype."""

    label: str
    shapes: int
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not any(row.failures for row in self.rows)

    def to_json(self) -> str:
        return json.dumps({"label": self.label, "shapes": self.shapes, "rows": [asdict(row) for row in self.rows]})

    @staticmethod
    def from_json(text: str) -> "Report":
        data = json.loads(text)
        rows = (Row(**{**row, "failures": tuple(row["failures"])}) for row in data["rows"])
        return Report(data["label"], data["shapes"], tuple(rows))


class CheckUnavailable(RuntimeError):
    """The check cannot run on this machine. The message says why."""


def run(device: str = "auto", seed: int = 0) -> Report:
    """Check the kernels on the GPU, or on the CPU in Triton's interpreter.

    The interpreter must be on before Triton is imported, so without a GPU the check runs in a process of its own.
    Raises CheckUnavailable where neither is possible.
    """
    reason = environment.why_no_triton_gpu()
    if device == "cuda" and reason is not None:
        raise CheckUnavailable(reason)
    if device != "cpu" and reason is None:
        return run_here("cuda", f"Triton on {environment.device_label()}", seed)
    for module, version in (("triton", environment.triton_version()), ("numpy", _numpy_version())):
        if version is None:
            raise CheckUnavailable(f"{module} is not installed; Triton's interpreter needs it")
    command = [sys.executable, "-m", "lstm_triton.check", "--interpreter", "--seed", str(seed)]
    # One thread: the tensors are tiny, and idle threads that wait for each other are slow where cores are shared.
    environ = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the check in Triton's interpreter failed:\n{done.stderr.strip()}")
    return Report.from_json(done.stdout.splitlines()[-1])


def run_here(device: str, label: str, seed: int = 0) -> Report:
    """Run the check on `device`, in this process."""
    kinds = {
        "float32": (torch.float32, "ieee"),
        "tf32": (torch.float32, "tf32"),
        "bfloat16": (torch.bfloat16, "ieee"),
        "float16": (torch.float16, "ieee"),
        "float64": (torch.float64, "ieee"),
    }
    if device == "cpu":  # a CPU has no TF32
        del kinds["tf32"]
    from lstm_triton.kernels.device import fp32_precision

    shapes = SMALL_SHAPES + (() if device == "cpu" else LARGE_SHAPES)
    rows: list[Row] = []
    for name, (dtype, precision) in kinds.items():
        # The setting holds for this cell, and for torch's where that is the yardstick.
        with fp32_precision(torch.backends.cuda.matmul, precision):
            rows += _check_dtype(name, dtype, device, shapes, seed)
    return Report(label, len(shapes), tuple(rows))


def table(report: Report) -> str:
    """Return the report as two tables, of largest and RMS errors, with entries 'this package / torch'."""
    dtypes = list(dict.fromkeys(row.dtype for row in report.rows))
    lines = [f"Fused cell against the float64 reference · {report.label}"]
    for title, ours, theirs in (("max", "max_error", "torch_max_error"), ("RMS", "rms_error", "torch_rms_error")):
        lines += ["", f"{title + ' error':<10}" + "".join(f"{dtype:>17}" for dtype in dtypes)]
        for quantity in QUANTITIES:
            cells = []
            for dtype in dtypes:
                row = next(r for r in report.rows if (r.dtype, r.quantity) == (dtype, quantity))
                cells.append(f"{getattr(row, ours):>9.1e}/{getattr(row, theirs):.1e}")
            lines.append(f"{quantity:<10}" + "".join(f"{cell:>17}" for cell in cells))
    lines += ["", "Each entry: this package / torch.nn.LSTMCell, relative to the largest true value."]
    if "tf32" in dtypes:
        lines.append(
            "For tf32 plain PyTorch, its products as a tensor core takes them, stands in for torch.nn.LSTMCell."
        )
    for row in report.rows:
        lines += [f"FAILED {row.dtype} {row.quantity}: {failure}" for failure in row.failures]
    lines.append(f"{'Passed' if report.passed else 'FAILED'}: {bar(report)}.")
    return "\n".join(lines)


def bar(report: Report) -> str:
    """Describe the limits of the errors in words."""
    rule = tolerance
    return (
        f"at most {rule.MAX_FACTOR:g} times torch's largest error + {rule.MAX_FLOOR_ULPS:g} ulp and "
        f"{rule.RMS_FACTOR:g} times its RMS error + {rule.RMS_FLOOR_ULPS:g} ulp and chance "
        f"(float64: {FLOAT64_FLOORS * rule.MAX_FLOOR_ULPS:g} and {FLOAT64_FLOORS * rule.RMS_FLOOR_ULPS:g} ulp), "
        f"for each of {report.shapes} shapes"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit code 0 when every bar is met, 1 when one is missed, 2 when the check cannot run here."""
    parser = argparse.ArgumentParser(prog="lstm-triton check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interpreter", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.interpreter:
        print(run_here("cpu", "Triton interpreter on the CPU", options.seed).to_json())
        return 0
    try:
        report = run(options.device, options.seed)
    except CheckUnavailable as error:
        print(f"lstm-triton check: cannot run here: {error}", file=sys.stderr)
        return 2
    print(environment.summary(torch.device("cpu") if options.device == "cpu" else None))
    print(table(report))
    return 0 if report.passed else 1


def _numpy_version() -> str | None:
    try:
        import numpy
    except ImportError:
        return None
    return numpy.__version__


def _check_dtype(name: str, dtype: torch.dtype, device: str, shapes: Sequence[tuple], seed: int) -> list[Row]:
    from lstm_triton import functional

    def fused(x, h, c, w_ih, w_hh, b_ih, b_hh):
        return functional.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh, backend="triton")

    yardstick = _tf32_cell if name == "tf32" else _torch_cell
    floors = FLOAT64_FLOORS if dtype == torch.float64 else 1
    ours: dict[str, list[Errors]] = {q: [] for q in QUANTITIES}
    torchs: dict[str, list[Errors]] = {q: [] for q in QUANTITIES}
    failures: dict[str, list[str]] = {q: [] for q in QUANTITIES}
    for case, (B, I, H, scale) in enumerate(shapes):
        problem = _problem(B, I, H, scale, dtype, seed + case)
        found = _errors(fused, problem, device)
        theirs = [_errors(yardstick, neighbour, device) for neighbour in tolerance.neighbours(problem)]
        for quantity, error, *torch_errors in zip(QUANTITIES, found, *theirs):
            for missed in tolerance.misses(error, tolerance.worst(torch_errors), dtype, floors):
                failures[quantity].append(f"B={B} I={I} H={H} x{scale:g}: {missed}")
            ours[quantity].append(error)
            torchs[quantity].append(torch_errors[0])
    return [Row(name, q, *_over_all(ours[q]), *_over_all(torchs[q]), tuple(failures[q])) for q in QUANTITIES]


def _over_all(errors: Sequence[Errors]) -> tuple[float, float]:
    """Return largest and RMS error over tensors of different sizes."""
    n = sum(e.n for e in errors)
    return max(e.largest for e in errors), math.sqrt(sum(e.n * e.rms**2 for e in errors) / n)


def _problem(B: int, I: int, H: int, scale: float, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Draw inputs x, h, c, W_ih, W_hh, b_ih, b_hh and cotangents of h and c."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    w = 1 / math.sqrt(H)
    states = [draw(B, I, size=scale), draw(B, H, size=scale), draw(B, H, size=scale)]
    weights = [draw(4 * H, I, size=w), draw(4 * H, H, size=w), draw(4 * H, size=w), draw(4 * H, size=w)]
    return [*states, *weights, draw(B, H), draw(B, H)]


def _errors(cell: Any, problem: Sequence[Any], device: str) -> list[Errors]:
    """Return the errors of h, c and the gradient of every input."""
    from lstm_triton import reference

    truth = _results(reference.lstm_cell, problem, torch.float64, "cpu")
    results = _results(cell, problem, problem[0].dtype, device)
    return [Errors.of(result - true, true) for result, true in zip(results, truth)]


def _results(cell: Any, problem: Sequence[Any], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return h, c and the gradient of every input, in float64 on the CPU."""
    tensors = [t.to(device, dtype, copy=True) for t in problem]
    leaves, cotangents = [t.requires_grad_() for t in tensors[:-2]], tensors[-2:]
    h, c = cell(*leaves)
    gradients = torch.autograd.grad((h, c), leaves, cotangents)
    return [t.detach().cpu().double() for t in (h, c, *gradients)]


def _torch_cell(x, h, c, w_ih, w_hh, b_ih, b_hh):
    cell = torch.nn.LSTMCell(x.shape[1], h.shape[1], device=x.device, dtype=x.dtype)
    parameters = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
    return torch.func.functional_call(cell, parameters, (x, (h, c)))


def _tf32_cell(*tensors):
    from lstm_triton import reference

    with tolerance.Tf32Products():
        return reference.lstm_cell(*tensors)


if __name__ == "__main__":
    sys.exit(main())
