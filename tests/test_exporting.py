"""Models that hold this package's modules, in torch's tools: TorchScript, torch.fx, quantization, ONNX, exported programs."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
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


OPTIONS = [
    {},
    {"num_layers": 2, "batch_first": True, "bidirectional": True, "bias": False},
    {"num_layers": 2, "dropout": 0.5, "proj_size": 2},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
makers = pytest.mark.parametrize("make", ["convert", "patch", "own"])


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


def _x(T=4, B=2):
    return torch.randn(T, B, 3)


def _saved_and_loaded(module):
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


# ---- torch.jit.script ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, options", [*((make, o) for make in ("convert", "own") for o in OPTIONS), ("patch", OPTIONS[1])], ids=str
)
def test_script(make, options):
    model, x = _tagger(make, **options), _x()
    modules = list(model.modules())
    scripted = _saved_and_loaded(torch.jit.script(model))
    expected = _tagger(**options)
    for x in (_x(), _x(7, 3), _x(5, 1)):
        assert_close(scripted(x), expected(x))
        assert_close(model(x), expected(x))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)), "the model's own modules stay"
    assert type(model.lstm) is (LSTM if make == "own" else torch.nn.LSTM)
    assert model.lstm(_x(), return_cell_states=True)[2].shape[-1] in (5, 10), "and go on doing what torch's cannot"
    scripted.train()(x)[0].sum().backward()


def test_scripts_of_plain_modules_are_torchs():
    """Once anything has been converted."""
    convert(torch.nn.LSTM(3, 5)), convert(torch.nn.LSTMCell(3, 5))
    model = _tagger()
    assert_close(torch.jit.script(model)(x := _x()), model(x))


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


def test_script_with_states_and_unbatched():
    class Stateful(torch.nn.Module):
        def __init__(self, lstm):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, h, c):
            return self.lstm(x, (h, c))

    theirs = Stateful(torch.nn.LSTM(3, 5, batch_first=True))
    ours = Stateful(LSTM(3, 5, batch_first=True))
    ours.load_state_dict(theirs.state_dict())
    scripted = torch.jit.script(ours)
    for shapes in (((2, 4, 3), (1, 2, 5)), ((4, 3), (1, 5))):
        args = torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(shapes[1])
        assert_close(scripted(*args), theirs(*args))
    with pytest.raises(torch.jit.Error, match="Expected input to be 2D or 3D, got 1D"):
        scripted(torch.randn(3), *torch.randn(2, 1, 5))
    with pytest.raises(torch.jit.Error, match="input.size.-1. must be equal to input_size"):
        scripted(torch.randn(2, 4, 4), *torch.randn(2, 1, 2, 5))


def test_script_of_the_readout():
    readout = SoftmaxReadout(5, 3)
    assert_close(torch.jit.script(torch.nn.Sequential(readout))(h := torch.randn(2, 5)), readout(h))


# ---- torch.jit.trace -----------------------------------------------------------------------------------------------


@makers
@options
def test_trace_in_evaluation_mode_with_gradients(make, options):
    """The usual call: torch then traces a second time without gradients and compares the graphs."""
    model, expected = _tagger(make, **options), _tagger(**options)
    traced = _saved_and_loaded(torch.jit.trace(model, (_x(),)))
    for x in (_x(), _x(7, 3)):
        assert_close(traced(x), expected(x))


def test_backward_in_evaluation_mode_is_not_given_up():
    model = _tagger("convert")
    model(x := _x().requires_grad_())[0].sum().backward()
    assert x.grad.abs().sum() > 0


# ---- torch.fx ------------------------------------------------------------------------------------------------------


@makers
@options
def test_symbolic_trace(make, options):
    model = _tagger(make, **options)
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["lstm", "cell", "out"]
    assert graph.lstm is model.lstm
    for x in (_x(), _x(7, 3)):
        assert_close(graph(x), _tagger(**options)(x))


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


# ---- quantization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["convert", "patch"])
def test_quantize_dynamic(make):
    from torch.ao.quantization import quantize_dynamic

    kinds = {torch.nn.LSTM, torch.nn.LSTMCell, torch.nn.Linear}
    ours, theirs = (quantize_dynamic(_tagger(m, num_layers=2), kinds) for m in (make, "torch"))
    assert [type(m) for m in ours.children()] == [type(m) for m in theirs.children()]
    assert type(ours.lstm) is torch.ao.nn.quantized.dynamic.LSTM
    assert_close(ours(x := _x()), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", ["convert", "patch", "own"])
def test_fx_quantization(make):
    """As torch's own are treated; the class of this package stays what it is."""
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    def quantized(model):
        mapping = QConfigMapping().set_global(default_dynamic_qconfig)
        return convert_fx(prepare_fx(model, mapping, (_x(),)))

    ours, theirs, x = quantized(_tagger(make)), quantized(_tagger()), _x()
    if make == "own":
        assert type(ours.lstm) is LSTM and type(to_torch(ours).lstm) is torch.nn.LSTM
        assert_close(ours(x), _tagger()(x), rtol=0.1, atol=0.02)
    else:
        assert type(ours.lstm) is type(theirs.lstm) is torch.ao.nn.quantized.dynamic.LSTM
        assert_close(ours(x), theirs(x), rtol=0, atol=0)


# ---- torch.export --------------------------------------------------------------------------------------------------


def test_an_exported_program_needs_the_package_unless_exported_from_torchs(tmp_path):
    x = _x()
    model = torch.nn.Sequential(LSTM(3, 5))  # torch 2.11 exports no torch.nn.LSTM of which h is read
    torch.save((x, model(x)), tmp_path / "data.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "ours.pt2")
    torch.export.save(torch.export.export(to_torch(copy.deepcopy(model)), (x,)), tmp_path / "theirs.pt2")
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
import lstm_triton
run("ours.pt2")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", load], check=True, cwd=tmp_path)


# ---- ONNX ----------------------------------------------------------------------------------------------------------


@makers
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_onnx(make, options):
    """ONNX has no projection."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = _tagger(make, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x := _x(),), dynamo=True, verbose=False)
    assert "LSTM" in {node.op_type for node in program.model.graph}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close([torch.from_numpy(t) for t in found], list(_tagger(**options)(x)))


@makers
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_onnx_from_a_trace(make, options):
    """The older exporter, whose result takes any number of rows and steps."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, file = _tagger(make, **options), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "a", 1: "b"}}}
        torch.onnx.export(model, (_x(),), file, dynamo=False, **axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    for x in (_x(), _x(7, 3)):
        found = session.run(None, {"x": x.numpy()})
        assert_close([torch.from_numpy(t) for t in found], list(_tagger(**options)(x)))
