"""Models that hold this package's modules, in torch's tools: TorchScript, torch.fx, quantization, ONNX, exported programs."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from support import segmented
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout, convert, patch, to_torch

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:.*is deprecated")]


class Tagger(torch.nn.Module):
    def __init__(self, lstm, cell, **options):
        super().__init__()
        self.lstm = lstm(3, 5, **options)
        R = options.get("proj_size") or 5
        self.cell = cell(R, 5)
        self.out = torch.nn.Linear(R * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        h, c = self.cell(h[-1])
        return self.out(y), h, c


OPTIONS = {
    "one layer": {},
    "stacked": {"num_layers": 2, "batch_first": True, "bidirectional": True},
    "projected": {"num_layers": 2, "dropout": 0.5, "proj_size": 2, "bias": False},
}


def _tagger(make: str = "torch", **options) -> Tagger:
    """In evaluation mode, with the same weights however it is made."""
    torch.manual_seed(3)
    if make == "own":
        return Tagger(LSTM, LSTMCell, **options).eval()
    if make == "patch":
        with patch():
            return Tagger(torch.nn.LSTM, torch.nn.LSTMCell, **options).eval()
    model = Tagger(torch.nn.LSTM, torch.nn.LSTMCell, **options).eval()
    return convert(model) if make == "convert" else model


@pytest.fixture(autouse=True)
def scripts_as_they_are():
    """torch would optimize each script for seconds."""
    with torch.jit.optimized_execution(False):
        yield


def _x(T=4, B=2):
    return torch.randn(T, B, 3)


# ---- every tool: what it makes of a model, to be called in its place -------------------------------------------------


def _saved_and_loaded(module, save=torch.jit.save, load=torch.jit.load):
    save(module, file := io.BytesIO())
    file.seek(0)
    return load(file)


def _scripted(model):
    scripted = _saved_and_loaded(torch.jit.script(model))
    scripted.train()(_x())[0].sum().backward()
    return scripted.eval()


def _traced(model):
    """The usual call, with gradients: torch then traces a second time without them and compares the graphs."""
    return _saved_and_loaded(torch.jit.trace(model, (_x(),)))


def _symbolically_traced(model):
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["lstm", "cell", "out"] and graph.lstm is model.lstm
    return graph


def _quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM, torch.nn.LSTMCell, torch.nn.Linear})


def _quantized_by_fx(model):
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    return convert_fx(prepare_fx(model, mapping, (_x(),)))


def _exported(model):
    return _saved_and_loaded(torch.export.export(model, (_x(),)), torch.export.save, torch.export.load).module()


def _compiled(model):
    """The model around the layers, which torch.compile leaves alone."""
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def _in_onnx(model, **options):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if options["dynamo"]:
        program = torch.onnx.export(model, (_x(),), verbose=False, **options)
        assert "LSTM" in {node.op_type for node in program.model.graph}
        contents = program.model_proto.SerializeToString()
    else:
        torch.onnx.export(model, (_x(),), file := io.BytesIO(), **options)
        contents = file.getvalue()
    session = onnxruntime.InferenceSession(contents)
    name = session.get_inputs()[0].name
    return lambda x: tuple(map(torch.from_numpy, session.run(None, {name: x.numpy()})))


DYNAMIC = {"input_names": ["x"], "dynamic_axes": {"x": {0: "a", 1: "b"}}}
TOOLS = {
    "script": _scripted,
    "trace": _traced,
    "fx": _symbolically_traced,
    "quantization": _quantized,
    "fx quantization": _quantized_by_fx,
    "export": _exported,
    "compile": _compiled,
    "onnx": lambda model: _in_onnx(model, dynamo=True),
    "onnx from a trace": lambda model: _in_onnx(model, dynamo=False, **DYNAMIC),
}
OF_ONE_SIZE = ["export", "onnx"]
AXES = {"tool": [*TOOLS], "make": ["convert", "patch", "own"], "options": [*OPTIONS]}
# Neither ONNX nor quantization has a projection. Once anything has been converted, scripts of plain modules are still torch's.
ROWS = [
    (tool, make, options.replace("projected", "stacked") if "onnx" in tool or "quantization" in tool else options)
    for tool, make, options in (row.values() for row in segmented.pairwise(AXES))
]
ROWS.append(("script", "torch", "one layer"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool, make, options", ROWS)
def test_a_model_in_a_tool(tool, make, options):
    convert(torch.nn.LSTM(3, 5)), convert(torch.nn.LSTMCell(3, 5))
    model, theirs = _tagger(make, **OPTIONS[options]), _tagger(**OPTIONS[options])
    modules = list(model.modules())
    recorded, expected, close = TOOLS[tool](model), theirs, {}
    if "quantization" in tool:
        expected, close = TOOLS[tool](theirs), {"rtol": 0, "atol": 0}
        if make == "own":
            assert type(recorded.lstm) is LSTM, "is left alone"
            assert type(to_torch(copy.deepcopy(recorded)).lstm) is torch.nn.LSTM
            close = {"rtol": 0.1, "atol": 0.02}
        else:
            assert [type(m) for m in recorded.children()] == [type(m) for m in expected.children()]
            assert type(recorded.lstm) is torch.ao.nn.quantized.dynamic.LSTM
    for x in (_x(), _x(7, 3))[: 1 if tool in OF_ONE_SIZE else 2]:
        assert_close(recorded(x), expected(x), **close)
        assert_close(model(x), theirs(x))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)), "the model's own modules stay"
    if make != "torch":
        assert model.lstm(_x(), return_cell_states=True)[2].shape[-1] in (5, 10), "and do what torch's cannot"


def test_script_of_packed_sequences():
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(3, 5)

        def forward(self, packed: PackedSequence) -> tuple[torch.Tensor, torch.Tensor]:
            y, hidden = self.lstm(packed)
            return y.data, hidden[0]

    model, packed = Packed(), pack_padded_sequence(_x(), [4, 2])
    expected = model(packed)
    assert_close(torch.jit.script(convert(model))(packed), expected)


def test_script_of_a_module_alone():
    """With states, with and without a batch; and its errors."""
    theirs, ours = (kind(3, 5, batch_first=True) for kind in (torch.nn.LSTM, LSTM))
    ours.load_state_dict(theirs.state_dict())
    x, (h, c), scripted = torch.randn(2, 4, 3), torch.randn(2, 1, 2, 5), torch.jit.script(ours)
    for given in ((x, (h, c)), (x[0], (h[:, 0], c[:, 0]))):
        assert_close(scripted(*given), theirs(*given))
    with pytest.raises(torch.jit.Error, match="Expected input to be 2D or 3D, got 1D"):
        scripted(x[0, 0], (h, c))
    with pytest.raises(torch.jit.Error, match="input.size.-1. must be equal to input_size"):
        scripted(x.repeat(1, 1, 2), (h, c))
    readout = SoftmaxReadout(5, 3)
    assert_close(torch.jit.script(readout)(h), readout(h))


@pytest.mark.parametrize("module", [LSTM(3, 5), LSTMCell(3, 5), SoftmaxReadout(3, 5)], ids=lambda m: type(m).__name__)
def test_symbolic_trace_of_a_leaf_alone(module):
    with pytest.raises(torch.fx.proxy.TraceError, match="is a leaf of torch.fx: trace a model that holds it"):
        torch.fx.symbolic_trace(module)


def test_symbolic_trace_of_what_torch_has_not():
    class Episodes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = LSTM(3, 5, backend="reference")
            self.readout = SoftmaxReadout(5, 2)

        def forward(self, x, resets, lengths):
            y, _, cells = self.lstm(x, resets=resets, lengths=lengths, return_cell_states=True)
            return self.readout(y), cells

    model = Episodes()
    x, resets, lengths = _x(), torch.rand(4, 2) < 0.5, torch.tensor([4, 2])
    assert_close(torch.fx.symbolic_trace(model)(x, resets, lengths), model(x, resets, lengths))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_in_a_process_that_has_not_imported_the_package(tmp_path):
    """An exported program needs the package unless exported from torch's modules; a pickled conversion imports it by itself."""
    x = _x()
    model = torch.nn.Sequential(LSTM(3, 5))  # torch 2.11 exports no torch.nn.LSTM of which h is read
    torch.save((x, model(x)), tmp_path / "data.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "ours.pt2")
    torch.export.save(torch.export.export(to_torch(copy.deepcopy(model)), (x,)), tmp_path / "theirs.pt2")
    torch.save(convert(torch.nn.LSTM(3, 5), backend="reference"), tmp_path / "converted.pt")
    load = """
import sys, torch
x, expected = torch.load("data.pt")
def run(path):
    torch.testing.assert_close(torch.export.load(path).module()(x), expected)
run("theirs.pt2")
assert "lstm_triton" not in sys.modules
try:
    run("ours.pt2")
except RuntimeError as error:
    assert "deserializing" in str(error), error  # torch's warnings name the operator
else:
    sys.exit("docs/exporting.md says that this needs the package")
lstm = torch.load("converted.pt", weights_only=False)
assert type(lstm) is torch.nn.LSTM and lstm.backend == "reference"
assert lstm(x, return_cell_states=True)[2].shape == (4, 2, 5)
run("ours.pt2")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", load], check=True, cwd=tmp_path)
