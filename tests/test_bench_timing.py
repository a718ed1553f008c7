"""Timing: rounds, clocks, graphs, memory, the state of the machine, and whether the GPU still answers; with what stands in for
one."""

import contextlib
import ctypes
import types

import pytest
import torch
from support.benches import CPU, IEEE, FakeClock, context

from lstm_triton import process, timing
from lstm_triton.bench import device, grid_latency, measure, problem, providers, rows
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.problem import Judge
from lstm_triton.kernels import interpreter, stall


def test_rounds_are_interleaved_and_shuffled_and_short_calls_repeated():
    clock, seen = FakeClock(), []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    samples = timing.interleaved(calls, clock, 1.0)
    timed = seen[-3 * timing.LEAST_SAMPLES :]
    turns = [timed[k : k + 3] for k in range(0, len(timed), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len({tuple(turn) for turn in turns}) > 1
    found = rows.Timing.of(samples["a"], 4, clock.name)
    assert found.samples == timing.LEAST_SAMPLES and found.us_per_step == 0.5 and found.wall_p50_us == 3.0
    assert found.confidence >= 0.95 and found.clock == "fake"
    clock.sample_seconds, clock.sample = 1e-3, lambda call, n: (10.0, 10.0)
    assert timing.interleaved({"a": print}, clock, 0.0)["a"].calls == 100


def test_cuda_clock_with_fake_events(monkeypatch):
    now = [0.0]

    class Event:
        def record(self):
            self.time = now[0]

        def elapsed_time(self, end):
            return end.time - self.time  # milliseconds

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    clock = timing.Clock(torch.device("cuda"))

    def call():
        now[0] += 0.25

    assert clock.sample(call, 4)[0] == pytest.approx(250.0) and clock.l2 == "warm"
    clock._buffer = torch.ones(4)
    assert clock.sample(call, 3)[0] == pytest.approx(250.0)
    assert not clock._buffer.any(), "the cache was not written over"


@pytest.mark.parametrize("form", ["layer", "cell"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_graphs_hold_what_eager_rows_time(monkeypatch, form, mode):
    case, captured = Case("a", 5, 3, 6 if form == "layer" else 1, form=form, **IEEE, mode=mode), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def graphed(call, factor=1.0):
        assert torch.is_grad_enabled() == (mode == "train")
        captured.append(call)
        return call, tuple(t * factor for t in call())

    monkeypatch.setattr(measure, "graphed", graphed)
    given = problem.make(case, CPU)
    model, judge = providers.PROVIDERS[providers.torchs(case)](given), Judge(given, providers.true(case))
    measure._graph(model, judge)
    assert captured == [model.call]
    with torch.set_grad_enabled(mode == "train"):
        returned = model.call()
    assert len(returned) == 3 + (5 if mode == "train" else 0)  # of the input, and bias_hh has its gradient too
    assert max(e.largest for e in judge.errors(model, lambda: returned).values()) < 1e-5
    monkeypatch.setattr(measure, "graphed", lambda call: graphed(call, 1.01))
    with pytest.raises(RuntimeError, match="replayed, wrong"):
        measure._graph(model, judge)


def test_saved_bytes():
    given = problem.make(Case("a", 8, 2, 5, **IEEE, mode="train"), CPU)
    names = "lstm_triton auto recompute", "lstm_triton auto", "torch.nn.LSTM"
    held = {name: measure.held(providers.PROVIDERS[name](given))["saved_bytes"] for name in names}
    assert all(bytes > 5 * 2 * 8 * 4 for bytes in held.values()), f"more than one tensor like y: {held}"


def test_states_of_the_machine_are_read_tolerantly(monkeypatch):
    def fail(error):
        raise error

    readers = dict.fromkeys(device._READERS, lambda gpu: 41)
    refused = {"power_w": lambda gpu: fail(RuntimeError("Not Supported"))}
    monkeypatch.setattr(device, "_READERS", readers | refused)
    found = device.state(torch.device("cuda"))
    assert found["sm_clock_mhz"] == found["temperature_c"] == 41 and found["power_w"] is None
    missing = {"sm_clock_mhz": lambda gpu: fail(ModuleNotFoundError("nvidia-ml-py does not seem to be installed"))}
    monkeypatch.setattr(device, "_READERS", readers | missing)
    assert "pip install 'lstm-triton[bench]'" in device.state(torch.device("cuda"))["unread"]
    assert device.state(CPU)["load_1min"] >= 0


@pytest.mark.compiled
@pytest.mark.skipif(not interpreter.programs_can_wait(), reason="the interpreter runs one program after the other")
@pytest.mark.parametrize("programs", [2, 3])
def test_every_exchange_arrives(programs, device):
    assert grid_latency.launch(programs, 6, device).tolist() == [6] * programs


# ---- After an error the GPU is asked whether it still answers: the benchmark goes on in this process, or in another one.


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


def test_an_error_is_fatal_where_the_device_is_lost(gpu_says, monkeypatch):
    """Whatever its words: the device is asked."""
    for words in "Triton Error [CUDA]: misaligned address", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "whatever":
        gpu_says("CUDA error: misaligned address\nCUDA kernel errors might be asynchronously reported")
        with pytest.raises(process.Fatal, match="^CUDA error: misaligned address$") as fatal:
            process.raise_if_lost(RuntimeError(words))
        assert str(fatal.value.__cause__) == words
        gpu_says(None)
        process.raise_if_lost(RuntimeError(words))
    with monkeypatch.context() as patch, pytest.raises(process.Fatal, match="_some_kernel timed out, waiting for"):
        patch.setattr(stall, "_values", {"_some_kernel": ctypes.c_int32(7)})
        process.raise_if_lost(ValueError("no"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    process.raise_if_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_capture_that_fails_loses_its_own_row_and_leaves_the_stream_that_was(gpu_says, monkeypatch):
    gpu_says(None)
    streams, stream = [], types.SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(_):
        streams.append("the capture's")
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    fake = dict(Stream=lambda: stream, stream=lambda s: contextlib.nullcontext(), current_stream=lambda: stream)
    fake |= dict(CUDAGraph=object, graph=graph, set_stream=streams.append)
    for name, stand_in in fake.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    emitted, pairs = [], [("torch.nn.LSTM", execution) for execution in ("eager", "graph")]
    measure.measure(Task("s", Case("a", 8, 3, 6, **IEEE)), context(), emitted.append, pairs)
    assert streams == ["the capture's", stream]
    found = {row.execution: row for row in emitted}
    assert found["eager"].status == "ok" and found["eager"].timing
    assert found["graph"].status == "failed" and "not permitted" in found["graph"].reason
