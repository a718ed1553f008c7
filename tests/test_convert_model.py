"""convert and to_torch on models."""

import copy
import pickle

import pytest
import torch
from support.lstms import assert_close, flat

from lstm_triton import LSTM, convert, to_torch

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
    assert repr(layer).endswith("backend='triton', precision='ieee', recompute=True)")
    assert repr(cell) == "LSTMCell(6, 3, backend='triton', precision='ieee', recompute=True)"
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
    assert [type(m) for m in _lstms(model)] == [torch.nn.LSTM, torch.nn.LSTMCell]
    assert [set(m.__dict__) for m in _lstms(model)] == attributes
    for options in ({"backend": "cuda"}, {"precision": "fp32"}):
        with pytest.raises(ValueError, match="must be one of"):
            convert(model, **options)
    assert [set(m.__dict__) for m in _lstms(model)] == attributes, "unknown options change nothing"


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
