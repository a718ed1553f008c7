"""`Recurrent`, `RecurrentCell`, `GRU` and `GRUCell`: what is theirs alone. test_lstm has layers beside torch's own."""

import copy
import pickle

import pytest
import torch
from support import segmented
from support.lstms import assert_close
from test_cells import CATALOGUE, eight, lstm

from lstm_triton import GRU, LSTM, GRUCell, Recurrent, RecurrentCell, convert, dispatch, explain, patch, to_torch
from lstm_triton.cells import catalogue, modules

T, B, I, H = 4, 3, 2, 5


def test_gru_by_default_is_torchs(device):
    theirs, ours = (kind(I, H, 2, batch_first=True, bidirectional=True, device=device) for kind in (torch.nn.GRU, GRU))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, I, device=device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


class Model(torch.nn.Module):
    def __init__(self, device) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(I, H, dtype=torch.float64, device=device)
        self.cell = torch.nn.GRUCell(H, H, dtype=torch.float64, device=device)

    def forward(self, x):
        y, h = self.gru(x)
        return y, self.cell(y[-1], h[0])


def test_convert_and_patch(device):
    model = Model(device)
    x, resets = torch.randn(T, B, I, dtype=torch.float64, device=device), torch.rand(T, B, device=device) < 0.3
    expected = model(x)
    assert convert(model, backend="triton", precision="ieee") is model
    assert type(model.gru) is torch.nn.GRU and type(model.cell) is torch.nn.GRUCell
    assert "backend='triton'" in repr(model.gru)
    assert_close(model(x), expected)
    ours = GRU(I, H, dtype=torch.float64, device=device, backend="reference")
    ours.load_state_dict(model.gru.state_dict())
    assert_close(model.gru(x, resets=resets), ours(x, resets=resets))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(again(x), expected)
        assert again.gru.backend == "triton"
    assert_close(to_torch(model)(x), expected)
    assert not hasattr(model.gru, "backend")
    convert(model, compilable=True)
    assert type(model.gru) is GRU and type(model.cell) is torch.nn.GRUCell
    assert_close(model(x), expected)
    assert type(to_torch(model).gru) is torch.nn.GRU
    with patch(backend="reference"):
        assert Model(device).gru.backend == "reference"


def test_errors(device):
    gru, own, own_lstm = (
        GRU(I, H, device=device),
        *(Recurrent(of, I, H, backend="reference", device=device) for of in (catalogue.gru, lstm)),
    )
    x, h = torch.randn(T, B, I, device=device), torch.zeros(1, B, H, device=device)
    for call, error, words in (
        (lambda: Recurrent(lambda z, s: (z.a, {}), I, H), TypeError, "declared by lstm_triton.cell, got function"),
        (lambda: RecurrentCell(LSTM, I, H), TypeError, "declared by lstm_triton.cell, got type"),
        (lambda: Recurrent(catalogue.cifg, I, H, backend="cudnn"), ValueError, "cuDNN does not know the cell cifg"),
        (lambda: Recurrent(lstm, I, H, backend="other"), ValueError, "backend must be one of"),
        (lambda: GRU(I, H, backend="cudnn", precision="ieee"), ValueError, "torch's setting of precision"),
        (lambda: gru(x[..., :1]), RuntimeError, "input.size"),
        (lambda: own(x, (h, h)), TypeError, "gru has no state besides h"),
        (lambda: own(x, h[..., :1]), RuntimeError, r"Expected hidden\[0\] size"),
        (lambda: own_lstm(x, h), TypeError, r"a tuple of two Tensors \(h, c\)"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_what_reads_modules(monkeypatch):
    """torch.fx takes them for leaves; TorchScript is refused; explain has a line for each."""
    gru, own, cell = GRU(I, H), Recurrent(catalogue.cifg, I, H), GRUCell(I, H)
    x = torch.randn(T, B, I)
    for module, given in ((gru, x), (own, x), (cell, x[0])):
        model = torch.nn.Sequential(module)
        traced = torch.fx.symbolic_trace(model)
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
        torch.testing.assert_close(traced(given), model(given), rtol=0, atol=0)
        with pytest.raises(NotImplementedError, match=f"TorchScript cannot compile {type(module).__name__}"):
            torch.jit.script(model)
    lines = explain(torch.nn.Sequential(gru, own, cell, convert(torch.nn.GRU(I, H)), torch.nn.GRUCell(I, H)))
    expected = [
        "GRU(2, 5) on cpu, torch.float32: torch: ",
        "Recurrent(2, 5) on cpu, torch.float32: reference: the cell's own",
    ]
    expected += ["GRUCell(2, 5) on cpu, torch.float32: torch: ", expected[0], "GRUCell: torch's own: not converted"]
    for k, (line, start) in enumerate(zip(lines.splitlines(), expected, strict=True)):
        assert line.startswith(f"{k}: {start}"), line
    on_gpu = dispatch.Environment(True, False, (9, 0))
    monkeypatch.setattr(dispatch, "environment", lambda device: on_gpu)
    monkeypatch.setattr(modules, "environment", lambda device: on_gpu)
    assert ": cudnn: " in explain(gru, device="cuda")
    assert ": triton-stepwise: the LSTM's kernels with the cell's equations" in explain(
        gru, device="cuda", segments=True
    )
    assert ": triton-stepwise: the LSTM's kernels" in explain(own, device="cuda")
    assert ": triton: the LSTM's kernels" in explain(cell, device="cuda")


@pytest.mark.compiled
@pytest.mark.parametrize("name", [*CATALOGUE, "eight"])
def test_programs_that_wait_for_each_other(name, device):
    """All steps in one launch, of several programs."""
    options = dict(cell=(CATALOGUE | {"eight": eight})[name], dtype=torch.bfloat16, recompute=name == "cifg")
    segmented.judge(segmented.Case(T=3, B=3, I=5, H=40, **options), device)
