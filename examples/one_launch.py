"""Which layers may run a whole sequence in one launch, by GPU, batch and dtype: those with a candidate, counted on any machine.

On the GPU itself the compiler has the last word (`lstm_triton.explain`).

Run it: python examples/one_launch.py
"""

import torch

from lstm_triton.kernels.figures import DeviceFigures, figures
from lstm_triton.kernels.search import candidates
from lstm_triton.kernels.sequence_config import Problem

GPUS = {  # SMs, bytes of shared memory that one program may have, compute capability
    "H100": figures(132, 227 << 10, (9, 0)),
    "A100": figures(108, 163 << 10, (8, 0)),
    "RTX 4090": figures(128, 99 << 10, (8, 9)),
}
KINDS = {
    "bfloat16, float16": (torch.bfloat16, "ieee"),
    "float32 in TF32": (torch.float32, "tf32"),
    "float32 in tf32x3": (torch.float32, "tf32x3"),
    "float32 in full": (torch.float32, "ieee"),
}
BATCHES = (16, 64, 256)


def one_launch(B: int, H: int, D: int, dtype: torch.dtype, precision: str, gpu: DeviceFigures) -> bool:
    """Whether forward and backward of D directions may be one launch each."""
    problems = (Problem(way, B, H, D, dtype, precision) for way in ("backward", "forward"))  # the backward takes more
    firsts = (candidates(problem, gpu)[0] for problem in problems)
    return all(config.persistent and config.launches == 1 for config in firsts)


def main() -> None:
    print(f"{'largest H, a multiple of 32':<30}{'one direction':^24}{'two directions':^24}")
    print(f"{'':<30}" + "".join(f"{f'B = {B}':>8}" for _ in (1, 2) for B in BATCHES))
    for name, gpu in GPUS.items():
        for kind, (dtype, precision) in KINDS.items():
            row = f"{name + ', ' + kind:<30}"
            for D in (1, 2):
                for B in BATCHES:
                    sizes = range(2048, 0, -32)
                    row += f"{next((H for H in sizes if one_launch(B, H, D, dtype, precision, gpu)), 0):>8}"
            print(row)


if __name__ == "__main__":
    main()
