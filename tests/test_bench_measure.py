"""Measuring: the truth, checks before times, precision alike on both sides, providers that fail or cannot serve."""

import contextlib
import functools
import math
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from support.benches import CPU, IEEE, faulty, run

from lstm_triton import reference
from lstm_triton.bench import measure, peers, problem, providers
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.problem import Judge
from lstm_triton.bench.providers import CUDNN, OURS, REFERENCE, TORCH_CELL
from lstm_triton.kernels.inputs import Segments
from lstm_triton.tolerance import Errors

# ---- who serves, and how precisely ------------------------------------------------------------------------------------


def settings():
    """torch's precision of float32 products, as libraries read it that know the newer settings, or only the older ones."""
    newer = torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return *newer, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32


FULL, TF32 = ("ieee", "ieee", "highest", False), ("tf32", "tf32", "high", True)


class FakeTorchRL:
    """torchrl's function as the adapter sees it: batch-major; torch's precision is read in forward and backward."""

    _has_triton = True

    def __init__(self):
        self.asked = set()

    def lstm_triton(
        self, x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype=torch.float32, *, input_precision=None
    ):
        ask = lambda *_: self.asked.add((input_precision, settings()))  # noqa: E731
        ask()
        starts, segments = (hidden[:, 0][None], cell[:, 0][None]), Segments(is_init.t().contiguous())
        y, h_n, c_n, _ = reference.lstm_layer(x.transpose(0, 1), *starts, [[w_ih, w_hh, b_ih, b_hh]], segments)
        y.register_hook(ask)
        return y.transpose(0, 1), None, h_n[0], c_n[0]


class FakeFlashRNN:
    """flashrnn 1.0.8's function: Wx [B, T, 4, 1, H], states [2, B, 1, 1, H], all states [2, B, T, 1, H] and the last."""

    @staticmethod
    def flashrnn(Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype="bfloat16"):
        assert function == "lstm" and backend == "cuda_fused" and f"torch.{dtype}" == str(Wx.dtype)
        weights = [torch.eye(b.numel(), dtype=b.dtype), R.flatten(0, 2), b.flatten(), None]
        y, _, _, cells = reference.lstm_layer(Wx.flatten(2).transpose(0, 1), *states[:, :, 0, 0][:, None], [weights])
        every = torch.stack((y, cells)).transpose(1, 2)[:, :, :, None]
        return every, every[:, :, -1:]


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


# fastlstm's module has the signature of torch's, and sets torch's precision when it is imported.
FAKE_FASTLSTM = """from torch import backends
from torch.nn import LSTM as FastLSTM
backends.cudnn.rnn.fp32_precision = "none"
"""
EVERYONE = OURS, REFERENCE, CUDNN, TORCH_CELL, *peers.BY_HAND, *reversed(peers.PEERS)
WHO_SERVES = [  # beside this package, by the last words of their names
    ({}, "torch.nn.LSTM torch.nn.LSTMCell loop torchrl haste flashrnn"),
    ({"precision": "tf32"}, "torch.nn.LSTM torch.nn.LSTMCell loop torchrl haste flashrnn fastlstm"),
    ({"precision": "tf32x3"}, "loop torchrl haste flashrnn"),
    ({"dtype": "bfloat16"}, "torch.nn.LSTM torch.nn.LSTMCell loop torchrl flashrnn fastlstm"),
    ({"layers": 2, "bidirectional": True}, "torch.nn.LSTM"),
    ({"proj_size": 3}, "torch.nn.LSTM"),
    ({"resets": 0.3}, "torch.nn.LSTM torch.nn.LSTMCell split packed loop torchrl"),
    ({"rows": "lengths"}, "torch.nn.LSTM split loop"),
    ({"rows": "packed"}, "torch.nn.LSTM"),
    ({"cell_states": True}, "torch.nn.LSTMCell loop torchrl haste flashrnn"),
    ({"cell": "gru", "layers": 2, "bidirectional": True}, "torch.nn.LSTM"),
]


@pytest.mark.parametrize("options, who", WHO_SERVES, ids=str)
def test_who_serves_agrees_with_the_truth(options, who, monkeypatch, tmp_path):
    """Peers' adapters follow their signatures. The precision is the case's for everyone, and then what it was."""
    (tmp_path / "fastlstm").mkdir()
    (tmp_path / "fastlstm" / "lstm.py").write_text(FAKE_FASTLSTM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchrl.modules.tensordict_module._rnn_triton", torchrl := FakeTorchRL())
    monkeypatch.setitem(sys.modules, "haste_pytorch", types.SimpleNamespace(LSTM=FakeHaste))
    monkeypatch.setitem(sys.modules, "flashrnn", FakeFlashRNN)
    monkeypatch.setattr(peers, "DEVICE_TYPES", ("cpu",))
    case = Case("a", 5, 3, 6, input_size=4, mode="train", **IEEE | options)
    before, found = settings(), run(Task("s", case, "accuracy"), EVERYONE)
    assert settings() == before
    del sys.modules["fastlstm"], sys.modules["fastlstm.lstm"]
    good = {name: row for name, row in found.items() if row.status == "ok"}
    gradients = {f"d{name}" for name in problem.make(case, CPU).weights if not name.startswith("bias_hh")}
    assert {name.split()[-1] for name in good} == {"auto", "reference", *who.split()}
    assert all(row.status == "skipped" and row.reason for name, row in found.items() if name not in good)
    for name, row in good.items():
        assert set(row.errors) >= {"y", "h_n", "c_n", "dx", "dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0"} | gradients
        limit = 0.1 if case.dtype == "bfloat16" else 1e-5
        assert 0 < max(e.largest for e in row.errors.values()) < limit, "nobody's own results are the truth"
        assert name in peers.PEERS or {"dh0", "dc0"} <= set(row.errors)
        assert ("untested" in (row.backend_reason or "")) == (name in ("haste", "fastlstm"))
    setting = FULL if case.precision in ("ieee", "tf32x3") else TF32  # which is left on for other dtypes
    assert torchrl.asked == ({(case.precision or "ieee", setting)} if "torchrl" in good else set())


def test_who_cannot_serve_is_skipped_with_the_reason():
    found = run(Task("s", Case("a", 8, 3, 6, **IEEE)), (*peers.PEERS, "lstm_triton cudnn"))
    assert all(row.status == "skipped" for row in found.values())
    assert all("not installed" in found[name].reason for name in peers.PEERS)
    assert "GPU" in found["lstm_triton cudnn"].reason


def test_problems_and_their_truth():
    case = Case("a", 5, 3, 6, **IEEE)
    assert providers.true(case) is providers.PROVIDERS[CUDNN]
    for beyond_torch in ({"resets": 0.3}, {"rows": "lengths"}, {"length": 70000}):
        assert providers.true(replace(case, **beyond_torch)) is providers.PROVIDERS[REFERENCE]
    double = problem.make(Case("a", 5, 3, 6, dtype="float64", mode="train"), CPU)
    true = Judge(double, providers.true(double.case)).truth  # leaves the problem alone
    assert not double.x.requires_grad and not any(w.requires_grad for w in double.weights.values())
    assert all(t.dtype == torch.float64 for t in true.values())
    one, again, other = (problem.make(case, CPU, seed).x for seed in (0, 0, 1))
    assert one.equal(again) and not one.equal(other)
    assert problem.make(Case("a", 5, 3, 6, dtype="bfloat16"), CPU).x.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["layer", "cell"])
def test_a_carried_state_is_carried_and_the_check_starts_anew(form):
    given = problem.make(Case("a", 5, 3, 1, form=form, **IEEE, carried=True), CPU)
    model = providers.PROVIDERS[CUDNN if form == "layer" else OURS](given)
    first = model.results()
    model.call()
    carried = model.call()[0].view(1, 3, 5)
    again = model.results()
    assert all(again[name].equal(t) for name, t in first.items())
    lstm = problem.torch_lstm(Case("a", 5, 3, 2, **IEEE), CPU)
    lstm.load_state_dict(given.weights)
    y, _ = lstm(torch.cat([given.x.view(1, 3, 5)] * 3), (given.h0.view(1, 3, 5), given.c0.view(1, 3, 5)))
    torch.testing.assert_close(carried[0], y[2])


def test_saved_bytes():
    given = problem.make(Case("a", 8, 2, 5, **IEEE, mode="train"), CPU)
    names = f"{OURS} recompute", OURS, CUDNN
    held = {name: measure.held(providers.PROVIDERS[name](given))["saved_bytes"] for name in names}
    assert all(bytes > 5 * 2 * 8 * 4 for bytes in held.values()), f"more than one tensor like y: {held}"


# ---- who is wrong or fails --------------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch):
    """A CPU that captures graphs: it runs what is captured, and replays nothing. The streams that become the current one."""
    entered, stream = [], types.SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(_):
        entered.append("the capture's")
        yield

    fake = dict(Stream=lambda: stream, stream=lambda s: contextlib.nullcontext(), current_stream=lambda: stream)
    fake |= dict(CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: None), graph=graph, set_stream=entered.append)
    for name, stand_in in (fake | dict(synchronize=lambda: None)).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    yield entered
    assert entered == ["the capture's", stream] * (len(entered) // 2), "what fails leaves the current one as well"


def fail(text):
    raise ValueError(text)


def failing_backward(y):
    y.register_hook(lambda grad: fail("does not compile"))
    return y


def wrong_gradient(y):
    return y.detach() + 1.001 * (y - y.detach())


# In which calls of a provider what goes wrong: in all, in the one that is captured, in the first that is timed.
ALWAYS, CAPTURED, TIMED = range(1, 1000), [4], [5]
FAULTS = {
    "output": (ALWAYS, lambda y: y * 1.001, "wrong: .* is off by"),
    "batch row": (ALWAYS, lambda y: y.roll(1, 1), "wrong: .* is off by"),
    "gradient": (ALWAYS, wrong_gradient, "wrong: d.* is off by"),
    "NaN": (ALWAYS, lambda y: y.where(torch.arange(6)[:, None, None] > 0, math.nan), "wrong: y is off by inf"),
    "shape": (ALWAYS, lambda y: y[:-1], "in its backward: RuntimeError: Mismatch in shape"),
    "error": (ALWAYS, lambda y: fail("a fault\nof two lines"), "ValueError: a fault$"),
    "backward": (ALWAYS, failing_backward, "in its backward: ValueError: does not compile$"),
    "replay": (CAPTURED, lambda y: y * 1.001, "CUDA graph: RuntimeError: replayed, wrong: .* is off by"),
    "replay of backward": (CAPTURED, wrong_gradient, "CUDA graph: RuntimeError: replayed, wrong: d.* is off by"),
    "capture": (CAPTURED, lambda y: fail("not permitted"), "CUDA graph: ValueError: not permitted"),
    "late": (TIMED, lambda y: fail("tired"), "ValueError: tired"),
}


def test_a_provider_that_is_wrong_or_fails_gets_a_row_and_no_time(monkeypatch, streams):
    """The others are measured all the same, and so is the provider itself where it has not failed: eager or as a graph."""
    for name, (at, fault, _) in FAULTS.items():
        monkeypatch.setitem(providers.PROVIDERS, name, functools.partial(faulty, fault=fault, at=at))
    case = Case("a", 8, 3, 6, mode="train", **IEEE)
    found = run(Task("s", case, executions=("eager", "graph")), (*FAULTS, CUDNN))
    for name, (at, _, reason) in FAULTS.items():
        concerned = [name] * (at is not CAPTURED) + [f"{name} graph"] * (at is not TIMED)
        for row in map(found.pop, concerned):
            assert row.status == ("wrong" if reason.startswith("wrong") else "failed"), name
            assert row.timing is None and re.match(reason, row.reason), row.reason
            assert name != "NaN" or "y" not in row.errors, "JSON has no infinities"
    assert set(found) == {CUDNN, f"{CUDNN} graph", "replay", "replay of backward", "capture", "late graph"}
    assert all(row.status == "ok" and row.timing.p50_us == 2.0 for row in found.values())


def test_a_graph_of_inference_records_no_gradients(monkeypatch, streams):
    """As eager rows, whose calls it holds."""
    seen = []
    noting = functools.partial(faulty, fault=lambda y: seen.append(torch.is_grad_enabled()) or y)
    monkeypatch.setitem(providers.PROVIDERS, "noting", noting)
    run(Task("s", Case("a", 8, 3, 6, **IEEE), executions=("eager", "graph")), ("noting",))
    assert streams and not any(seen)


def test_limits_of_what_is_wrong():
    def said(torchs=None, precision="ieee", **found):
        given = problem.make(Case("a", 2, 1, 1, dtype="float32", precision=precision), CPU)
        judge = Judge(given, providers.PROVIDERS[CUDNN])
        judge.torchs = {"y": Errors(1, 1e-6, 1e-7)} if torchs is None else torchs
        return judge.why_wrong({name: Errors(1, largest, 0.0) for name, largest in found.items()})

    assert said(y=7e-6) is None
    assert "y is off by 1.0e-03" in said(y=1e-3)
    assert "c_n is off" in said({}, y=1e-3, c_n=2e-3)
    assert "y is off by inf" in said(y=math.inf)
    assert said({}, y=1e-6) is None
    assert said(y=1e-3, precision="tf32") is None, "roundings to 11 bits, not 24"
