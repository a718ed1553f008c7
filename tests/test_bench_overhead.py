"""Host times and first calls: what they are made of; of a kernel on a driver that launches nothing."""

from dataclasses import replace
from unittest import mock

from support.benches import IEEE, run
from support.process import ForkedProcess, run_checks, run_without_interpreter

from lstm_triton import process
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.problem import Judge


def test_host_times_and_first_calls_without_a_gpu():
    assert "checks passed" in run_without_interpreter(__file__)


def check_host_times():
    from support.fake_driver import NullDriver, active

    names = ("lstm_triton triton", "torch.nn.LSTMCell")
    with active(NullDriver()), mock.patch.object(Judge, "why_wrong", lambda self, found: None):  # nothing is computed
        found = run(Task("overhead", Case("a", 16, 1, 1, form="cell", dtype="float32"), "overhead"), names)
    ours, torchs = (found[name] for name in names)
    assert ours.status == torchs.status == "ok", found
    assert ours.timing.clock == torchs.timing.clock == "host" and ours.timing.samples >= 3
    print(f"{ours.timing.p50_us:.1f} us of one step on a driver that launches nothing")


def check_first_calls_in_new_processes():
    """The first starts Python, the others are forks."""
    caches, new_process = [], process.Process

    def start(function, argument, environment):
        caches.append(environment["TRITON_CACHE_DIR"])
        return (ForkedProcess if caches[1:] else new_process)(function, argument, environment)

    task = Task("cold-start", Case("a", 16, 1, 1, form="cell", **IEEE), "cold-start")
    with mock.patch.object(process, "Process", start):
        ours, torchs = run(task, ("lstm_triton auto", "torch.nn.LSTM")).values()
        too_large = Case("a", 1 << 24, 1, 1, form="cell", **IEEE)
        (failed,) = run(replace(task, case=too_large), ("lstm_triton auto",)).values()
    names = ("import_s", "first_call_s", "second_call_s")
    assert set(ours.values) == {f"{kind}_{name}" for kind in ("empty", "warm") for name in names}, ours
    assert all(seconds > 0 for seconds in ours.values.values())
    assert caches[0] == caches[1], "the second start finds the first one's kernels"
    assert torchs.status == "skipped" and torchs.reason.startswith("torch.nn.LSTM takes whole sequences"), torchs
    assert failed.status == "failed" and "the measuring process itself failed: RuntimeError" in failed.reason, failed


if __name__ == "__main__":
    run_checks(globals())
