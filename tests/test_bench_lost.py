"""After an error the GPU is asked whether it still answers: the benchmark goes on in the same process, or in another one."""

import contextlib
import ctypes
import types

import pytest
import torch
from support.benches import context

from lstm_triton import process
from lstm_triton.bench import measure
from lstm_triton.bench.cases import Case, Task
from lstm_triton.kernels import stall


@pytest.fixture
def gpu_says(monkeypatch):
    """gpu_says(message): what waiting for the GPU raises from here on; None: nothing."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def say(message):
        def synchronize(device=None):
            if message:
                raise RuntimeError(message)

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)

    return say


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered",
        "Triton Error [CUDA]: misaligned address",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
    ],
)
def test_an_error_is_fatal_where_the_device_is_lost(words, gpu_says):
    """Whatever its words: the device is asked."""
    gpu_says("CUDA error: misaligned address\nCUDA kernel errors might be asynchronously reported")
    with pytest.raises(process.Fatal, match="^CUDA error: misaligned address$") as fatal:
        process.raise_if_lost(RuntimeError(words))
    assert str(fatal.value.__cause__) == words
    gpu_says(None)
    process.raise_if_lost(RuntimeError(words))


def test_a_kernel_that_gave_up_waiting_is_fatal(gpu_says, monkeypatch):
    gpu_says(None)
    monkeypatch.setattr(stall, "_values", {"_some_kernel": ctypes.c_int32(7)})
    with pytest.raises(process.Fatal, match="_some_kernel timed out, waiting for"):
        process.raise_if_lost(ValueError("no"))


def test_without_a_gpu_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    process.raise_if_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_capture_that_fails_loses_its_own_row_alone(gpu_says, monkeypatch):
    gpu_says(None)

    def graphed(call):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(measure, "graphed", graphed)
    case = Case("a", 8, 3, 6, dtype="float32", precision="ieee")
    rows = []
    task = Task("s", case, executions=("eager", "graph"))
    measure.measure(task, context(), rows.append, [("torch.nn.LSTM", e) for e in task.executions])
    found = {row.execution: row for row in rows}
    assert found["eager"].status == "ok" and found["eager"].timing
    assert found["graph"].status == "failed" and "not permitted" in found["graph"].reason


def test_a_capture_that_fails_leaves_the_stream_that_was(monkeypatch):
    streams = ["the caller's"]

    @contextlib.contextmanager
    def graph(_):
        streams.append("the capture's")
        yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in dict(
        Stream=lambda: stream,
        stream=lambda s: contextlib.nullcontext(),
        CUDAGraph=object,
        graph=graph,
        current_stream=lambda: stream,
        set_stream=streams.append,
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        measure.graphed(call)
    assert streams[-1] is stream
