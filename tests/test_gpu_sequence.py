"""Launches in which programs wait for each other, on a GPU.

Each check is a process of its own with a time limit, after which it says where it was.
"""

import faulthandler
import sys
import time

import pytest
import torch
from support.gpu_checks import (
    BF16,
    Unserved,
    after_out_of_memory,
    beside_a_kernel_that_stays,
    both_do_not_fit,
    both_fit,
    captured_training_step,
    many_steps,
    poisoned_runs,
    synchronize,
    the_host_does_not_wait,
    two_streams,
)
from support.process import run_without_interpreter

from lstm_triton.kernels import interpreter

pytestmark = pytest.mark.long

LIMIT = 120  # seconds a check may take
CPU = torch.device("cpu")


def hang(device, backend):
    """What no check should do."""
    time.sleep(600)


# By name: the check, its arguments on a GPU, and without one.
CHECKS = {
    "captured training step": (
        captured_training_step,
        dict(T=64, B=16, H=512, replays=4),
        dict(T=3, B=2, H=5, replays=2),
    ),
    "two streams": (two_streams, dict(T=512, sizes=both_fit, rounds=10), dict(T=2, sizes=both_fit, rounds=1)),
    "two streams that take turns": (
        two_streams,
        dict(T=256, sizes=both_do_not_fit, rounds=10),
        dict(T=2, sizes=both_do_not_fit, rounds=1),
    ),
    "two streams of unequal priority": (
        two_streams,
        dict(T=512, sizes=both_fit, rounds=10, priorities=(0, -1)),
        dict(T=2, sizes=both_fit, rounds=1, priorities=(0, -1)),
    ),
    "two streams of unequal priority that take turns": (
        two_streams,
        dict(T=256, sizes=both_do_not_fit, rounds=10, priorities=(0, -1)),
        dict(T=2, sizes=both_do_not_fit, rounds=1, priorities=(0, -1)),
    ),
    "beside a kernel that stays": (beside_a_kernel_that_stays, dict(T=256, seconds=4), dict(T=2, seconds=0)),
    **{
        f"poisoned runs of {H} units in {kind}": (
            poisoned_runs,
            dict(T=T, B=B, H=H, dtype=dtype, runs=10),
            dict(T=3, B=2, H=5, dtype=dtype, runs=2),
        )
        for kind, dtype, T, B, H in (
            ("bf16", BF16, 200, 16, 256),
            ("bf16", BF16, 200, 33, 512),
            ("bf16", BF16, 257, 16, 768),
            ("fp16", torch.float16, 200, 16, 512),
            ("tf32", torch.float32, 200, 16, 512),
        )
    },
    "many steps": (many_steps, dict(T=70_000, B=2, H=256, chunk=10_000), dict(T=9, B=2, H=5, chunk=4)),
    "after running out of memory": (
        after_out_of_memory,
        dict(T=2048, B=16, H=512, least=3),
        dict(T=2, B=2, H=5, least=5),
    ),
    "the host does not wait": (the_host_does_not_wait, dict(T=64, B=16, H=256), dict(T=4, B=3, H=5)),
}


def _in_a_process(name, limit=LIMIT):
    told = run_without_interpreter(__file__, name, str(limit), timeout=limit + 60)
    if "unserved:" in told:
        pytest.skip(told.partition("unserved: ")[2].strip())
    assert "passed" in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    _in_a_process(name)


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", {check: name for name, (check, _, _) in CHECKS.items()}.values())
def test_in_the_interpreter(name):
    """Each check once, with small sizes."""
    check, _, tiny = CHECKS[name]
    check(CPU, "triton-stepwise", **tiny)


def test_a_hang_is_reported():
    with pytest.raises(AssertionError, match=r"Timeout(.|\n)*in hang"):
        _in_a_process("hang", 1)


def main(name, limit):
    faulthandler.dump_traceback_later(float(limit), exit=True)
    check, arguments, _ = CHECKS.get(name, (hang, {}, {}))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
    try:
        check(device, "triton-persistent", **arguments)
        synchronize(device)
        print("passed")
    except Unserved as reason:
        print("unserved:", reason)


if __name__ == "__main__":
    main(*sys.argv[1:])
