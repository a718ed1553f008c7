"""Measuring: the truth, checks before times, precision alike on both sides, providers that fail or cannot serve."""

import functools
import math
import sys
from dataclasses import replace

import pytest
import torch
from support.benches import CPU, IEEE, run

from lstm_triton import dispatch, reference
from lstm_triton.bench import peers, problem, providers
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.problem import Judge
from lstm_triton.bench.problem import precision as torchs_precision
from lstm_triton.kernels.inputs import Segments
from lstm_triton.tolerance import Errors


@pytest.mark.parametrize(
    "options, by_hand",
    [
        ({}, "loop"),
        ({"layers": 2, "bidirectional": True}, ""),
        ({"proj_size": 3}, ""),
        ({"resets": 0.3}, "split packed loop"),
        ({"rows": "lengths"}, "split loop"),
        ({"rows": "packed"}, ""),
        ({"cell_states": True}, "loop"),
        ({"cell": "gru", "layers": 2, "bidirectional": True}, ""),
    ],
    ids=str,
)
def test_providers_agree_with_the_truth(options, by_hand):
    case = Case("a", 5, 3, 6, input_size=4, **IEEE, mode="train", **options)
    given = replace(problem.make(case, CPU), states=True)
    judge = Judge(given, providers.true(given.case))
    true = judge.truth
    assert all(t.dtype == torch.float64 for t in true.values())
    assert {"y", "h_n", "c_n", "dx", "dh0", "dc0", "dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0"} <= set(true)
    unable = set()
    for name in ("lstm_triton auto", "lstm_triton reference", "torch.nn.LSTM", "torch.nn.LSTMCell", *peers.BY_HAND):
        try:
            found = judge.errors(providers.PROVIDERS[name](given))
        except problem.Unavailable:
            unable.add(name)
            continue
        assert set(found) >= set(true) - {"dh0", "dc0"}
        assert max(e.largest for e in found.values()) < 1e-5, (name, found)
    assert {name.split()[-1] for name in peers.BY_HAND.keys() - unable} == set(by_hand.split())
    assert unable - peers.BY_HAND.keys() <= {"torch.nn.LSTMCell", *["torch.nn.LSTM"] * ("cell_states" in options)}


def test_problems_and_their_truth():
    case = Case("a", 5, 3, 6, **IEEE)
    assert providers.true(case) is providers.PROVIDERS["torch.nn.LSTM"]
    for beyond_torch in ({"resets": 0.3}, {"rows": "lengths"}, {"length": 70000}):
        assert providers.true(replace(case, **beyond_torch)) is providers.PROVIDERS["lstm_triton reference"]
    double = problem.make(Case("a", 5, 3, 6, dtype="float64", mode="train"), CPU)
    Judge(double, providers.true(double.case))  # leaves the problem alone
    assert not double.x.requires_grad and not any(w.requires_grad for w in double.weights.values())
    one, again, other = (problem.make(case, CPU, seed).x for seed in (0, 0, 1))
    assert one.equal(again) and not one.equal(other)
    assert problem.make(Case("a", 5, 3, 6, dtype="bfloat16"), CPU).x.dtype == torch.bfloat16


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError("does not compile")


def fail(text):
    raise ValueError(text)


FAULTS = {
    "output": lambda y: y * 1.001,
    "row": lambda y: torch.cat((y[:, 1:], y[:, :1]), dim=1),
    "gradient": lambda y: y.detach() + 1.001 * (y - y.detach()),
    "NaN": lambda y: torch.where(torch.arange(y.shape[0])[:, None, None] == 0, math.nan, y),
    "shape": lambda y: y[:-1],
    "error": lambda y: fail("a fault\nof two lines"),
    "backward": FailsInBackward.apply,
}


def with_fault(given, fault):
    """torch.nn.LSTM, `fault` applied to its output."""
    model = providers.torchs_lstm(given)
    right = model.run

    def run(x, state):
        y, state = right(x, state)
        return fault(y), state

    model.run = run
    return model


def test_a_wrong_provider_gets_a_row_and_no_time(monkeypatch):
    for what, fault in FAULTS.items():
        monkeypatch.setitem(providers.PROVIDERS, what, functools.partial(with_fault, fault=fault))
    found = run(Task("s", Case("a", 8, 3, 6, mode="train", **IEEE)), names=(*FAULTS, "torch.nn.LSTM"))
    said = {"error": "ValueError: a fault", "backward": "in its backward: RuntimeError: does not compile"}
    for what in FAULTS:
        bad = found[what]
        assert bad.timing is None and bad.status == ("failed" if what in ("shape", *said) else "wrong")
        assert bad.reason == said.get(what, bad.reason)
    bad = found["NaN"]
    assert "y is off by inf" in bad.reason and "y" not in bad.errors, "JSON has no infinities"
    assert found["torch.nn.LSTM"].status == "ok" and found["torch.nn.LSTM"].timing.p50_us == 2.0


def test_a_provider_that_fails_while_timed_spares_the_others(monkeypatch):
    calls = []

    def tired(y):
        calls.append(1)
        return y if len(calls) <= 3 else fail("tired")

    monkeypatch.setitem(providers.PROVIDERS, "late", functools.partial(with_fault, fault=tired))
    found = run(Task("s", Case("a", 8, 3, 6, **IEEE)), names=("torch.nn.LSTM", "late"))
    assert found["late"].status == "failed" and "tired" in found["late"].reason
    assert found["torch.nn.LSTM"].status == "ok"


@pytest.mark.parametrize("form", ["layer", "cell"])
def test_a_carried_state_is_carried_and_the_check_starts_anew(form):
    given = problem.make(Case("a", 5, 3, 1, form=form, **IEEE, carried=True), CPU)
    model = providers.PROVIDERS["torch.nn.LSTM" if form == "layer" else "lstm_triton auto"](given)
    first = model.results()
    model.call()
    carried = model.call()[0].view(1, 3, 5)
    again = model.results()
    assert all(again[name].equal(t) for name, t in first.items())
    lstm = problem.torch_lstm(Case("a", 5, 3, 2, **IEEE), CPU)
    lstm.load_state_dict(given.weights)
    y, _ = lstm(torch.cat([given.x.view(1, 3, 5)] * 3), (given.h0.view(1, 3, 5), given.c0.view(1, 3, 5)))
    torch.testing.assert_close(carried[0], y[2])


def test_who_cannot_serve_is_skipped_with_the_reason():
    found = run(Task("s", Case("a", 8, 3, 6, **IEEE)), names=(*peers.PEERS, "lstm_triton cudnn"))
    assert all(row.status == "skipped" for row in found.values())
    assert all("not installed" in found[name].reason for name in peers.PEERS)
    assert "GPU" in found["lstm_triton cudnn"].reason
    case = Case("a", 8, 3, 6, dtype="float32", precision="tf32x3")
    found = run(Task("s", case), names=("torch.nn.LSTM", "lstm_triton cudnn"))
    assert [row.status for row in found.values()] == ["skipped"] * 2


@pytest.mark.parametrize("dtype, precision", [("float32", "ieee"), ("float32", "tf32"), ("bfloat16", "")])
def test_precision_is_set_alike_on_both_sides_and_put_back(dtype, precision):
    """For libraries that read the older setting, too."""

    def settings():
        newer = torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        return *newer, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32

    before = settings()
    with torchs_precision(Case("a", 8, 1, 1, dtype=dtype, precision=precision)):
        ieee = precision == "ieee"
        assert settings() == (("ieee", "ieee", "highest", False) if ieee else ("tf32", "tf32", "high", True))
    assert settings() == before


class FakeTorchRL:
    """torchrl's function as the adapter sees it: batch-major, torch's older setting of precision read, in backward too."""

    _has_triton = True

    def __init__(self):
        self.asked = set()

    def lstm_triton(
        self, x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype=torch.float32, *, input_precision=None
    ):
        ask = lambda *_: self.asked.add((input_precision, torch.get_float32_matmul_precision()))  # noqa: E731
        ask()
        starts, segments = (hidden[:, 0][None], cell[:, 0][None]), Segments(is_init.t().contiguous())
        y, h_n, c_n, _ = reference.lstm_layer(x.transpose(0, 1), *starts, [[w_ih, w_hh, b_ih, b_hh]], segments)
        y.register_hook(ask)
        return y.transpose(0, 1), None, h_n[0], c_n[0]


class FakeFlashRNN:
    """flashrnn 1.0.8's function: Wx [B, T, 4, 1, H], states [2, B, 1, 1, H], all states [2, B, T, 1, H] and the last."""

    @staticmethod
    def flashrnn(Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype="bfloat16"):
        assert function == "lstm" and backend == "cuda_fused" and dtype == "float32"
        (h, c), found = states[:, :, 0, 0], []
        for z in Wx[:, :, :, 0].unbind(1):
            i, f, g, o = (z + torch.einsum("bp,gdp->bgd", h, R[:, 0]) + b[:, 0]).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            found.append(torch.stack((h, c)))
        every = torch.stack(found, dim=2)[:, :, :, None]
        return every, every[:, :, -1:]


class FakeFastLSTM(torch.nn.LSTM):
    """fastlstm's module, as its signature has it."""

    def __init__(self, input_size, hidden_size, num_layers=1, version="fast", device=None, dtype=None):
        super().__init__(input_size, hidden_size, num_layers, device=device, dtype=dtype)


class FakeHaste(torch.nn.Module):
    """haste_pytorch.LSTM 0.4.0: weights transposed, one bias, gates in the order i, g, f, o."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        sizes = {"kernel": (input_size, 4 * hidden_size), "recurrent_kernel": (hidden_size, 4 * hidden_size)}
        for name, size in (sizes | {"bias": (4 * hidden_size,)}).items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(size)))

    def forward(self, x, state):
        tensors = self.kernel, self.recurrent_kernel, self.bias
        w_ih, w_hh, b = (torch.cat([w.chunk(4, -1)[k] for k in (0, 2, 1, 3)], -1).t() for w in tensors)
        y, h_n, c_n, _ = reference.lstm_layer(x, *state, [[w_ih, w_hh, b, None]])
        return y, (h_n, c_n)


FAKES = {
    "torchrl": ("torchrl.modules.tensordict_module._rnn_triton", FakeTorchRL()),
    "haste": ("haste_pytorch", type("haste", (), {"LSTM": FakeHaste})),
    "flashrnn": ("flashrnn", FakeFlashRNN),
    "fastlstm": ("fastlstm.lstm", type("lstm", (), {"FastLSTM": FakeFastLSTM})),
}


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_adapters_follow_their_peers_signatures_and_give_the_precision(monkeypatch, precision):
    monkeypatch.setattr(peers, "DEVICE_TYPES", ("cpu",))
    for name, module in FAKES.values():
        monkeypatch.setitem(sys.modules, name, module)
    FAKES["torchrl"][1].asked.clear()
    case = Case("a", 5, 3, 6, input_size=4, dtype="float32", precision=precision, mode="train")
    found = run(Task("s", case), names=FAKES)
    found |= run(Task("s", replace(case, resets=0.3)), names=("torchrl",))
    if precision == "ieee":
        skipped = found.pop("fastlstm")
        assert skipped.status == "skipped" and "tf32" in skipped.reason
    for name, row in found.items():
        assert row.status == "ok", row.reason
        assert set(row.errors) >= {"y", "h_n", "c_n", "dx", "dweight_hh_l0", "dbias_ih_l0"}
        assert ("untested" in (row.backend_reason or "")) == (name in ("haste", "fastlstm"))
    assert FAKES["torchrl"][1].asked == {(precision, {"ieee": "highest", "tf32": "high"}[precision])}


def test_a_peer_that_sets_torchs_precision_when_imported_does_not_keep_it(monkeypatch, tmp_path):
    (tmp_path / "fastlstm").mkdir()
    (tmp_path / "fastlstm" / "lstm.py").write_text("import torch; torch.backends.cudnn.rnn.fp32_precision = 'tf32'")
    monkeypatch.syspath_prepend(str(tmp_path))
    case = Case("a", 5, 3, 6, **IEEE)
    with torchs_precision(case):
        with pytest.raises(problem.Unavailable, match="computes in float16"):
            peers.fastlstm(problem.make(case, CPU))
        assert torch.backends.cudnn.rnn.fp32_precision == "ieee"


def test_every_backend_is_a_provider_and_forced_on_a_gpu():
    chosen = {name for name, _ in providers.pairs_of(Task("s", Case("a", 512, 16, 1024)), "cuda")}
    forced = {"lstm_triton auto", "lstm_triton triton-persistent", "lstm_triton triton-stepwise", "lstm_triton cudnn"}
    assert forced <= chosen and {f"lstm_triton {backend}" for backend in dispatch.BACKENDS} <= set(providers.PROVIDERS)
    assert "cudnn" not in str(providers.pairs_of(Task("s", Case("a", 512, 16, 64, resets=0.1)), "cuda"))


def test_limits_of_what_is_wrong():
    def said(torchs=None, precision="ieee", **found):
        given = problem.make(Case("a", 2, 1, 1, dtype="float32", precision=precision), CPU)
        judge = Judge(given, providers.PROVIDERS["torch.nn.LSTM"])
        judge.torchs = {"y": Errors(1, 1e-6, 1e-7)} if torchs is None else torchs
        return judge.why_wrong({name: Errors(1, largest, 0.0) for name, largest in found.items()})

    assert said(y=7e-6) is None
    assert "y is off by 1.0e-03" in said(y=1e-3)
    assert "c_n is off" in said({}, y=1e-3, c_n=2e-3)
    assert "y is off by inf" in said(y=math.inf)
    assert said({}, y=1e-6) is None
    assert said(y=1e-3, precision="tf32") is None, "roundings to 11 bits, not 24"
