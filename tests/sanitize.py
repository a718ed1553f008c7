"""The kernels under NVIDIA's compute-sanitizer: `make sanitize`.

`python tests/sanitize.py [tool ...]` runs the cases below once under each tool, and exits with 1 if any reports something,
with 2 where it cannot run. `--cases` runs them without a tool, on the GPU or in Triton's interpreter.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from support import layers, segmented
from support.problems import cells, readouts
from torch import Tensor

from lstm_triton import LSTM, RecurrentCell
from lstm_triton.cells import catalogue
from lstm_triton.kernels import interpreter

TOOLS = {
    "memcheck": "accesses out of bounds or misaligned",
    "racecheck": "hazards in shared memory",
    "initcheck": "reads of memory that nothing has written",
    "synccheck": "invalid barriers",
}
# Only this package's kernels, and neither the CUDA calls by which torch probes nor the compilers that Triton starts.
OPTIONS = (
    "--kernel-name kns=_lstm_ --kernel-name kns=_readout_"
    " --report-api-errors no --target-processes application-only --error-exitcode 1"
).split()

Results = Sequence[Tensor | None]


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Results]]]:
    """A name and what to run: small, since a tool slows a kernel down a hundredfold, with edges inside every tile."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    for dtype in (float32, bfloat16):
        for shape in ((3, 7, 19), (17, 33, 20)):
            cell = cells.draw(*shape, dtype, device=device)
            yield f"cell {shape} {dtype}", lambda cell=cell: cells.by_kernels(cell)
        for readout_shape in ((5, 19, 37), (3, 20, 1500)):
            readout = readouts.draw(*readout_shape, dtype, device=device)
            yield f"readout {readout_shape} {dtype}", lambda readout=readout: readouts.by_kernels(readout)
    every = dict(resets=True, reset_state="stored", lengths=True, cells=True)
    # T, B, I, H and directions. 70 units are more than one program holds, so that several wait for one another.
    wide, large = (70, 150) if interpreter.programs_can_wait() else (35, 35)
    # Between launches the c of bfloat16 is float32: these kernels are not compiled for the executor as well.
    by_steps = (float32, bfloat16) if device.type == "cuda" else (float32,)
    for shape, D, dtype, backend, options in (
        ((3, 3, 5, 19), 1, bfloat16, "triton", {}),
        ((3, 35, 5, large), 1, bfloat16, "triton", {}),
        ((3, 3, 5, wide), 2, bfloat16, "triton", every),
        ((3, 3, 5, wide), 1, float32, "triton", {"precision": "tf32"}),
        ((3, 3, 5, 12), 1, float32, "triton", {}),
        *(((3, 3, 5, 19), 2, dtype, "triton-stepwise", every) for dtype in by_steps),
    ):
        layer = layers.draw(*shape, D, dtype, device=device, **options)
        name = f"layer {shape}, {D} direction(s), {dtype}, {backend}{', segments' if options is every else ''}"
        yield name, lambda layer=layer, backend=backend: layers.by_kernels(layer, backend)
    lstm = LSTM(5, 19, 2, dropout=0.5, backend="triton", device=device)
    yield "dropout, second derivatives", lambda: _second_derivatives(lstm, torch.randn(3, 3, 5, device=device))
    for other in (catalogue.slstm, catalogue.zoneout()):
        case = segmented.Case(T=3, B=3, I=5, H=40, dtype=bfloat16, cell=other)
        drawn = segmented.draw(case, device)
        yield f"layer of {other}", lambda case=case, drawn=drawn: segmented.results(case, drawn, "triton")
    one = RecurrentCell(catalogue.zoneout(), 5, 19, backend="triton", device=device)
    yield f"one step of {one.cell}", lambda: _second_derivatives(one, torch.randn(3, 5, device=device))


def _second_derivatives(lstm: torch.nn.Module, x: Tensor) -> Results:
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
    return gradient, *torch.autograd.grad(gradient.square().sum(), [x, *lstm.parameters()], allow_unused=True)


def run_cases(device: torch.device) -> None:
    for name, run in cases(device):
        print(name, flush=True)
        # Whether the values are right is for the suite to say; what is not written at all is likely to show here.
        assert all(t.isfinite().all() for t in run() if t is not None), f"{name}: results that are not finite"


def find_sanitizer() -> str | None:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(toolkit))


def main(arguments: Sequence[str]) -> int:
    if arguments == ["--cases"]:
        run_cases(torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"))
        return 0
    unknown, sanitizer, why_not = [argument for argument in arguments if argument not in TOOLS], find_sanitizer(), None
    if unknown:
        why_not = f"{unknown[0]} is none of {', '.join(TOOLS)}"
    elif not torch.cuda.is_available():
        why_not = "no NVIDIA GPU here"
    elif sanitizer is None:
        why_not = "no compute-sanitizer in PATH or CUDA_HOME/bin; it is part of the CUDA toolkit"
    if why_not:
        print(f"make sanitize: {why_not}", file=sys.stderr)
        return 2
    # torch's caching allocator would hide from the tools where a tensor ends, and that it is new.
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    failed = []
    for tool in arguments or TOOLS:
        print(f"{tool}: {TOOLS[tool]}", flush=True)
        command = [sanitizer, "--tool", tool, *OPTIONS, sys.executable, __file__, "--cases"]
        if subprocess.run(command, env=environ).returncode != 0:
            failed.append(tool)
    print(f"make sanitize: {', '.join(failed)} failed" if failed else "make sanitize: nothing found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
