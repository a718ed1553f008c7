"""Launches whose programs wait for each other, on a GPU.

Each check is a process of its own with a time limit, after which it says where it was.
"""

import faulthandler
import sys

import pytest
import torch
from support import gpu_checks as checks
from support.gpu_checks import BF16
from support.process import run_without_interpreter

from lstm_triton.kernels import interpreter

pytestmark = pytest.mark.long

LIMIT = 120  # seconds a check may take
CPU = torch.device("cpu")

# By name: the check, its T, B, H (without these `most`) and dtype on a GPU, and its other arguments, which are SMALL without.
# Half of the SMs hold a layer of 16 rows and 256 units.
CHECKS = {
    "captured training step": (checks.captured_training_step, (64, 16, 512), dict(replays=4)),
    **{
        f"two streams{unequal}{turns}": (checks.two_streams, sizes, dict(rounds=10, priorities=priorities))
        for unequal, priorities in {"": (0, 0), " of unequal priority": (0, -1)}.items()
        for turns, sizes in {"": (512, 16, 256), " that take turns": (256,)}.items()
    },
    "beside a kernel that stays": (checks.beside_a_kernel_that_stays, (256,), dict(seconds=4)),
    **{
        f"poisoned runs of {H} units in {dtype}": (checks.poisoned_runs, (T, B, H, dtype), dict(runs=10))
        for dtype, T, B, H in (
            *((BF16, 200, 16, 256), (BF16, 200, 33, 512), (BF16, 257, 16, 768)),
            *((torch.float16, 200, 16, 512), (torch.float32, 200, 16, 512)),
        )
    },
    "many steps": (checks.many_steps, (70_000, 2, 256), dict(chunk=10_000)),
    "after running out of memory": (checks.after_out_of_memory, (2048, 16, 512), dict(least=3)),
    "the host does not wait": (checks.the_host_does_not_wait, (64, 16, 256), {}),
}
SMALL = dict(replays=2, rounds=1, seconds=0, runs=2, chunk=1, least=5)
ENDLESS = {"at the barrier": False, "in the exchange": True}


def on_a_gpu(*names):
    """Of these names one test each."""
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return lambda test: pytest.mark.gpu(without(pytest.mark.parametrize("name", names)(test)))


interpreted = pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")


@on_a_gpu(*CHECKS)
def test_on_a_gpu(name):
    told = run_without_interpreter(__file__, name, str(LIMIT), timeout=LIMIT + 60)
    if "unserved:" in told:
        pytest.skip(told.partition("unserved: ")[2].strip())
    assert "passed" in told


@interpreted
@pytest.mark.parametrize("name", {check: name for name, (check, *_) in CHECKS.items()}.values())
def test_in_the_interpreter(name):
    """Each check once, with small sizes."""
    check, _, arguments = CHECKS[name]
    small = {key: SMALL.get(key, value) for key, value in arguments.items()}
    check(checks.Step(CPU, "triton-stepwise", 2, 2, 3), **small)


@on_a_gpu(*ENDLESS)
def test_a_wait_without_end_stops_the_kernel_and_names_it(name):
    named = "RuntimeError: lstm_triton: _lstm_sequence_forward_kernel timed out, waiting for"
    with pytest.raises(AssertionError, match=rf"stopped: CUDA error(.|\n)*{named}"):
        run_without_interpreter(__file__, name, str(LIMIT), timeout=LIMIT + 60)


@interpreted
@pytest.mark.parametrize("in_band", ENDLESS.values(), ids=ENDLESS)
def test_where_nobody_waits_that_layer_ends(in_band):
    checks.wait_without_end(CPU, "triton-stepwise", (2, 2, 3), in_band)


def main(name, limit):
    faulthandler.dump_traceback_later(float(limit), exit=True)
    device, backend = torch.device("cuda", torch.cuda.current_device()), "triton-persistent"
    if name in ENDLESS:
        return checks.wait_without_end(device, backend, (4, 16, 256), ENDLESS[name])
    check, (T, *sizes), arguments = CHECKS[name]
    check(checks.Step(device, backend, T, *(sizes or checks.most(device))), **arguments)
    checks.synchronize(device)
    print("passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
