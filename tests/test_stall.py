"""A kernel that timed out while it waited is named: by its layer, by the next one, and at the end of the process."""

import ctypes
import re

import pytest
import torch
from support.process import run_without_interpreter

from lstm_triton import LSTM, functional
from lstm_triton.kernels import layer, layer_backward, stall
from lstm_triton.kernels.inputs import LayerInputs


@pytest.fixture
def stalled(monkeypatch):
    monkeypatch.setattr(stall, "_values", {"_some_kernel": ctypes.c_int32(4194304), "_other": ctypes.c_int32(0)})


def test_there_is_no_message_for_kernels_that_ended():
    stall.word("_lstm_sequence_forward_kernel", torch.cuda.is_available())
    assert stall.message() is None
    stall.check()


NAMED = "lstm_triton: _some_kernel timed out, waiting for"


def test_the_next_layer_names_the_kernel(stalled):
    """Before it asks anything of a device whose context is lost."""
    with pytest.raises(RuntimeError, match=NAMED):
        stall.check()
    inputs = LayerInputs(*(torch.empty(0, device="meta"),) * 5)
    with pytest.raises(RuntimeError, match=NAMED):
        layer.lstm_layer_forward(inputs)
    with pytest.raises(RuntimeError, match=NAMED):
        layer_backward.lstm_layer_backward(None, inputs, None, ())


def test_a_layer_names_the_kernel_before_it_asks_for_zeros(stalled):
    """Neither of these is given a state; on the CPU nothing is lost."""
    lstm, x = LSTM(3, 4, backend="reference"), torch.zeros(2, 1, 3)
    weights = [w.detach() for w in lstm.parameters()]
    for run in (lstm, lambda x: functional.lstm(x, None, [w.to(x.device) for w in weights], backend="reference")):
        y, _ = run(x)
        assert y.shape == (2, 1, 4)
        lstm.to("meta")
        with pytest.raises(RuntimeError, match=NAMED):
            run(x.to("meta"))


def test_an_error_inside_a_layer_names_the_kernel(monkeypatch):
    """CUDA reports the trap in whatever call comes next, here one of a layer that had begun."""
    word = ctypes.c_int32(0)
    monkeypatch.setattr(stall, "_values", {"_some_kernel": word})

    def run(polls):
        with stall.names_the_kernel:
            word.value = polls
            raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(RuntimeError, match="^CUDA error"):
        run(0)
    with pytest.raises(RuntimeError, match=NAMED) as error:
        run(4194304)
    assert str(error.value.__cause__).startswith("CUDA error")


def test_a_default_device_is_not_where_the_word_lies():
    with torch.device("meta"):
        assert stall.word("_kernel_of_this_test", torch.cuda.is_available()).device.type == "cpu"
    assert stall.message() is None


def test_no_word_is_pinned_while_a_graph_is_captured(monkeypatch):
    """Which would break the capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="^_another_kernel_of_this_test is launched .* once before the capture"):
        stall.word("_another_kernel_of_this_test", True)


def _told_by(script, tmp_path):
    """What a process prints that runs this script and fails. The source of a kernel must lie in a file."""
    file = tmp_path / "script.py"
    file.write_text(script)
    with pytest.raises(AssertionError) as failure:
        run_without_interpreter(file)
    return str(failure.value)


@pytest.mark.long
def test_the_end_of_the_process_names_the_kernel(tmp_path):
    script = "from lstm_triton.kernels import stall; stall.word('_some_kernel', False).fill_(7); raise SystemExit(1)"
    assert "lstm_triton: _some_kernel timed out, waiting for" in _told_by(script, tmp_path)


WITHOUT_END = """
import torch, triton
from lstm_triton import LSTM
from lstm_triton.kernels import sequence

@triton.jit
def arrive(counter_ptr, last):
    pass

sequence.arrive = arrive
layer = LSTM(64, 256, device="cuda", dtype=torch.bfloat16, backend="triton-persistent").requires_grad_(False)
x = torch.randn(4, 16, 64, device="cuda", dtype=torch.bfloat16)
layer(x)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("stopped:", error)
layer(x)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="stops an NVIDIA GPU")
def test_a_wait_without_end_stops_the_kernel_and_names_it(tmp_path):
    told = _told_by(WITHOUT_END, tmp_path)
    assert "stopped: CUDA error" in told
    assert "RuntimeError: lstm_triton: _lstm_sequence_forward_kernel timed out, waiting for" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_that_needs_nothing_but_a_gpu(tmp_path):
    assert re.search("CUDA enabled|NVIDIA", _told_by(WITHOUT_END, tmp_path).splitlines()[-1])
