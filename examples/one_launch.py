"""Which layers run a whole sequence in one launch, by GPU, batch and dtype: asked of the launch configuration, on any machine.

Run it: python examples/one_launch.py
"""

import torch

from lstm_triton.kernels.sequence_config import DeviceLimits, sequence_backward_config, sequence_forward_config

GPUS = {  # multiprocessors, bytes of shared memory that one program may have, generation
    "H100": DeviceLimits(132, 227 << 10, 9),
    "A100": DeviceLimits(108, 163 << 10, 8),
    "RTX 4090": DeviceLimits(128, 99 << 10, 8),
}
KINDS = {"bfloat16, float16": (torch.bfloat16, "ieee"), "float32 in TF32": (torch.float32, "tf32")}
BATCHES = (16, 64, 256)


def one_launch(B: int, H: int, D: int, dtype: torch.dtype, precision: str, limits: DeviceLimits) -> bool:
    """Whether forward and backward of D directions are one launch each."""
    configs = (sequence_forward_config, sequence_backward_config)
    return all(configure(B, H, D, dtype, precision, limits).persistent for configure in configs)


def main() -> None:
    print(f"{'largest H, a multiple of 32':<30}{'one direction':^24}{'two directions':^24}")
    print(f"{'':<30}" + "".join(f"{f'B = {B}':>8}" for _ in (1, 2) for B in BATCHES))
    for gpu, limits in GPUS.items():
        for kind, (dtype, precision) in KINDS.items():
            row = f"{gpu + ', ' + kind:<30}"
            for D in (1, 2):
                for B in BATCHES:
                    sizes = [H for H in range(32, 4096, 32) if one_launch(B, H, D, dtype, precision, limits)]
                    row += f"{max(sizes, default=0):>8}"
            print(row)


if __name__ == "__main__":
    main()
