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
from lstm_triton.bench.problem import precision as torchs_precision
from lstm_triton.bench.providers import CUDNN, OURS, REFERENCE, TORCH_CELL
from lstm_triton.kernels.inputs import Segments
from lstm_triton.tolerance import Errors

# ---- other projects' functions, as their adapters see them ------------------------------------------------------------


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


# ---- who serves, and how precisely ------------------------------------------------------------------------------------

EVERYONE = OURS, REFERENCE, CUDNN, TORCH_CELL, *peers.BY_HAND, *peers.PEERS
WHO_SERVES = [  # beside this package, by the last words of their names
    ({}, "torch.nn.LSTM torch.nn.LSTMCell loop torchrl haste flashrnn"),
    ({"precision": "tf32"}, "torch.nn.LSTM torch.nn.LSTMCell loop torchrl haste flashrnn fastlstm"),
    ({"precision": "tf32x3"}, "loop torchrl haste flashrnn"),
    ({"layers": 2, "bidirectional": True}, "torch.nn.LSTM"),
    ({"proj_size": 3}, "torch.nn.LSTM"),
    ({"resets": 0.3}, "torch.nn.LSTM torch.nn.LSTMCell split packed loop torchrl"),
    ({"rows": "lengths"}, "torch.nn.LSTM split loop"),
    ({"rows": "packed"}, "torch.nn.LSTM"),
    ({"cell_states": True}, "torch.nn.LSTMCell loop torchrl haste flashrnn"),
    ({"cell": "gru", "layers": 2, "bidirectional": True}, "torch.nn.LSTM"),
]


@pytest.mark.parametrize("options, who", WHO_SERVES, ids=str)
def test_who_serves_agrees_with_the_truth(options, who, monkeypatch):
    """Peers' adapters follow their signatures, and give them the precision."""
    torchrl = FakeTorchRL()
    monkeypatch.setattr(peers, "DEVICE_TYPES", ("cpu",))
    for name, module in {
        "torchrl.modules.tensordict_module._rnn_triton": torchrl,
        "haste_pytorch": types.SimpleNamespace(LSTM=FakeHaste),
        "flashrnn": FakeFlashRNN,
        "fastlstm.lstm": types.SimpleNamespace(FastLSTM=FakeFastLSTM),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    case = Case("a", 5, 3, 6, input_size=4, mode="train", **IEEE | options)
    found = run(Task("s", case, "accuracy"), EVERYONE)
    good = {name: row for name, row in found.items() if row.status == "ok"}
    assert {name.split()[-1] for name in good} == {"auto", "reference", *who.split()}
    assert all(row.status == "skipped" and row.reason for name, row in found.items() if name not in good)
    for name, row in good.items():
        assert set(row.errors) >= {"y", "h_n", "c_n", "dx", "dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0"}
        assert 0 < max(e.largest for e in row.errors.values()) < 1e-5, "nobody's own results are the truth"
        assert name in peers.PEERS or {"dh0", "dc0"} <= set(row.errors)
        assert ("untested" in (row.backend_reason or "")) == (name in ("haste", "fastlstm"))
    setting = "high" if case.precision == "tf32" else "highest"
    assert torchrl.asked == ({(case.precision, setting)} if "torchrl" in good else set())


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


@pytest.mark.parametrize("dtype, precision", [("float32", "ieee"), ("float32", "tf32"), ("bfloat16", "")])
def test_precision_is_set_alike_on_both_sides_and_put_back(dtype, precision, monkeypatch, tmp_path):
    """For libraries that read the older setting, too; and a library that sets it when it is imported does not keep it."""
    (tmp_path / "fastlstm").mkdir()
    (tmp_path / "fastlstm" / "lstm.py").write_text("import torch; torch.backends.cudnn.rnn.fp32_precision = 'none'")
    monkeypatch.syspath_prepend(str(tmp_path))

    def settings():
        newer = torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        return *newer, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32

    before, expected = settings(), ("tf32", "tf32", "high", True)
    case = Case("a", 8, 1, 1, dtype=dtype, precision=precision)
    with torchs_precision(case):
        with pytest.raises(problem.Unavailable, match="runs on GPUs only|computes in float16"):
            peers.fastlstm(problem.make(case, CPU))
        del sys.modules["fastlstm.lstm"]
        assert settings() == (("ieee", "ieee", "highest", False) if precision == "ieee" else expected)
    assert settings() == before


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


CHECKED, CAPTURED, TIMED = range(1, 1000), [4], [5]  # in which calls: all, that of the capture, the first that is timed
# What goes wrong, when, and what becomes of the eager row and of that of a graph.
FAULTS = {
    "output": (lambda y: y * 1.001, CHECKED, "wrong", "wrong", "is off by"),
    "batch row": (lambda y: y.roll(1, 1), CHECKED, "wrong", "wrong", "is off by"),
    "gradient": (lambda y: y.detach() + 1.001 * (y - y.detach()), CHECKED, "wrong", "wrong", "d.* is off by"),
    "NaN": (
        lambda y: y.where(torch.arange(6)[:, None, None] > 0, math.nan),
        CHECKED,
        "wrong",
        "wrong",
        "y is off by inf",
    ),
    "shape": (lambda y: y[:-1], CHECKED, "failed", "failed", ""),
    "error": (lambda y: fail("a fault\nof two lines"), CHECKED, "failed", "failed", "^ValueError: a fault$"),
    "backward": (failing_backward, CHECKED, "failed", "failed", "^in its backward: ValueError: does not compile$"),
    "replay": (lambda y: y * 1.001, CAPTURED, "ok", "failed", "CUDA graph: .*replayed, wrong: .* is off by"),
    "capture": (lambda y: fail("not permitted"), CAPTURED, "ok", "failed", "CUDA graph: ValueError: not permitted"),
    "late": (lambda y: fail("tired"), TIMED, "failed", "ok", "tired"),
}


def test_a_provider_that_is_wrong_or_fails_gets_a_row_and_no_time(monkeypatch, streams):
    """The others are measured all the same."""
    for name, (fault, at, *_) in FAULTS.items():
        monkeypatch.setitem(providers.PROVIDERS, name, functools.partial(faulty, fault=fault, at=at))
    case = Case("a", 8, 3, 6, mode="train", **IEEE)
    found = run(Task("s", case, executions=("eager", "graph")), (*FAULTS, CUDNN))
    for name, (_, _, eager, graph, reason) in FAULTS.items():
        both = found[name], found[f"{name} graph"]
        assert [row.status for row in both] == [eager, graph], name
        for row in both:
            if row.status == "ok":
                assert row.timing.p50_us == 2.0 and row.reason is None
            else:
                assert row.timing is None and re.search(reason, row.reason), row.reason
    assert "y" not in found["NaN"].errors, "JSON has no infinities"
    assert found[CUDNN].timing.p50_us == found[f"{CUDNN} graph"].timing.p50_us == 2.0


@pytest.mark.parametrize("form", ["layer", "cell"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_graphs_hold_what_eager_rows_time(monkeypatch, streams, form, mode):
    graphed, held = measure.graphed, []

    def spied(call):
        replay, returned = graphed(call)
        held.append(len(returned))
        return replay, returned

    monkeypatch.setattr(measure, "graphed", spied)
    case = Case("a", 5, 3, 6 if form == "layer" else 1, form=form, **IEEE, mode=mode)
    found = run(Task("s", case, executions=("eager", "graph")), (providers.torchs(case),))
    assert [row.status for row in found.values()] == ["ok", "ok"]
    assert held == [3 + 5 * (mode == "train")], "with gradients of the input and four parameters"


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
