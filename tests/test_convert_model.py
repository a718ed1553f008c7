"""convert, to_torch and explain on models, and the choice of a layer's backend."""

import copy
import pickle

import pytest
import torch
from support.lstms import assert_close, flat

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout, convert, dispatch, explain, to_torch
from lstm_triton.dispatch import Call, Choice, Environment, choose_layer
from lstm_triton.kernels import interpreter

OPTIONS = {"backend": "triton", "precision": "ieee"}


class Own(torch.nn.LSTM):
    """A class of somebody else's, with a forward that may rely on anything in torch's."""

    def forward(self, input, hx=None):
        return super().forward(input, hx)


class Model(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.layer = torch.nn.LSTM(2, 3, 2, bidirectional=True, dropout=0.25, dtype=torch.float64, device=device)
        cell = torch.nn.LSTMCell(6, 3, dtype=torch.float64, device=device)
        self.nested = torch.nn.ModuleDict({"cells": torch.nn.ModuleList([cell]), "again": self.layer})
        self.others = torch.nn.ModuleList([torch.nn.GRU(2, 3), torch.nn.RNN(2, 3), torch.nn.GRUCell(2, 3)])
        self.eval()

    def forward(self, x):
        y, (h, c) = self.layer(x)
        h, c = self.nested["cells"][0](y[-1], (h[0], c[0]))
        return y, (h, c)


@pytest.fixture
def model(device):
    return Model(device)


@pytest.fixture
def x(device):
    return torch.randn(4, 2, 2, dtype=torch.float64, device=device)


def _lstms(model):
    return model.layer, model.nested["cells"][0]


def test_everything_of_torchs_is_converted_in_place(model, x):
    expected = flat(model(x))
    model.others.append(Own(2, 3))
    before = {name: id(p) for name, p in model.named_parameters()}
    others = [type(m) for m in model.others]
    with pytest.warns(UserWarning, match=r"convert\(\) left others.3 \(Own\): its class Own has a forward of its own"):
        assert convert(model, **OPTIONS, recompute=True) is model
    layer, cell = _lstms(model)
    assert type(layer) is torch.nn.LSTM and type(cell) is torch.nn.LSTMCell and model.nested["again"] is layer
    for module in (layer, cell):
        assert (module.backend, module.precision) == ("triton", "ieee")
    assert layer.recompute and (layer.num_layers, layer.dropout, layer.training) == (2, 0.25, False)
    assert [type(m) for m in model.others] == others
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert_close(flat(model(x)), expected)
    y, _, cells = layer(x, return_cell_states=True)
    assert cells.shape == y.shape


def test_round_trip(model, x):
    attributes = [set(m.__dict__) for m in _lstms(model)]
    original, expected = copy.deepcopy(model), flat(model(x))
    to_torch(convert(model, **OPTIONS))
    for ours, theirs, names in zip(_lstms(model), _lstms(original), attributes):
        assert type(ours) is type(theirs) and repr(ours) == repr(theirs) and set(ours.__dict__) == names
    assert all(map(torch.equal, flat(model(x)), expected))
    assert list(model.state_dict()) == list(original.state_dict())
    assert to_torch(model) is model, "nothing to do"
    assert type(convert(model, compilable=True).layer) is LSTM
    to_torch(model)
    assert type(model.layer) is torch.nn.LSTM and set(model.layer.__dict__) == attributes[0]


def test_a_single_module():
    x = torch.randn(4, 1, 2)
    assert convert(torch.nn.LSTM(2, 3))(x, return_cell_states=True)[2].shape == (4, 1, 3)
    assert convert(torch.nn.LSTMCell(2, 3), backend="reference").backend == "reference"
    assert type(to_torch(LSTM(2, 3))) is torch.nn.LSTM
    assert type(to_torch(LSTMCell(2, 3))) is torch.nn.LSTMCell


def test_optimizers_hooks_and_gradients_go_on(model, x):
    """Half the training before the conversion, half after it: the same as with torch's all the way."""
    theirs = copy.deepcopy(model)
    calls, results = [], []
    for candidate, converted in ((theirs, False), (model, True)):
        optimizer = torch.optim.Adam(candidate.layer.parameters(), lr=0.1)
        candidate.layer.register_forward_hook(lambda module, args, output: calls.append(type(module)))
        for step in range(4):
            if converted and step == 2:
                convert(candidate, **OPTIONS)
            optimizer.zero_grad()
            candidate(x)[0].pow(2).sum().backward()
            optimizer.step()
        results.append([p.detach() for p in candidate.layer.parameters()])
    assert calls == [torch.nn.LSTM] * 8
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)  # Adam divides small gradients by their size


def test_compilable(model, x):
    expected = flat(model(x))
    convert(model, **OPTIONS, compilable=True)
    layer = model.layer
    assert type(layer) is LSTM and (layer.backend, layer.precision) == ("triton", "ieee")
    assert_close(flat(model(x)), expected)
    assert_close(flat(torch.compile(model.layer, backend="eager", fullgraph=True)(x))[:1], expected[:1])
    assert type(pickle.loads(pickle.dumps(layer))) is LSTM


def test_copies_and_pickles_of_converted_models(model, x):
    expected = flat(model(x))
    for again in (copy.deepcopy(convert(model, **OPTIONS)), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(again.layer) is torch.nn.LSTM and again.layer.backend == "triton"
        assert_close(flat(again(x)), expected)
        assert again.layer(x, return_cell_states=True)[2].shape == expected[0].shape


@pytest.mark.parametrize("options", [{"backend": "cuda"}, {"precision": "fp32"}], ids=str)
def test_unknown_options_change_nothing(options, model):
    with pytest.raises(ValueError, match="must be one of"):
        convert(model, **options)
    assert type(model.layer) is torch.nn.LSTM


# ---- the choice of a backend ---------------------------------------------------------------------------------------

CPU = Environment(has_triton=True, interpreting=False, capability=None)
INTERPRETER = Environment(has_triton=True, interpreting=True, capability=None)
BARE = Environment(has_triton=False, interpreting=False, capability=None)
SM75, SM90 = (Environment(True, False, capability) for capability in ((7, 5), (9, 0)))
PLAIN, SEGMENTS = Call(True, False, None), Call(False, False, None)
LONG, TF32X3 = Call(True, True, None), Call(True, False, "tf32x3")
NO_CUDNN = "cuDNN has no resets, lengths, cell states or recomputation"
OLD_GPU = r"compute capability 7\.5 is below 8\.0"
UNMEASURED = "the persistent kernels are not yet measured on this GPU"

CHOICES = [
    ("cpu", CPU, PLAIN, "torch", "on a CPU the kernels run only in Triton's interpreter"),
    (
        "cpu",
        CPU,
        SEGMENTS,
        "torch",
        "only in Triton's interpreter .*; but .*cell states and reset states run step by step",
    ),
    ("cpu", CPU, LONG, "torch", "interpreter"),
    ("cpu", CPU, TF32X3, "torch", "interpreter"),
    ("cpu", INTERPRETER, PLAIN, "torch", "on a CPU torch's own kernels are faster than Triton's interpreter"),
    ("cpu", INTERPRETER, SEGMENTS, "torch", "faster than Triton's interpreter; but .*cell states"),
    ("cpu", BARE, PLAIN, "torch", "triton is not installed"),
    ("mps", CPU, PLAIN, "torch", "the kernels run on NVIDIA GPUs, not on 'mps'"),
    ("mps", CPU, SEGMENTS, "reference", "torch's own kernels have no resets"),
    ("cuda", SM75, PLAIN, "cudnn", OLD_GPU),
    ("cuda", SM75, SEGMENTS, "reference", "torch's own kernels have no resets"),
    ("cuda", SM75, LONG, "reference", f"cuDNN takes no more than 65535 steps, and .*{OLD_GPU}"),
    ("cuda", SM75, TF32X3, "reference", f"cuDNN has no tf32x3, and .*{OLD_GPU}"),
    ("cuda", BARE, PLAIN, "cudnn", "triton is not installed"),
    ("cuda", SM90, PLAIN, "cudnn", UNMEASURED),
    ("cuda", SM90, SEGMENTS, "triton-stepwise", f"{NO_CUDNN}; {UNMEASURED}"),
    ("cuda", SM90, LONG, "triton-stepwise", f"cuDNN takes no more than 65535 steps; {UNMEASURED}"),
    ("cuda", SM90, TF32X3, "triton-stepwise", f"cuDNN has no tf32x3; {UNMEASURED}"),
]


@pytest.mark.parametrize("device_type, env, call, backend, reason", CHOICES)
def test_automatic_choice(device_type, env, call, backend, reason):
    choice = choose_layer("auto", device_type, torch.float32, env, call)
    assert choice.backend == backend
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(choice.reason)


FORCED = ("triton", "triton-persistent", "triton-stepwise")


@pytest.mark.parametrize("backend", FORCED)
def test_forced_kernels(backend):
    for device_type, env in (("cuda", SM90), ("cpu", INTERPRETER)):
        for call in (PLAIN, SEGMENTS, LONG, TF32X3):
            assert choose_layer(backend, device_type, torch.float16, env, call) == Choice(backend, "asked for")
    for device_type, env, dtype, reason in (
        ("cpu", CPU, torch.float32, r"only in Triton's interpreter \(TRITON_INTERPRET=1\)"),
        ("cpu", BARE, torch.float32, "triton is not installed"),
        ("mps", CPU, torch.float32, "not on 'mps'"),
        ("cuda", SM75, torch.float32, OLD_GPU),
        ("cuda", Environment(True, True, (9, 0)), torch.float32, "the interpreter works on CPU tensors"),
        ("cuda", SM90, torch.float8_e4m3fn, "the kernels know no torch.float8_e4m3fn"),
    ):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve: .*{reason}"):
            choose_layer(backend, device_type, dtype, env, PLAIN)


def test_forced_cudnn_and_reference():
    for env in (SM75, SM90, BARE):
        assert choose_layer("cudnn", "cuda", torch.float32, env, PLAIN) == Choice("cudnn", "asked for")
    for device_type, call, reason in (
        ("cpu", PLAIN, "cuDNN runs on NVIDIA GPUs, not on 'cpu'"),
        ("cuda", SEGMENTS, NO_CUDNN),
        ("cuda", LONG, "cuDNN takes no more than 65535 steps"),
        ("cuda", TF32X3, "cuDNN has no tf32x3"),
    ):
        with pytest.raises(RuntimeError, match=f"backend='cudnn' cannot serve: {reason}"):
            choose_layer("cudnn", device_type, torch.float32, SM90, call)
    for device_type, env in (("cpu", BARE), ("cuda", SM75), ("mps", CPU)):
        assert choose_layer("reference", device_type, torch.float32, env, SEGMENTS) == Choice("reference", "asked for")
    with pytest.raises(ValueError, match="backend must be one of 'auto', .*, got 'gpu'"):
        choose_layer("gpu", "cpu", torch.float32, CPU, PLAIN)


# ---- explain -------------------------------------------------------------------------------------------------------


def test_explain(monkeypatch):
    monkeypatch.setattr(dispatch, "environment", lambda device: SM90 if device.type == "cuda" else CPU)
    lstm = LSTM(2, 3)
    start = "LSTM(2, 3) on cpu, torch.float32: torch: on a CPU the kernels run only in Triton's interpreter"
    assert explain(lstm).startswith(start) and explain(lstm).endswith(".")
    assert explain(lstm, device="cuda") == f"LSTM(2, 3) on cuda, torch.float32: cudnn: {UNMEASURED}."
    assert "cuDNN takes no more than 65535 steps" in explain(lstm, device="cuda", steps=65536)
    assert NO_CUDNN in explain(lstm, device="cuda", dtype=torch.bfloat16, segments=True)
    assert explain(LSTM(2, 3, recompute=True)) == explain(LSTM(2, 3)) and ": torch: " in explain(LSTM(2, 3))
    assert explain(LSTM(2, 3), segments=True).endswith("reset states run step by step in plain PyTorch.")
    assert explain(convert(torch.nn.LSTM(2, 3))).startswith("LSTM(2, 3) on cpu")
    assert "LSTMCell(2, 3) on cuda, torch.float32: triton: " in explain(LSTMCell(2, 3), device="cuda")
    assert "SoftmaxReadout(2, 3)" in explain(SoftmaxReadout(2, 3))
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve: on a CPU"):
        explain(LSTM(2, 3, backend="triton"))
    with pytest.raises(
        TypeError, match="explain.. knows LSTM, Recurrent, their cells and SoftmaxReadout, .*, got Linear"
    ):
        explain(torch.nn.Linear(2, 3))


def test_explain_tells_how_many_launches(monkeypatch):
    """On a CPU the limits are those of an H100."""
    monkeypatch.setattr(dispatch, "environment", lambda device: INTERPRETER)
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: False)
    assert explain(LSTM(2, 512, backend="triton")).endswith("asked for; with B = 1 one launch per step.")
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    once = "all steps in one launch"
    for hidden_size, batch, dtype, expected in (
        (1024, 16, torch.bfloat16, once),
        (1024, 512, torch.bfloat16, f"{once} for each of 4 parts of the batch"),
        (1024, 2048, torch.bfloat16, "one launch per step"),
        (1024, 16, torch.float32, once),
        (1536, 64, torch.bfloat16, f"{once} forward, {once} for each of 4 parts of the batch backward"),
    ):
        lstm = LSTM(2, hidden_size, backend="triton", precision="tf32")
        assert explain(lstm, batch=batch, dtype=dtype).endswith(f"triton: asked for; with B = {batch} {expected}.")


def test_explain_tells_what_runs(monkeypatch, device):
    """The remembered choice of a call is the one explained."""
    lstm = LSTM(2, 3, device=device)
    explained = explain(lstm, segments=True).split(": ")[1]
    chosen = []
    original = dispatch.layer_backend
    monkeypatch.setattr(dispatch, "layer_backend", lambda *args: chosen.append(original(*args)) or chosen[-1])
    lstm(torch.randn(4, 1, 2, device=device), lengths=torch.tensor([3]))  # a plain call on a CPU does not ask
    assert chosen == [explained]
