"""Timing: rounds, statistics, clocks, the state of the machine, and whether the GPU still answers; with what stands in for
one."""

import ctypes

import pytest
import torch
import triton
from support.benches import CPU, FakeClock

from lstm_triton import process, timing
from lstm_triton.bench import device, grid_latency, rows
from lstm_triton.kernels import interpreter, stall


def fail(error):
    raise error


def test_rounds_are_interleaved_and_shuffled_and_short_calls_repeated():
    clock, seen = FakeClock(), []
    samples = timing.interleaved({name: lambda name=name: seen.append(name) for name in "abc"}, clock, 1.0)
    timed = "".join(seen[-3 * timing.LEAST_SAMPLES :])
    turns = [timed[k : k + 3] for k in range(0, len(timed), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1
    found = rows.Timing.of(samples["a"], 4, clock.name)
    assert found.samples == timing.LEAST_SAMPLES and found.us_per_step == 0.5 and found.wall_p50_us == 3.0
    assert found.confidence >= 0.95 and found.clock == "fake"
    clock.sample_seconds, clock.sample = 1e-3, lambda call, n: (10.0, 10.0)
    assert timing.interleaved({"a": print}, clock, 0.0)["a"].calls == 100


def test_statistics_of_known_samples():
    found = rows.Timing.of(timing.Samples(3, [4.0, 1, 3, 2, 5], [7.0]), 2, "a clock")
    assert (found.p20_us, found.p50_us, found.p80_us) == (pytest.approx(1.8), 3, pytest.approx(4.2))
    assert (found.us_per_step, found.wall_p50_us, found.samples, found.calls_per_sample) == (1.5, 7, 5, 3)
    # from tables of the sign test: n = 6: ranks 1 and 6, 96.9 %; n = 10: 2 and 9, 97.9 %; n = 20: 6 and 15, 95.9 %
    for n, low, high, confidence in ((6, 1, 6, 0.96875), (10, 2, 9, 0.978515625), (20, 6, 15, 0.9586), (3, 1, 3, 0.75)):
        assert timing.median_interval(range(1, n + 1)) == (low, high, pytest.approx(confidence, abs=1e-4))
    assert timing.median_interval([3.0]) == (3.0, 3.0, 0.0)
    assert [timing.is_settled(values) for values in ([1.0] * 5, [1.0] * 6, [1.0, 2.0] * 20)] == [False, True, False]


def test_cuda_clock_with_fake_events(monkeypatch):
    now = [0.0]  # milliseconds

    class Event:
        def record(self):
            self.time = now[0]

        def elapsed_time(self, end):
            return end.time - self.time

    def call():
        now[0] += 0.25

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    clock = timing.Clock(torch.device("cuda"))
    assert clock.sample(call, 4)[0] == pytest.approx(250.0) and clock.l2 == "warm"
    clock._buffer = torch.ones(4)
    assert clock.sample(call, 3)[0] == pytest.approx(250.0)
    assert not clock._buffer.any(), "the cache was not written over"


def test_states_of_the_machine_are_read_tolerantly(monkeypatch):
    missing = ModuleNotFoundError("nvidia-ml-py does not seem to be installed")
    for name, error in (("power_w", RuntimeError("Not Supported")), ("sm_clock_mhz", missing)):
        readers = dict.fromkeys(device._READERS, lambda gpu: 41) | {name: lambda gpu, error=error: fail(error)}
        monkeypatch.setattr(device, "_READERS", readers)
        found = device.state(torch.device("cuda"))
        if error is missing:
            assert "pip install 'lstm-triton[bench]'" in found["unread"]
        else:
            assert found == dict.fromkeys(device._READERS, 41) | {name: None}
    assert device.state(CPU)["load_1min"] >= 0


def test_an_error_is_fatal_where_the_device_is_lost(monkeypatch):
    """Whatever its words: the device is asked."""
    lost = RuntimeError("CUDA error: misaligned address\nCUDA kernel errors might be asynchronously reported")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for words in "Triton Error [CUDA]: misaligned address", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "whatever":
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: fail(lost))
        with pytest.raises(process.Fatal, match="^CUDA error: misaligned address$") as fatal:
            process.raise_if_lost(RuntimeError(words))
        assert str(fatal.value.__cause__) == words
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        process.raise_if_lost(RuntimeError(words))
    with monkeypatch.context() as patch, pytest.raises(process.Fatal, match="_some_kernel timed out, waiting for"):
        patch.setattr(stall, "_values", {"_some_kernel": ctypes.c_int32(7)})
        process.raise_if_lost(ValueError("no"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    process.raise_if_lost(lost)


@pytest.mark.compiled
@pytest.mark.skipif(not interpreter.programs_can_wait(), reason="the interpreter runs one program after the other")
def test_every_exchange_arrives(device):
    """The number of steps is a runtime value."""
    caches = grid_latency._latency_kernel.device_caches
    compiled = caches[triton.runtime.driver.active.get_current_device()][0]
    before = len(compiled)
    for steps in (1, 6):
        assert grid_latency.launch(3, steps, device).tolist() == [steps] * 3
    assert len(compiled) == before + 1
