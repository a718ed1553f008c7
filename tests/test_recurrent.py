"""`Recurrent`, `RecurrentCell`, `GRU` and `GRUCell`: beside torch's own, and by the tolerance rule."""

import copy
import pickle

import pytest
import torch
from support import recurrents, segmented
from support.lstms import assert_close, flat, trained
from test_cells import CATALOGUE, eight, lstm
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_triton import GRU, LSTM, GRUCell, Recurrent, RecurrentCell, convert, dispatch, explain, patch, to_torch
from lstm_triton.cells import catalogue, modules

BACKENDS = pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
T, B, I, H = 4, 3, 2, 5
THEIRS = {
    "gru": (catalogue.gru, torch.nn.GRU, {}),
    "lstm": (lstm, torch.nn.LSTM, {}),
    "rnn_tanh": (catalogue.rnn_tanh, torch.nn.RNN, {}),
    "rnn_relu": (catalogue.rnn_relu, torch.nn.RNN, {"nonlinearity": "relu"}),
}


def _pair(name, backend, device, **options):
    """torch's module and ours, with the same parameters, in float64."""
    cell, theirs, given = THEIRS[name]
    theirs = theirs(I, H, dtype=torch.float64, device=device, **given, **options)
    ours = Recurrent(cell, I, H, dtype=torch.float64, device=device, backend=backend, precision="ieee", **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _states(module, device, B=B):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    states = [torch.randn(rows, B, H, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    has_two = module.cell.states if isinstance(module, Recurrent) else isinstance(module, torch.nn.LSTM)
    return tuple(states) if has_two else states[0]


# ---- beside torch ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "one layer": {},
    "no bias": {"bias": False},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


AXES = {"name": [*THEIRS], "options": [*OPTIONS], "backend": ["auto", "triton", "reference"]}


@pytest.mark.parametrize("row", segmented.pairwise(AXES), ids=lambda row: " ".join(row.values()))
def test_trains_like_torch(row, device):
    name, options, backend = row.values()
    theirs, ours = _pair(name, backend, device, **OPTIONS[options])
    shape = (B, T, I) if ours.batch_first else (T, B, I)
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    hx = _states(theirs, device)
    leaves = (x, *(hx if isinstance(hx, tuple) else (hx,)))
    assert_close(trained(ours, x, hx, leaves), trained(theirs, x, hx, leaves))
    assert_close(flat(ours(x)), flat(theirs(x)))
    unbatched = x[0] if ours.batch_first else x[:, 0]
    assert_close(flat(ours(unbatched)), flat(theirs(unbatched)))


@BACKENDS
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_packed_sequences(name, backend, device):
    theirs, ours = _pair(name, backend, device, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    packed = pack_padded_sequence(x, torch.tensor([2, 4, 3]), enforce_sorted=False)
    hx = _states(theirs, device)
    leaves = (x, *(hx if isinstance(hx, tuple) else (hx,)))
    assert_close(trained(ours, packed, hx, leaves), trained(theirs, packed, hx, leaves))


@BACKENDS
def test_resets_and_lengths_are_segments_run_one_by_one(backend, device):
    _, ours = _pair("gru", backend, device, bidirectional=True)
    x = torch.randn(6, 2, I, dtype=torch.float64, device=device)
    start, hx = torch.randn(2, 2, 1, H, dtype=torch.float64, device=device).unbind(1)
    start, hx = start.expand(2, 2, H), hx.expand(2, 2, H).contiguous()
    resets = torch.zeros(6, 2, dtype=torch.bool, device=device)
    resets[2, 0] = resets[4, 0] = True
    lengths = torch.tensor([6, 3], device=device)
    y, h_n, states = ours(x, hx, resets=resets, reset_state=start, lengths=lengths, return_states=True)
    torch.testing.assert_close(states, y, rtol=0, atol=0)
    whole = torch.nn.GRU(I, H, bidirectional=True, dtype=torch.float64, device=device)
    whole.load_state_dict(ours.state_dict())
    # Each direction enters the middle segment, and all but its first, from the state of the resets.
    first = whole(x[:2, :1], torch.stack((hx[0, :1], start[1, :1])))
    middle = whole(x[2:4, :1], start[:, :1].contiguous())
    last = whole(x[4:, :1], torch.stack((start[0, :1], hx[1, :1])))
    assert_close(y[:, :1], torch.cat([first[0], middle[0], last[0]]))
    assert_close(h_n[:, :1], torch.stack((last[1][0], first[1][1])))
    short = whole(x[:3, 1:], hx[:, 1:].contiguous())
    assert_close(y[:3, 1:], short[0])
    assert_close(h_n[:, 1:], short[1])
    assert not y[3:, 1].any()


@BACKENDS
def test_recompute_gives_the_same_gradients(backend, device):
    _, ours = _pair("gru", backend, device)
    x = torch.randn(40, B, I, dtype=torch.float64, device=device, requires_grad=True)
    hx = _states(ours, device)
    again = copy.deepcopy(ours)
    again.recompute = True
    assert_close(trained(again, x, hx, (x, hx)), trained(ours, x, hx, (x, hx)))


# ---- one step --------------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("bias", [True, False])
def test_cells_step_like_torchs(backend, bias, device):
    options = dict(bias=bias, dtype=torch.float64, device=device)
    for theirs, ours in (
        (torch.nn.GRUCell(I, H, **options), GRUCell(I, H, **options, backend=backend, precision="ieee")),
        (torch.nn.LSTMCell(I, H, **options), RecurrentCell(lstm, I, H, **options, backend=backend, precision="ieee")),
    ):
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(B, I, dtype=torch.float64, device=device, requires_grad=True)
        h, c = torch.randn(2, B, H, dtype=torch.float64, device=device, requires_grad=True)
        hx = (h, c) if isinstance(theirs, torch.nn.LSTMCell) else h
        results = []
        for module in (ours, theirs):
            found = module(x, hx)
            found = found if isinstance(found, tuple) else (found,)
            total = sum(t.square().sum() for t in found)
            results.append([*found, *torch.autograd.grad(total, [x, h, *module.parameters()])])
        assert_close(*results)
        assert_close(ours(x), theirs(x))
        assert_close(ours(x[0]), theirs(x[0]))


# ---- torch.nn.GRU ----------------------------------------------------------------------------------------------------


def test_gru_by_default_is_torchs(device):
    theirs, ours = (kind(I, H, 2, batch_first=True, bidirectional=True, device=device) for kind in (torch.nn.GRU, GRU))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, I, device=device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="torch's setting of precision"):
        GRU(I, H, backend="cudnn", precision="ieee")
    with pytest.raises(RuntimeError, match="input.size"):
        ours(torch.randn(B, T, I + 1, device=device))


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


def test_modules_are_copied_and_saved(device):
    module = Recurrent(catalogue.cifg, I, H, device=device)
    x = torch.randn(T, B, I, device=device)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.cell is catalogue.cifg
        torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


def test_what_is_no_cell_and_no_state(device):
    with pytest.raises(TypeError, match="declared by lstm_triton.cell, got function"):
        Recurrent(lambda z, s: (z.a, {}), I, H)
    with pytest.raises(TypeError, match="declared by lstm_triton.cell, got type"):
        RecurrentCell(LSTM, I, H)
    _, ours = _pair("gru", "reference", device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="gru has no state besides h"):
        ours(x, (_states(ours, device),) * 2)
    with pytest.raises(TypeError, match=r"a tuple of two Tensors \(h, c\)"):
        _pair("lstm", "reference", device)[1](x, _states(ours, device))
    with pytest.raises(ValueError, match="cuDNN does not know the cell cifg"):
        Recurrent(catalogue.cifg, I, H, backend="cudnn")
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        ours(x, torch.zeros(1, B, H + 1, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match="backend must be one of"):
        Recurrent(lstm, I, H, backend="other")


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


# ---- by the tolerance rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_as_accurate_as_torch(name, device):
    """In full float32; compiled code has bfloat16, below."""
    options = dict(resets=True, lengths=True) if name in ("gru", "cifg") else {}
    options |= dict(bidirectional=True, precision="ieee", device=device)
    problem = recurrents.draw(CATALOGUE[name], 5, 3, 4, 19, torch.float32, **options)
    recurrents.assert_as_accurate_as_torch(problem.run("triton"), problem)


@pytest.mark.compiled
@pytest.mark.parametrize("name", [*CATALOGUE, "eight"])
def test_programs_that_wait_for_each_other(name, device):
    """All steps in one launch, of several programs."""
    problem = recurrents.draw((CATALOGUE | {"eight": eight})[name], 3, 3, 5, 150, torch.bfloat16, device=device)
    recurrents.assert_as_accurate_as_torch(problem.run("triton", recompute=name == "cifg"), problem)
