"""LSTM, LSTMCell, GRU and GRUCell as drop-ins: construction, parameters, copies, calls, each beside torch's own."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from lstm_triton import GRU, LSTM, GRUCell, LSTMCell, layers

OURS = {torch.nn.LSTM: LSTM, torch.nn.LSTMCell: LSTMCell, torch.nn.GRU: GRU, torch.nn.GRUCell: GRUCell}
every = pytest.mark.parametrize("theirs", OURS, ids=lambda kind: kind.__name__)
backends = pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
OPTIONS = {"precision": "tf32", "backend": "reference"}


def _cells(backend, device):
    """torch's cell and ours, with the same parameters."""
    theirs, ours = torch.nn.LSTMCell(3, 5, device=device), LSTMCell(3, 5, device=device, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _input(module, *batch, **options):
    shape = batch or ((2,) if isinstance(module, torch.nn.RNNCellBase) else (4, 2))
    return torch.randn(*shape, module.input_size, **options)


def _close(found, expected):
    # Another order of the same float32 sums; test_kernels judges the accuracy.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _raised(call, *args, **kwargs):
    with pytest.raises((AttributeError, IndexError, RuntimeError, TypeError, ValueError)) as error:
        call(*args, **kwargs)
    return error.type, str(error.value)


# ---- construction and parameters -------------------------------------------------------------------------------------

LAYER_ARGUMENTS = [
    ((3, 5), {}),
    ((3, 5, 2, False, True, 0.5, True), {}),
    ((3, 5), {"num_layers": 3, "bidirectional": True, "dtype": torch.float64}),
]
PROJECTED = [
    ((3, 5, 2, False, True, 0.5, True, 4), {}),
    ((3, 5), {"bias": False, "proj_size": 2, "dtype": torch.bfloat16}),
]
CELL_ARGUMENTS = [((3, 5), {}), ((3, 5, False), {}), ((1, 1, True), {"dtype": torch.float64}), ((0, 2), {})]
ARGUMENTS = [(kind, *given) for kind in (torch.nn.LSTM, torch.nn.GRU) for given in LAYER_ARGUMENTS]
ARGUMENTS += [(kind, *given) for kind in (torch.nn.LSTMCell, torch.nn.GRUCell) for given in CELL_ARGUMENTS]
ARGUMENTS += [(torch.nn.LSTM, *given) for given in PROJECTED]


@pytest.mark.parametrize("theirs, args, kwargs", ARGUMENTS, ids=str)
def test_same_parameters_for_one_seed(theirs, args, kwargs):
    modules, drawn = [], []
    for kind in (theirs, OURS[theirs]):
        torch.manual_seed(7)
        modules.append(kind(*args, **kwargs))
        drawn.append(torch.rand(1))
    module, ours = modules
    assert torch.equal(*drawn), "as many random numbers drawn"
    for (name, a), (expected, b) in zip(ours.named_parameters(), module.named_parameters(), strict=True):
        assert name == expected and a.dtype == b.dtype and a.requires_grad and torch.equal(a, b), name
    assert list(ours.state_dict()) == list(module.state_dict()) and repr(ours) == repr(module)
    for name in theirs.__constants__:
        assert getattr(ours, name) == getattr(module, name), name
    assert isinstance(ours, theirs.__base__)
    ours.load_state_dict(module.state_dict())
    module.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="weight_hh"):
        ours.load_state_dict(theirs(args[0], args[1] + 1, dtype=kwargs.get("dtype")).state_dict())
    if isinstance(module, torch.nn.RNNBase):
        assert all(a is b for a, b in zip(sum(ours.all_weights, []), ours.parameters(), strict=True))
        assert ours.flatten_parameters() is None


@every
def test_options_documentation_and_missing_arguments(theirs):
    ours = OURS[theirs]
    options = OPTIONS if issubclass(theirs, torch.nn.RNNCellBase) else OPTIONS | {"recompute": True}
    quoted = ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert repr(ours(3, 5, **options)) == f"{ours.__name__}(3, 5, {quoted})" and ours.__doc__
    for option, value in (("precision", "fp32"), ("precision", "TF32"), ("backend", "cuda")):
        with pytest.raises(ValueError, match=f"{option} must be one of .*, got '{value}'"):
            ours(3, 5, **{option: value})
    for args, kwargs in (((3,), {}), ((3, 5), {"hidden": 3})):
        with pytest.raises(TypeError):
            ours(*args, **kwargs)


BAD_LAYERS = [
    *(((0, 5), {}), ((-1, 5), {}), ((3, 0), {}), ((3, 5, 0), {}), ((3.0, 5), {}), (("3", 5), {}), ((3, 5.0), {})),
    *(((3, 5, 1, 1), {}), ((3, 5, 1, "True"), {}), ((3, 5), {"batch_first": 0}), ((3, 5), {"batch_first": None})),
    *(((3, 5), {"dropout": p}) for p in (1.5, -0.1, True, "a")),
    *(((3, 5), {"proj_size": size}) for size in (5, -1)),
]
BAD_CELLS = [((size, H), {}) for size, H in ((3.5, 4), ("3", 4), (3, -4))] + [((3,), {})]


@every
def test_constructor_errors_and_warnings_are_torchs(theirs):
    is_cell = issubclass(theirs, torch.nn.RNNCellBase)
    for kind in () if is_cell else (theirs, OURS[theirs]):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            kind(3, 5, dropout=0.25)
    for args, kwargs in BAD_CELLS if is_cell else BAD_LAYERS:
        found, expected = (_raised(kind, *args, **kwargs) for kind in (OURS[theirs], theirs))
        name = OURS[theirs].__name__
        assert (found[0], found[1].replace(f"{name}.", "")) == (expected[0], expected[1].replace(f"{name}.", "")), args


@every
def test_copies_and_pickles(theirs):
    module = OURS[theirs](3, 5, **OPTIONS)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    x = _input(module)
    expected = tree_leaves(module(x))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert type(other) is OURS[theirs] and repr(other) == repr(module)
        assert all(map(torch.equal, tree_leaves(other(x)), expected))
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert not torch.equal(tree_leaves(other(x))[0], expected[0])
    assert all(map(torch.equal, tree_leaves(module(x)), expected)), "no copy shares its parameters"
    assert next(copy.copy(module).parameters()) is next(module.parameters())


def test_instances_without_newer_attributes():
    """What was pickled before an option existed has its default."""
    lstm = LSTM(3, 5)
    for name in ("precision", "backend", "recompute"):
        del lstm.__dict__[name]
    again = pickle.loads(pickle.dumps(lstm))
    assert (again.precision, again.backend, again.recompute) == (None, "auto", False)
    x = _input(lstm)
    assert torch.equal(again(x)[0], lstm(x)[0]) and repr(again) == "LSTM(3, 5)"


@every
@backends
def test_meta_device_and_to_empty(theirs, backend, device):
    module, torchs = OURS[theirs](3, 5, device="meta", backend=backend), theirs(3, 5, device="meta")
    if backend != "triton":
        x = _input(module, device="meta")
        for found, expected in zip(tree_leaves(module(x)), tree_leaves(torchs(x)), strict=True):
            assert found.is_meta and found.shape == expected.shape
    module = module.to_empty(device=device)
    module.reset_parameters()
    assert tree_leaves(module(_input(module, device=device)))[0].isfinite().all()


# ---- calls of a cell; those of a layer are in test_lstm and test_recurrent -------------------------------------------


@backends
def test_every_form_of_a_call(backend, device):
    theirs, ours = _cells(backend, device)
    x = torch.randn(2, 3, device=device)
    h, c = torch.randn(2, 2, 5, device=device)
    pairs = [None, (h, c), [h, c], torch.stack((h, c)).unbind()]
    for args in ((x,), *((x, hx) for hx in pairs), (x[0],), (x[0], (h[0], c[0]))):
        found, expected = results = [ours(*args), theirs(*args)]
        assert isinstance(found, tuple) and [t.shape for t in found] == [t.shape for t in expected]
        losses = (sum(t.square().sum() for t in result) for result in results)
        gradients = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (ours, theirs))]
        _close((found, gradients[0]), (expected, gradients[1]))
    _close(ours(input=x, hx=(h, c)), theirs(input=x, hx=(h, c)))
    assert ours(x.new_empty(0, 3))[0].shape == (0, 5)


@backends
def test_parameters_are_read_on_every_call(backend, device):
    theirs, ours = _cells(backend, device)
    x = torch.randn(2, 3, device=device)
    for cell in (theirs, ours):
        cell(x)
        with torch.no_grad():
            cell.weight_hh.mul_(2)
        cell.bias_ih = torch.nn.Parameter(torch.full_like(cell.bias_ih, 0.5))
    _close(ours(x), theirs(x))
    tied = LSTMCell(5, 5, device=device, backend=backend)
    tied.weight_ih = tied.weight_hh
    x = torch.randn(2, 5, device=device)
    tied(x, (x, x))[0].sum().backward()
    split = copy.deepcopy(tied)
    split.weight_ih = torch.nn.Parameter(split.weight_ih.detach().clone())
    split.zero_grad()
    split(x, (x, x))[0].sum().backward()
    _close(tied.weight_hh.grad, split.weight_ih.grad + split.weight_hh.grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_plain_call_on_a_cpu_is_torchs_forward(recompute, monkeypatch):
    theirs, ours = torch.nn.LSTM(3, 5, 2), LSTM(3, 5, 2, recompute=recompute)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3)
    monkeypatch.setattr(layers, "autocast", None)  # no other way may be taken
    for input in (x, x[:, 0], pack_padded_sequence(x, torch.tensor([4, 1]))):
        results = [m(input) for m in (ours, theirs)]
        losses = [states[0].sum() for _, states in results]
        gradients = [torch.autograd.grad(loss, m.weight_hh_l0) for loss, m in zip(losses, (ours, theirs))]
        torch.testing.assert_close((results[0], gradients[0]), (results[1], gradients[1]), rtol=0, atol=0)
