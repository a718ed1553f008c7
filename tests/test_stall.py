"""A kernel that timed out while it waited is named: by its layer, by the next one, and at the end of the process."""

import atexit
import ctypes

import pytest
import torch

from lstm_triton import LSTM, functional
from lstm_triton.kernels import layer, layer_backward, stall
from lstm_triton.kernels.inputs import LayerInputs

NAMED = "lstm_triton: _some_kernel timed out, waiting for"


@pytest.fixture
def polls(monkeypatch):
    """The word of a kernel. It has timed out as soon as this is not zero."""
    word = ctypes.c_int32(0)
    monkeypatch.setattr(stall, "_values", {"_some_kernel": word, "_other": ctypes.c_int32(0)})
    return word


def _module(device):
    return LSTM(3, 4, backend="reference", device=device)(torch.zeros(2, 1, 3, device=device))


def _function(device):
    weights = [torch.zeros(16, n, device=device) for n in (3, 4)]
    return functional.lstm(torch.zeros(2, 1, 3, device=device), None, weights, backend="reference")


LOST = LayerInputs(*(torch.empty(0, device="meta"),) * 5)
CALLS = {
    "check": stall.check,
    "launcher": lambda: layer.lstm_layer_forward(LOST),
    "launcher backward": lambda: layer_backward.lstm_layer_backward(None, LOST, None, ()),
    # Of these neither is given a state; they would ask for zeros.
    "module": lambda: _module("meta"),
    "function": lambda: _function("meta"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_next_layer_names_the_kernel(call, polls):
    """Before it asks anything of a device whose context is lost."""
    polls.value = 4194304
    with pytest.raises(RuntimeError, match=NAMED):
        call()


@pytest.mark.parametrize("run", [_module, _function])
def test_on_the_cpu_nothing_is_lost(run, polls):
    polls.value = 4194304
    assert run("cpu")[0].shape == (2, 1, 4)


def test_an_error_inside_a_layer_names_the_kernel(polls):
    """CUDA reports the trap in whatever call comes next, here one of a layer that had begun."""

    def run(value):
        with stall.names_the_kernel:
            polls.value = value
            raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(RuntimeError, match="^CUDA error"):
        run(0)
    with pytest.raises(RuntimeError, match=NAMED) as error:
        run(4194304)
    assert str(error.value.__cause__).startswith("CUDA error")


def test_the_end_of_the_process_names_the_kernel(monkeypatch, capsys):
    """If one has timed out. Its word lies in the memory of the host, whatever the default device."""
    at_the_end = []
    monkeypatch.setattr(stall, "_values", {})
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    with torch.device("meta"):
        word = stall.word("_kernel_of_this_test", torch.cuda.is_available())
    (end,) = at_the_end
    assert word.device.type == "cpu"
    for polls, named in ((0, ""), (7, "lstm_triton: _kernel_of_this_test timed out, waiting for")):
        word.fill_(polls)
        end()
        told = capsys.readouterr().err
        assert told.startswith(named) and bool(told) == bool(polls)


def test_no_word_is_pinned_while_a_graph_is_captured(monkeypatch):
    """Which would break the capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="^_another_kernel_of_this_test is launched .* once before the capture"):
        stall.word("_another_kernel_of_this_test", True)
