"""The kernels under NVIDIA's compute-sanitizer: `make sanitize`.

`python tests/sanitize.py [tool ...]` runs the cases below once under each tool, and fails if any reports something, or where it
cannot run. `--cases` runs them without a tool, on the GPU or in Triton's interpreter.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from support import layers, segmented
from support.problems import cells, readouts
from torch import Tensor

from lstm_triton import LSTM, RecurrentCell
from lstm_triton.cells import catalogue

# Accesses out of bounds or misaligned, hazards in shared memory, reads of memory that nothing has written, invalid barriers.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Only this package's kernels, and neither the CUDA calls by which torch probes nor the compilers that Triton starts.
OPTIONS = (
    "--kernel-name kns=_lstm_ --kernel-name kns=_readout_"
    " --report-api-errors no --target-processes application-only --error-exitcode 1"
).split()

Results = Sequence[Tensor | None]


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Results]]]:
    """A name and what to run: small, since a tool slows a kernel down a hundredfold, with edges inside every tile."""

    def case(kind: str, shape: tuple[int, ...], *backend: str, **options: Any) -> tuple[str, Callable[[], Results]]:
        module: Any = {"cell": cells, "readout": readouts, "layer": layers}[kind]
        problem = module.draw(*shape, **options, device=device)
        return f"{kind} {shape} {backend} {options}", partial(module.by_kernels, problem, *backend)

    float32, bfloat16 = torch.float32, torch.bfloat16
    # The executor need not compile for these cases what the suite executes anyway.
    on_gpu = device.type == "cuda"
    for dtype in (float32, bfloat16) if on_gpu else (bfloat16,):
        yield case("cell", (3, 7, 19), dtype=dtype)
        yield case("cell", (17, 33, 20), dtype=dtype)
        yield case("readout", (5, 19, 37), dtype=dtype)
        yield case("readout", (3, 20, 1500), dtype=dtype)
    every = dict(D=2, resets=True, reset_state="stored", lengths=True, cells=True)
    # 70 units are more than one program holds, so that several wait for one another.
    yield case("layer", (3, 3, 5, 19), dtype=bfloat16)
    yield case("layer", (3, 35, 5, 150), dtype=bfloat16)
    yield case("layer", (3, 3, 5, 70), dtype=bfloat16, **every)
    if on_gpu:
        yield case("layer", (3, 3, 5, 70), precision="tf32")
        yield case("layer", (3, 3, 5, 12))
    # Between launches the c of bfloat16 is float32: these are kernels of their own.
    for dtype in (float32, bfloat16) if on_gpu else (float32,):
        yield case("layer", (3, 3, 5, 19), "triton-stepwise", dtype=dtype, **every)
    lstm = LSTM(5, 19, 2, dropout=0.5, backend="triton", device=device)
    yield "dropout, second derivatives", partial(_second_derivatives, lstm, torch.randn(3, 3, 5, device=device))
    for other in (catalogue.slstm, catalogue.zoneout()) if on_gpu else ():
        of_cell = segmented.Case(T=3, B=3, I=5, H=40, dtype=bfloat16, cell=other)
        drawn = segmented.draw(of_cell, device)
        yield f"layer of {other}", partial(segmented.results, of_cell, drawn, "triton")
    one = RecurrentCell(catalogue.zoneout(), 5, 19, backend="triton", device=device)
    yield f"one step of {one.cell}", partial(_second_derivatives, one, torch.randn(3, 5, device=device))


def _second_derivatives(lstm: torch.nn.Module, x: Tensor) -> Results:
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
    return gradient, *torch.autograd.grad(gradient.square().sum(), [x, *lstm.parameters()], allow_unused=True)


def run_cases(device: torch.device) -> None:
    for name, run in cases(device):
        print(name, flush=True)
        # Whether the values are right is for the suite to say; what is not written at all is likely to show here.
        assert all(t.isfinite().all() for t in run() if t is not None), f"{name}: results that are not finite"


def main(arguments: Sequence[str]) -> None:
    if arguments == ["--cases"]:
        return run_cases(torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"))
    path = os.pathsep.join([os.environ["PATH"], os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None or not torch.cuda.is_available():
        sys.exit(
            "make sanitize: needs an NVIDIA GPU, and compute-sanitizer of the CUDA toolkit in PATH or CUDA_HOME/bin"
        )
    # torch's caching allocator would hide from the tools where a tensor ends, and that it is new.
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    failed = []
    for tool in arguments or TOOLS:
        print(f"{tool}:", flush=True)
        command = [sanitizer, "--tool", tool, *OPTIONS, sys.executable, __file__, "--cases"]
        failed += [tool] if subprocess.run(command, env=environ).returncode else []
    if failed:
        sys.exit(f"make sanitize: {', '.join(failed)} failed")
    print("make sanitize: nothing found")


if __name__ == "__main__":
    main(sys.argv[1:])
