"""convert, to_torch and patch in other people's models: which modules, what stays as it was, what is said."""

import copy
import logging
import pickle
import re
import warnings

import pytest
import torch
from support.lstms import assert_close, flat, gradients
from torch.nn import LSTM as EarlyLSTM  # as clients import it, before any patch
from torch.nn import LSTMCell as EarlyCell

from lstm_triton import LSTM, LSTMCell, convert, explain, patch, to_torch

X = torch.randn(4, 2, 3)
OPTIONS = {"backend": "triton", "precision": "ieee", "recompute": True}


class Derived(torch.nn.LSTM):
    """Of a client, made at import, with torch's forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = 2.0


class Overriding(torch.nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)[0]


class WithBackend(torch.nn.LSTM):
    backend = "nccl"


class Model(torch.nn.Module):
    """All that is converted, in the middle of what is not."""

    def __init__(self, device):
        super().__init__()
        options = {"dtype": torch.float64, "device": device}
        self.layer = torch.nn.LSTM(2, 3, 2, bidirectional=True, dropout=0.25, **options)
        self.derived = Derived(6, 4, **options)
        cell = torch.nn.LSTMCell(4, 3, **options)
        self.nested = torch.nn.ModuleDict({"cells": torch.nn.ModuleList([cell]), "again": self.layer})
        self.others = torch.nn.ModuleList([torch.nn.GRU(2, 3), torch.nn.RNN(2, 3), torch.nn.GRUCell(2, 3)])
        self.eval()

    def forward(self, x):
        y, (h, c) = self.layer(x)
        z, _ = self.derived(y)
        h, c = self.nested["cells"][0](z[-1], (h[0], c[0]))
        return y, (h, c)


@pytest.fixture
def model(device):
    return Model(device)


@pytest.fixture
def x(device):
    return torch.randn(4, 2, 2, dtype=torch.float64, device=device)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _is_converted(module) -> bool:
    weight = module.weight_ih_l0
    try:
        module(weight.new_zeros(4, 2, module.input_size), return_cell_states=True)
    except TypeError:
        return False
    return True


def _attributes(model):
    return [(name, type(module), set(module.__dict__)) for name, module in model.named_modules()]


# ---- a model that is converted ---------------------------------------------------------------------------------------


def test_everything_of_torchs_is_converted_in_place(model, x, caplog, no_warnings):
    def objects():
        return [(name, type(m), id(m)) for name, m in model.named_modules()], [*map(id, model.parameters())]

    expected, before = flat(model(x)), objects()
    with caplog.at_level(logging.INFO, logger="lstm_triton"):
        assert convert(model, **OPTIONS) is model
        all_of_them = "layer (LSTM), derived (Derived), nested.cells.0 (LSTMCell), others.0 (GRU), others.2 (GRUCell)"
        said = f"convert() found nothing to convert in Model; {all_of_them} had been converted before"
        with pytest.warns(UserWarning, match=f"^{re.escape(said)}$"):
            convert(model, backend="reference")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"converted: {all_of_them}", f"had been converted before: {all_of_them}"]
    assert objects() == before and model.nested["again"] is model.layer and model.derived.gain == 2
    layer, cell = model.layer, model.nested["cells"][0]
    for module in (layer, cell):
        assert {name: getattr(module, name) for name in OPTIONS} == OPTIONS
    assert (layer.num_layers, layer.dropout, layer.training) == (2, 0.25, False)
    options = "backend='triton', precision='ieee', recompute=True"
    assert repr(layer).endswith(f", {options})") and repr(cell) == f"LSTMCell(4, 3, {options})"
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert again.layer.backend == again.derived.backend == "triton"
        assert_close(flat(again(x)), expected)
        assert again.layer(x, return_cell_states=True)[2].shape == expected[0].shape and _is_converted(again.derived)


def test_round_trip(model, x):
    original, before, expected = copy.deepcopy(model), _attributes(model), flat(model(x))
    for options in ({"backend": "cuda"}, {"precision": "fp32"}):
        with pytest.raises(ValueError, match="must be one of"):
            convert(model, **options)
    assert to_torch(model) is model and _attributes(model) == before, "nothing has changed"
    for compilable in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is left
            convert(model, **OPTIONS, compilable=compilable)
        to_torch(model)
        assert _attributes(model) == before and repr(model) == repr(original)
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(map(torch.equal, flat(model(x)), expected))


def test_compilable(model, x):
    expected = flat(model(x))
    with pytest.warns(UserWarning, match="left derived .Derived.: torch.compile refuses its class"):
        convert(model, **OPTIONS, compilable=True)
    layer = model.layer
    assert type(layer) is LSTM and (layer.backend, layer.precision) == ("triton", "ieee")
    assert type(model.derived) is Derived and not _is_converted(model.derived)
    assert_close(flat(model(x)), expected)
    assert_close(flat(torch.compile(layer, backend="eager", fullgraph=True)(x))[:1], expected[:1])
    assert type(pickle.loads(pickle.dumps(layer))) is LSTM


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


# ---- what is left, and what is said ----------------------------------------------------------------------------------


def test_what_is_left_and_why():
    replaced = torch.nn.LSTM(3, 5)
    replaced.forward = replaced.forward  # as by accelerate's hooks: what is called does not look at the class
    model = torch.nn.ModuleDict(
        {"a": Overriding(3, 5), "b": WithBackend(3, 5), "c": replaced, "d": torch.nn.LSTM(3, 5)}
    )
    reasons = {
        "a": "its class Overriding has a forward of its own",
        "b": "its class WithBackend has an attribute 'backend' of its own",
        "c": "its forward has been replaced",
    }
    before = {name: dict(model[name].__dict__) for name in reasons}
    with pytest.warns(UserWarning) as said:
        convert(model)
    kinds = {name: type(model[name]).__name__ for name in reasons}
    lefts = [f"convert() left {name} ({kinds[name]}): {reason}" for name, reason in reasons.items()]
    assert [str(warning.message) for warning in said] == lefts
    assert {name: model[name].__dict__ for name in reasons} == before and _is_converted(model["d"])
    *lines, last = explain(model).splitlines()
    assert lines == [f"{name}: {kinds[name]}: torch's own: {reason}." for name, reason in reasons.items()]
    assert last.startswith("d: LSTM(3, 5) on cpu, torch.float32: ")
    with pytest.warns(UserWarning, match=r"^convert\(\) left the module itself \(LSTM\): its forward"):
        convert(replaced)
    with pytest.warns(UserWarning, match=r"^convert\(\) found nothing to convert in Linear$"):
        convert(torch.nn.Linear(2, 3))


def test_replicas_of_data_parallel(no_warnings):
    """They are shallow copies whose parameters are replaced: nothing may remember the original."""
    module = convert(torch.nn.LSTM(3, 5))
    replica = module._replicate_for_data_parallel()
    for name, value in module.named_parameters():
        setattr(replica, name, value.detach() * 0)
    assert replica(X, return_cell_states=True)[0].abs().max() == 0 and module(X)[0].abs().max() > 0


def test_the_error_of_torch_compile_names_both_ways(no_warnings):
    """torch refuses torch.nn.LSTM of any kind, and names the setting under which it does not. Where its error quotes the
    module, as before torch 2.15, this package's option stands there too."""
    torch._dynamo.reset()
    model = convert(torch.nn.Sequential(torch.nn.LSTM(3, 5, 2)))
    x = X.clone().requires_grad_()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\._dynamo\.config\.allow_rnn=True") as error:
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    is_quoted = "LSTM(3, 5, num_layers=2" in str(error.value)
    assert is_quoted == ("convert(model, compilable=True) gives a class that compiles" in str(error.value))
    assert is_quoted or torch.__version__ >= "2.15"
    assert repr(model[0]) == "LSTM(3, 5, num_layers=2, backend='auto')"
    with torch._dynamo.config.patch(allow_rnn=True):
        found = flat(torch.compile(model, backend="aot_eager", fullgraph=True)(x))
    expected = flat(model(x))
    torch.testing.assert_close(found, expected)
    leaves = [x, *model.parameters()]
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))
    cell = convert(torch.nn.LSTMCell(3, 5), backend="triton", precision="ieee")
    torch.testing.assert_close(torch.compile(cell, backend="aot_eager", fullgraph=True)(X[0]), cell(X[0]))
    torch._dynamo.reset()


# ---- parametrizations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])  # on a CPU a plain call of the first is torch's own forward
@pytest.mark.parametrize("who", ["own", "converted before", "converted after"])
@pytest.mark.parametrize("cell", [False, True])
def test_parametrizations_are_evaluated_as_often_as_in_torchs(cell, who, backend, no_warnings):
    """spectral_norm goes on with its power iteration at every evaluation in training."""
    theirs, own = (torch.nn.LSTMCell(3, 5), LSTMCell(3, 5)) if cell else (torch.nn.LSTM(3, 5), LSTM(3, 5))
    own.load_state_dict(theirs.state_dict())
    ours = own if who == "own" else copy.deepcopy(theirs)
    if who == "converted before":
        convert(ours)
    for module in (ours, theirs):
        torch.manual_seed(2)
        torch.nn.utils.parametrizations.spectral_norm(module, "weight_hh" if cell else "weight_hh_l0")
    if who == "converted after":
        convert(ours)
    assert type(ours).__mro__[1] is type(theirs).__mro__[1] or who == "own"
    ours.backend = backend
    for x in (X[0], X[0, 0]) if cell else (X, X[:, 0], torch.nn.utils.rnn.pack_sequence([X[:, 0], X[:2, 1]])):
        found, expected = flat(ours(x)), flat(theirs(x))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, ours.parameters()), gradients(expected, theirs.parameters()))
        for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            assert torch.equal(a, b), name
    assert cell or _is_converted(ours)


# ---- patch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.LSTM(3, 5, 2),
        lambda: EarlyLSTM(3, 5),
        lambda: torch.nn.modules.rnn.LSTM(3, 5),
        lambda: Derived(3, 5),
        lambda: EarlyCell(3, 5),
    ],
    ids=["torch.nn", "imported early", "torch.nn.modules.rnn", "derived early", "cell"],
)
def test_patch_whatever_the_name(build, no_warnings):
    built = []
    for patched in (False, True, False):
        torch.manual_seed(1)
        with patch(**OPTIONS) if patched else warnings.catch_warnings():
            built.append(build())
    before, inside, after = built
    assert type(inside) is type(before) and {name: getattr(inside, name) for name in OPTIONS} == OPTIONS
    assert "backend='triton'" in repr(inside) and repr(before) == repr(after) and "backend" not in repr(after)
    assert explain(torch.nn.Sequential(after)) == f"0: {type(after).__name__}: torch's own: not converted."
    assert not hasattr(after, "backend")
    assert all(map(torch.equal, inside.parameters(), before.parameters())), "the same are drawn"
    if isinstance(inside, torch.nn.LSTM):
        inside.backend = "auto"
        assert _is_converted(inside) and not _is_converted(before) and not _is_converted(after)
        assert all(map(torch.equal, flat(inside(X)), flat(before(X))))


def test_patches_nest_end_and_leave_other_classes(no_warnings):
    with pytest.raises(KeyError), patch(precision="ieee"):
        with patch(backend="reference"):
            inner = torch.nn.LSTM(3, 5)
        outer, own, ours, rnn = torch.nn.LSTM(3, 5), Overriding(3, 5), LSTMCell(3, 5), torch.nn.RNN(3, 5)
        assert not _is_converted(to_torch(outer)) and _is_converted(convert(outer))
        raise KeyError
    assert (inner.backend, inner.precision, outer.backend) == ("reference", None, "auto")
    assert not hasattr(own, "backend") and own(X).shape == (4, 2, 5)
    assert ours.precision is None and not hasattr(rnn, "backend") and not _is_converted(torch.nn.LSTM(3, 5))
    with pytest.raises(ValueError, match="backend must be one of"), patch(backend="cuda"):
        pass
