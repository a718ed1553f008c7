"""A kernel that does nothing but exchange a value with its other programs: the latency of kernels/grid_sync.py."""

import torch
import triton
import triton.language as tl

from lstm_triton.kernels import stall
from lstm_triton.kernels.grid_sync import COUNTER_STRIDE, arrive, wait


@triton.jit(do_not_specialize=["steps"])
def _latency_kernel(
    # pointers
    counter_ptr,  # [32] zeros
    stall_ptr,  # [1] the word of `stall.word`
    slots_ptr,  # [steps + 1, PROGRAMS] out: what each program stored in each step, then what it loaded last
    # sizes
    steps,
    # meta-parameters
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """`steps` barriers between PROGRAMS programs, at each of which they hand their neighbours' last values on, one larger."""
    pid = tl.program_id(0)
    value = pid * 0
    for step in tl.range(0, steps, num_stages=1):
        tl.store(slots_ptr + step * PROGRAMS + pid, value + 1)
        arrive(counter_ptr, 2**31 - 1)
        wait(counter_ptr, (step + 1) * PROGRAMS, stall_ptr)
        value = tl.load(slots_ptr + step * PROGRAMS + (pid + 1) % PROGRAMS)
    tl.store(slots_ptr + steps * PROGRAMS + pid, value)


def launch(programs: int, steps: int, device: torch.device) -> torch.Tensor:
    """Run it; returns the value each program ended with, [programs] int32: `steps`."""
    counter = torch.zeros(COUNTER_STRIDE.value, dtype=torch.int32, device=device)
    slots = torch.zeros(steps + 1, programs, dtype=torch.int32, device=device)
    stalled = stall.word("_latency_kernel", device.type == "cuda")
    _latency_kernel[(programs,)](counter, stalled, slots, steps, programs, num_warps=4, launch_cooperative_grid=True)
    return slots[steps]
