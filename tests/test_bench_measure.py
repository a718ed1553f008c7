"""Measuring: the truth, checks before times, precision alike on both sides, providers that fail or cannot serve."""

import math

import pytest
import torch
from support.benches import CPU, run

from lstm_triton import dispatch, reference
from lstm_triton.bench import accuracy, measure, peers, problem, providers
from lstm_triton.bench.cases import Case, Task


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


def test_every_backend_is_a_provider_and_forced_on_a_gpu():
    assert {f"lstm_triton {backend}" for backend in dispatch.BACKENDS} <= set(providers.all_providers())
    chosen = providers.chosen_for(Case("a", 512, 16, 1024), "timing", "cuda")
    assert {f"lstm_triton {b}" for b in ("auto", "triton-persistent", "triton-stepwise", "cudnn")} <= set(chosen)
    assert "lstm_triton cudnn" not in providers.chosen_for(Case("a", 512, 16, 64, resets=0.1), "timing", "cuda")
    found = run(Task("s", Case("a", 8, 3, 6, dtype="float32", precision="ieee")), names=("lstm_triton cudnn",))
    assert found["lstm_triton cudnn"]["status"] == "skipped" and "GPU" in found["lstm_triton cudnn"]["reason"]


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
