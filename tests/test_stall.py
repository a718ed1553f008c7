"""A kernel that gave up waiting is named: by the next launch, and at the end of the process."""

import ctypes
import subprocess
import sys

import pytest
import torch

from lstm_triton.kernels import stall


@pytest.fixture
def stalled(monkeypatch):
    monkeypatch.setattr(stall, "_values", {"_some_kernel": ctypes.c_int32(4194304), "_other": ctypes.c_int32(0)})


def test_nothing_is_told_of_kernels_that_ended():
    stall.word("_lstm_sequence_forward_kernel", torch.cuda.is_available())
    assert stall.message() is None
    stall.check()


def test_the_next_launch_names_the_kernel(stalled):
    with pytest.raises(RuntimeError, match="lstm_triton: _some_kernel waited for seconds"):
        stall.check()


def test_the_end_of_the_process_names_the_kernel():
    script = "from lstm_triton.kernels import stall; stall.word('_some_kernel', False).fill_(7)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.startswith("lstm_triton: _some_kernel waited for seconds")


WITHOUT_END = """
import torch, triton
from lstm_triton import LSTM
from lstm_triton.kernels import sequence

@triton.jit
def arrive(counter_ptr):
    pass

sequence.arrive = arrive
layer = LSTM(64, 256, device="cuda", dtype=torch.bfloat16, backend="triton-persistent").requires_grad_(False)
y, _ = layer(torch.randn(4, 16, 64, device="cuda", dtype=torch.bfloat16))
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("stopped:", error)
layer(torch.randn(4, 16, 64, device="cuda", dtype=torch.bfloat16))
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="stops an NVIDIA GPU")
def test_a_wait_without_end_stops_the_kernel_and_names_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_END], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stdout.startswith("stopped: CUDA error"), done.stdout + done.stderr
    assert "lstm_triton: _lstm_sequence_forward_kernel waited for seconds" in done.stderr
