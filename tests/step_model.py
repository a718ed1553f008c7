"""Cycles of a step of the sequence kernels by the model of their compiled code: `make step-model`.

`make step-model ARGS="90 768 16 bf16"` compiles both kernels for compute capability 9.0, H = 768, B = 16 in bfloat16; without
ARGS for the five layers of the table in docs/design.md. No GPU is needed, and none is timed.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parent.parent / ".ci-cache" / "triton"))

from support.aot_sequence import Case, choose  # noqa: E402
from support.step_model import step_cycles  # noqa: E402

KINDS = {"bf16": (torch.bfloat16, "ieee"), "fp16": (torch.float16, "ieee"), "tf32": (torch.float32, "tf32")}
LAYERS = ((768, 16, "bf16"), (512, 16, "fp16"), (256, 64, "tf32"), (1024, 16, "bf16"), (128, 64, "bf16"))


def main(arguments: Sequence[str]) -> None:
    arch = int(arguments[0]) if arguments else 90
    layers = [(int(arguments[1]), int(arguments[2]), arguments[3])] if len(arguments) > 1 else LAYERS
    for H, B, kind in layers:
        for way in ("forward", "backward"):
            report = choose(Case(way, H, B, 1, *KINDS[kind]), arch).report
            step, fewest, most = step_cycles(report)
            print(
                f"sm_{arch} {way:8} H={H} B={B} {kind}: {fewest} to {most} cycles, {len(step)} instructions,"
                f" {report.registers} registers, {report.stack_bytes} bytes of local memory",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
