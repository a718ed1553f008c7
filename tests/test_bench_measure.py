"""Measuring: the truth, checks before times, interleaving, memory, the parts that need a GPU with what stands in for one."""

import math

import pytest
import torch
from support.concurrent import concurrent_grid
from support.process import run_checks, run_without_interpreter

from lstm_triton import dispatch, reference
from lstm_triton.bench import (
    accuracy,
    device,
    grid_latency,
    measure,
    memory,
    peers,
    problem,
    providers,
    rows,
    schema,
    timing,
    tune,
)
from lstm_triton.bench.cases import Case, Task
from lstm_triton.kernels import interpreter

CPU = torch.device("cpu")


def context(**options):
    maker = rows.RowMaker(CPU, "a test", synthetic=True)
    return measure.Context(CPU, maker, FakeClock(), seconds=0.0, **options)


class FakeClock:
    """Counts what it times; each call takes as many microseconds as its turn."""

    name, l2, sample_seconds = "fake", None, 1e-9

    def __init__(self):
        self.calls = []

    def sample(self, call, n):
        call()
        self.calls.append(call)
        return 2.0, 3.0


def run(task, **options):
    found = []
    measure.measure(task, context(**options), found.append)
    for row in found:
        schema.encode(row)
    return {row["provider"]: row for row in found}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": 2, "bidirectional": True},
        {"proj_size": 3},
        {"resets": 0.3},
        {"rows": "lengths"},
        {"rows": "packed"},
    ],
    ids=str,
)
def test_providers_agree_with_the_truth(options):
    case = Case("a", 5, 3, 6, input_size=4, dtype="float32", precision="ieee", mode="train", **options)
    given = problem.make(case, CPU)
    truth = problem.truth(given)
    assert all(t.dtype == torch.float64 for t in truth.values())
    assert {"y", "h_n", "c_n", "dx", "dh0", "dc0", "dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0"} <= set(truth)
    for name in ("lstm_triton auto", "lstm_triton reference", "torch.nn.LSTM", "torch.nn.LSTMCell"):
        try:
            built = measure.build(providers.all_providers()[name], given, states=True)
        except providers.Unavailable:
            assert name == "torch.nn.LSTMCell"
            continue
        found = accuracy.errors(built.call(), truth)
        assert set(found) >= set(truth) - {"dh0", "dc0"}
        assert max(e["max"] for e in found.values()) < 1e-5, (name, found)


def test_the_truth_of_plain_cases_is_the_specification():
    case = Case("a", 5, 3, 6, dtype="float32", precision="ieee")
    given = problem.make(case, CPU)
    w = [given.weights[f"{name}_l0"].double() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    y, h_n, c_n, _ = reference.lstm_layer(given.x.double(), given.h0.double(), given.c0.double(), [w])
    truth = problem.truth(given)
    for name, t in (("y", y), ("h_n", h_n), ("c_n", c_n)):
        torch.testing.assert_close(truth[name], t)


def test_the_truth_of_long_sequences_is_put_together(monkeypatch):
    given = problem.make(Case("a", 5, 3, 7, layers=2, dtype="float32", precision="ieee", mode="train"), CPU)
    whole = problem.truth(given)
    monkeypatch.setattr(problem, "PIECE", 3)
    for name, t in problem.truth(given).items():
        torch.testing.assert_close(t, whole[name])


def test_the_truth_leaves_a_float64_problem_alone():
    given = problem.make(Case("a", 5, 3, 6, dtype="float64", mode="train"), CPU)
    problem.truth(given)
    assert not given.x.requires_grad and not any(w.requires_grad for w in given.weights.values())


def test_problems_are_the_same_for_one_seed():
    case = Case("a", 5, 3, 6, dtype="bfloat16")
    one, two, other = (problem.make(case, CPU, seed) for seed in (0, 0, 1))
    assert one.x.equal(two.x) and not one.x.equal(other.x) and one.x.dtype == torch.bfloat16


class Wrong(providers.TorchLSTM):
    """torch.nn.LSTM with a fault in `what`."""

    def __init__(self, what):
        super().__init__(f"wrong {what}")
        object.__setattr__(self, "what", what)

    def make(self, given):
        model = super().make(given)
        right = model.run

        def run(x, h0, c0):
            y, h_n, c_n = right(x, h0, c0)
            if self.what == "output":
                y = y * 1.001
            if self.what == "row":
                y = torch.cat((y[:, 1:], y[:, :1]), dim=1)
            if self.what == "gradient":
                y = y.detach() + 1.001 * (y - y.detach())
            if self.what == "NaN":
                y = torch.where(torch.arange(y.shape[0])[:, None, None] == 0, math.nan, y)
            if self.what == "shape":
                y = y[:-1]
            if self.what == "error":
                raise ValueError("a fault\nof two lines")
            return y, h_n, c_n

        model.run = run
        return model


@pytest.mark.parametrize("what", ["output", "row", "gradient", "NaN", "error", "shape"])
def test_a_wrong_provider_gets_a_row_and_no_time(monkeypatch, what):
    everyone = {**providers.all_providers(), "wrong": Wrong(what)}
    monkeypatch.setattr(providers, "all_providers", lambda: everyone)
    case = Case("a", 8, 3, 6, dtype="float32", precision="ieee", mode="train")
    found = run(Task("s", case), names=("wrong", "torch.nn.LSTM"))
    bad = found["wrong"]
    assert bad["status"] == ("failed" if what in ("error", "shape") else "wrong") and bad["timing"] is None
    assert "ValueError: a fault" == bad["reason"] if what == "error" else bad["reason"]
    assert found["torch.nn.LSTM"]["status"] == "ok" and found["torch.nn.LSTM"]["timing"]["p50_us"] == 2.0


def test_missing_providers_are_skipped_with_the_reason():
    case = Case("a", 8, 3, 6, dtype="float32", precision="ieee")
    found = run(Task("s", case), names=("torchrl", "haste", "flashrnn", "lstm_triton triton-persistent"))
    for name in ("torchrl", "haste", "flashrnn"):
        assert found[name]["status"] == "skipped" and "not installed" in found[name]["reason"]


def test_a_way_that_cannot_serve_is_skipped_not_failed():
    case = Case("a", 8, 3, 6, dtype="float32", precision="tf32x3", mode="forward")
    names = ("torch.nn.LSTM", "lstm_triton cudnn", "lstm_triton triton-persistent")
    everyone = providers.all_providers() | {"lstm_triton cudnn": providers.Ours("cudnn")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "all_providers", lambda: everyone)
        found = run(Task("s", case), names=names)
    assert [found[name]["status"] for name in names[:2]] == ["skipped", "skipped"]


def test_a_provider_that_fails_while_timed_spares_the_others(monkeypatch):
    calls = []

    class Late(providers.TorchLSTM):
        def make(self, given):
            model = super().make(given)
            right = model.run

            def run(*arguments):
                calls.append(1)
                if len(calls) > 3:
                    raise RuntimeError("tired")
                return right(*arguments)

            model.run = run
            return model

    everyone = {**providers.all_providers(), "late": Late()}
    monkeypatch.setattr(providers, "all_providers", lambda: everyone)
    found = run(Task("s", Case("a", 8, 3, 6, dtype="float32", precision="ieee")), names=("torch.nn.LSTM", "late"))
    assert found["late"]["status"] == "failed" and "tired" in found["late"]["reason"]
    assert found["torch.nn.LSTM"]["status"] == "ok"


def test_a_lost_device_is_fatal():
    with pytest.raises(measure.Fatal):
        measure.reraise_fatal(RuntimeError("CUDA error: an illegal memory access was encountered"))
    measure.reraise_fatal(RuntimeError("CUDA out of memory"))
    measure.reraise_fatal(ValueError("no"))


def test_precision_is_set_alike_on_both_sides_and_put_back():
    settings = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [s.fp32_precision for s in settings]
    with measure.precision(Case("a", 8, 1, 1, dtype="float32", precision="ieee")):
        assert [s.fp32_precision for s in settings] == ["ieee", "ieee"]
    with measure.precision(Case("a", 8, 1, 1, dtype="bfloat16")):
        assert [s.fp32_precision for s in settings] == ["tf32", "tf32"]
    assert [s.fp32_precision for s in settings] == before


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_libraries_that_read_the_older_setting_of_precision_get_the_same_answer(precision):
    older = torch.get_float32_matmul_precision()
    with measure.precision(Case("a", 8, 1, 1, dtype="float32", precision=precision)):
        assert torch.get_float32_matmul_precision() == {"ieee": "highest", "tf32": "high"}[precision]
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
        assert torch.backends.cuda.matmul.fp32_precision == precision
    assert torch.get_float32_matmul_precision() == older


class FakeTorchRL:
    """torchrl's function as the adapter sees it: batch-major, torch's older setting of precision read, in backward too."""

    _has_triton = True

    def __init__(self):
        self.asked = []

    def lstm_triton(
        self, x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype=torch.float32, *, input_precision=None
    ):
        self.asked.append((input_precision, torch.get_float32_matmul_precision()))
        weights = [w_ih, w_hh, b_ih, b_hh]
        y, h_n, c_n, _ = reference.lstm_layer(
            x.transpose(0, 1), hidden[:, 0][None], cell[:, 0][None], [weights], is_init.t().contiguous()
        )
        y.register_hook(lambda g: self.asked.append((input_precision, torch.get_float32_matmul_precision())))
        return y.transpose(0, 1), None, h_n[0], c_n[0]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_torchrl_is_given_the_precision(monkeypatch, precision):
    fake = FakeTorchRL()
    monkeypatch.setattr(peers, "_module", lambda name, package: fake)
    monkeypatch.setattr(peers, "_on_gpu", lambda given, name: None)
    case = Case("a", 5, 3, 6, dtype="float32", precision=precision, mode="train", resets=0.3)
    row = run(Task("s", case), names=("torchrl",))["torchrl"]
    assert row["status"] == "ok", row["reason"]
    assert set(fake.asked) == {(precision, {"ieee": "highest", "tf32": "high"}[precision])}


@pytest.mark.parametrize("form", ["layer", "cell"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_graphs_hold_what_eager_rows_time(monkeypatch, form, mode):
    case = Case("a", 5, 3, 6 if form == "layer" else 1, form=form, dtype="float32", precision="ieee", mode=mode)
    everyone, captured = providers.all_providers(), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def graphed(call):
        assert torch.is_grad_enabled() == (mode == "train")
        captured.append(call)
        return call, call()

    monkeypatch.setattr(timing, "graphed", graphed)
    given = problem.make(case, CPU)
    built = measure.build(everyone["torch.nn.LSTM" if form == "layer" else "torch.nn.LSTMCell"], given)
    judge = measure._Judge(given, problem.truth(given))
    measure._graph(built, judge)
    assert captured == [built.timed]
    names = set(built.call())
    with torch.set_grad_enabled(mode == "train"):
        returned = built.timed()
    assert len(returned) == (1 + 4 if mode == "train" else 3 if form == "layer" else 2), "bias_hh has its gradient too"
    found = built.named(returned)
    assert set(found) == (names - {"y", "h_n", "c_n"} if mode == "train" else names)
    assert max(e["max"] for e in accuracy.errors(found, judge.truth).values()) < 1e-5

    monkeypatch.setattr(timing, "graphed", lambda call: (call, tuple(t * 1.01 for t in call())))
    with pytest.raises(RuntimeError, match="replayed, wrong"):
        measure._graph(built, judge)


def test_every_backend_is_a_provider_and_forced_on_a_gpu():
    assert {f"lstm_triton {backend}" for backend in dispatch.BACKENDS} <= set(providers.all_providers())
    chosen = providers.chosen_for(Case("a", 512, 16, 1024), "timing", "cuda")
    assert {f"lstm_triton {b}" for b in ("auto", "triton-persistent", "triton-stepwise", "cudnn")} <= set(chosen)
    assert "lstm_triton cudnn" not in providers.chosen_for(Case("a", 512, 16, 64, resets=0.1), "timing", "cuda")
    found = run(Task("s", Case("a", 8, 3, 6, dtype="float32", precision="ieee")), names=("lstm_triton cudnn",))
    assert found["lstm_triton cudnn"]["status"] == "skipped" and "GPU" in found["lstm_triton cudnn"]["reason"]


def test_rounds_are_interleaved_and_shuffled():
    clock, seen = FakeClock(), []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    samples = timing.interleaved(calls, clock, 1.0)
    timed = seen[-3 * timing.LEAST_SAMPLES :]
    turns = [timed[k : k + 3] for k in range(0, len(timed), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len({tuple(turn) for turn in turns}) > 1
    found = samples["a"].to_json(4, clock)
    assert found["samples"] == timing.LEAST_SAMPLES and found["us_per_step"] == 0.5 and found["wall_p50_us"] == 3.0
    assert found["confidence"] >= 0.95 and found["clock"] == "fake"


def test_short_calls_are_repeated_until_the_clock_sees_them():
    class Slow(FakeClock):
        sample_seconds = 1e-3

        def sample(self, call, n):
            call()
            return 10.0, 10.0

    assert timing.interleaved({"a": lambda: None}, Slow(), 0.0)["a"].calls == 100


class FakeEvent:
    now = 0.0

    def record(self):
        self.time = FakeEvent.now

    def elapsed_time(self, end):
        return end.time - self.time  # milliseconds


def test_cuda_clock_with_fake_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = timing.CudaClock(CPU, events=FakeEvent)

    def call():
        FakeEvent.now += 0.25

    assert clock.sample(call, 4)[0] == pytest.approx(250.0) and clock.l2 == "warm"
    clock._buffer = torch.ones(4)
    clock.l2 = "flushed"
    assert clock.sample(call, 3)[0] == pytest.approx(250.0)
    assert not clock._buffer.any(), "the cache was not written over"


def test_saved_bytes():
    case = Case("a", 8, 2, 5, dtype="float32", precision="ieee", mode="train")
    given = problem.make(case, CPU)
    all_of = providers.all_providers()
    held = {}
    for name in ("lstm_triton auto recompute", "lstm_triton auto", "torch.nn.LSTM"):
        held[name] = memory.held(measure.build(all_of[name], given), given)["saved"]
    state = 5 * 2 * 8 * 4  # bytes of one tensor like y
    assert all(bytes > state for bytes in held.values()), held


def test_limits_of_what_is_wrong():
    case = Case("a", 8, 2, 5, dtype="float32", precision="ieee")
    torchs = {"y": {"max": 1e-6, "rms": 1e-7}}
    assert accuracy.why_wrong(case, {"y": {"max": 7e-6, "rms": 0.0}}, torchs) is None
    assert "y is off by 1.0e-03" in accuracy.why_wrong(case, {"y": {"max": 1e-3, "rms": 0.0}}, torchs)
    assert accuracy.why_wrong(case, {"y": {"max": math.inf, "rms": 0.0}}, torchs)
    assert accuracy.why_wrong(case, {"y": {"max": 1e-6, "rms": 0.0}}, None) is None
    assert accuracy.error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0], dtype=torch.float64)) == {
        "max": 0.5, "rms": pytest.approx(0.5 / math.sqrt(2)),
    }  # fmt: skip
    assert accuracy.rounding(Case("a", 8, 1, 4, dtype="float32")) == 2**-11
    assert accuracy.rounding(case) == 2**-24


def test_states_of_the_machine_are_read_tolerantly(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(device, "_smi", lambda d, fields: ["1980", "1980", "2619", "[N/A]", "700.00", "41", "0"])
    found = device.state(cuda)
    assert found["sm_clock_mhz"] == 1980 and found["power_w"] is None and found["temperature_c"] == 41
    monkeypatch.setattr(device, "_smi", lambda d, fields: None)
    assert "unread" in device.state(cuda)
    assert device.folder_name({"name": "NVIDIA H200", "type": "cuda"}) == "nvidia-h200"


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")
@pytest.mark.parametrize("programs", [2, 3])
def test_every_exchange_arrives(programs):
    with concurrent_grid(only_cooperative=True, weak=True, jitter=1e-3):
        assert grid_latency.launch(programs, 6, True, CPU).tolist() == [6] * programs
        assert grid_latency.launch(programs, 6, False, CPU).tolist() == [0] * programs


class Idle(FakeClock):
    """Calls nothing: the interpreter is for results, not for times."""

    def sample(self, call, n):
        return 2.0, 3.0


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_tuning_candidates_are_distinct_and_the_shipped_one_is_first(kernel):
    shape = {"form": "cell", "length": 1} if kernel.startswith("cell") else {"form": "layer", "length": 2}
    for H, B, dtype in ((768, 16, "bfloat16"), (128, 1, "float32"), (2048, 256, "float16")):
        case = Case("tune", H, B, dtype=dtype, precision="tf32", **shape)
        found = tune.candidates(kernel, case, (132, 232448))
        assert len(found) > 2 and len(set(found)) == len(found)
        if kernel.startswith("sequence"):
            assert all(c.persistent == found[0].persistent for c in found)
            assert all(
                c.programs * c.block_h >= H and (not c.persistent or c.programs * c.groups <= 132) for c in found
            )


@pytest.mark.parametrize("kernel", ["cell forward", "sequence forward"])
def test_tuning_checks_every_candidate(kernel):
    mode = "train" if kernel.endswith("backward") else "forward"
    shape = {"form": "cell", "length": 1} if kernel.startswith("cell") else {"form": "layer", "length": 2}
    case = Case("tune", 16, 2, mode=mode, dtype="float32", precision="tf32", **shape)
    told = []
    keep = slice(0, 2)
    original = tune.candidates
    tune.candidates = lambda *arguments: original(*arguments)[keep]
    try:
        tune.sweep(kernel, case, CPU, Idle(), lambda k, result: told.append((k, result)), seconds=0.0)
    finally:
        tune.candidates = original
    assert [k for k, _ in told] == [0, 0, 1, 1] and told[1][1].us == 2.0, told
    assert told[1][1].gain == 0.0


def test_the_tuning_table_names_gpu_date_and_gain():
    result = tune.Result({"num_warps": 4, "block_b": 16}, None, 8.0, 10.0)
    text = tune.table([("cell forward", Case("tune", 512, 16, 1, form="cell"), result)], "GPU X", "2030-01-02")
    assert "GPU X, 2030-01-02, +25.0%" in text and "num_warps=4, block_b=16" in text
    assert "No candidate" in tune.table([], "GPU X", "2030-01-02")
    assert tune.run("cpu", None, None, None, None) == 2


def test_host_times_and_first_calls_without_a_gpu():
    assert "checks passed" in run_without_interpreter(__file__)


def check_overhead_is_split():
    found = run(Task("overhead", Case("a", 16, 1, 1, form="cell", dtype="float32"), "overhead"))
    ours, torchs = found["lstm_triton triton"], found["torch.nn.LSTMCell"]
    assert ours["status"] == torchs["status"] == "ok", found
    v = ours["values"]
    assert v["launches"] == 1 and v["total_us"] >= v["launch_us"] > 0 and v["dispatch_us"] > 0
    assert "launches nothing" in ours["label"] and "no GPU" in torchs["label"]


def check_first_calls_compile():
    from lstm_triton.bench import coldstart, null_driver

    case = Case("a", 16, 1, 1, form="cell", dtype="float32", precision="ieee")
    assert null_driver.LABEL
    children = []
    coldstart._child = lambda *arguments: children.append(arguments) or {"first_call_s": 1.0}
    found = run(Task("cold-start", case, "cold-start"))
    assert found["lstm_triton triton"]["values"] == {"empty_first_call_s": 1.0, "warm_first_call_s": 1.0}
    assert len(children) == 3 and children[0][3] == children[1][3], "the second start finds the first one's kernels"


def check_a_first_call_in_this_process():
    import contextlib
    import io
    import json

    from lstm_triton.bench import coldstart

    case = Case("a", 16, 1, 1, form="cell", dtype="float32", precision="ieee")
    request = {"case": case.to_json(), "provider": "lstm_triton triton", "device": "cpu"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert coldstart.main([json.dumps(request)]) == 0
    assert set(json.loads(out.getvalue())) == {"import_s", "first_call_s", "second_call_s"}


def check_the_latency_kernel_compiles():
    import triton

    from lstm_triton.bench import null_driver

    with null_driver.active():
        for exchange in (True, False):
            grid_latency.launch(4, 10, exchange, CPU)
            grid_latency.launch(4, 7, exchange, CPU)
        caches = grid_latency._latency_kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        compiled = list(caches[0].values())
    assert len(compiled) == 2, "the number of steps is a runtime value"
    for kernel in compiled:
        assert "atom" in kernel.asm["ptx"] and "bar.sync" in kernel.asm["ptx"]


if __name__ == "__main__":
    run_checks(globals())
