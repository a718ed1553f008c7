"""LSTM, GRU, their cells and SoftmaxReadout as drop-ins: construction, parameters, copies, calls, each beside torch's own.

What is said about arguments that do not fit is in test_mistakes.
"""

import copy
import io
import pickle

import pytest
import torch
from support.lstms import backends, gradients
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from lstm_triton import GRU, LSTM, GRUCell, LSTMCell, SoftmaxReadout, layers

CELLS = {torch.nn.LSTMCell: LSTMCell, torch.nn.GRUCell: GRUCell}
OURS = {torch.nn.LSTM: LSTM, torch.nn.GRU: GRU, torch.nn.Linear: SoftmaxReadout} | CELLS
every = pytest.mark.parametrize("theirs", OURS, ids=lambda kind: kind.__name__)
OPTIONS = {"precision": "tf32", "backend": "reference"}


def _pair(theirs, *args, backend="auto", **options):
    """torch's module and ours, with the same parameters."""
    modules = theirs(*args, **options), OURS[theirs](*args, **options, backend=backend)
    modules[1].load_state_dict(modules[0].state_dict())
    return modules


def _input(module, **options):
    batch = (4, 2) if isinstance(module, torch.nn.RNNBase) else (2,)
    first = next(module.parameters())
    return torch.randn(*batch, first.shape[1], **{"dtype": first.dtype} | options)


def _results(module, *args):
    """As a list; of torch.nn.Linear as SoftmaxReadout has them."""
    found = module(*args)
    return tree_leaves(found.softmax(-1) if type(module) is torch.nn.Linear else found)


# ---- construction and parameters -------------------------------------------------------------------------------------

PLAIN, BIDIRECTIONAL = ((3, 5), {}), ((3, 5, 2, False, True, 0.5, True), {})
DEEP = ((3, 5), {"num_layers": 3, "bidirectional": True, "dtype": torch.float64})
OF_CELLS = [PLAIN, ((3, 5, False, None, torch.float64), {}), ((1, 1, True), {"dtype": torch.float64})]
ARGUMENTS = {
    torch.nn.LSTM: [
        *(PLAIN, BIDIRECTIONAL, DEEP, ((3, 5, 2, False, True, 0.5, True, 4), {})),
        ((3, 5), {"bias": False, "proj_size": 2, "dtype": torch.bfloat16}),
    ],
    torch.nn.GRU: [PLAIN, BIDIRECTIONAL, DEEP],
    torch.nn.LSTMCell: [*OF_CELLS, ((0, 2), {})],
    torch.nn.GRUCell: [*OF_CELLS, ((0, 2), {})],
    torch.nn.Linear: OF_CELLS,
}


@pytest.mark.parametrize(
    "theirs, args, options", [(kind, *given) for kind in OURS for given in ARGUMENTS[kind]], ids=str
)
def test_same_parameters_for_one_seed(theirs, args, options):
    modules, drawn = [], []
    for kind in (theirs, OURS[theirs]):
        torch.manual_seed(7)
        modules.append(kind(*args, **options).eval())
        drawn.append(torch.rand(1))
    module, ours = modules
    assert torch.equal(*drawn), "as many random numbers drawn"
    for (name, a), (expected, b) in zip(ours.named_parameters(), module.named_parameters(), strict=True):
        assert name == expected and a.dtype == b.dtype and a.requires_grad and torch.equal(a, b), name
    x = _input(module)
    assert all(map(torch.equal, _results(ours, x), _results(module, x)))
    assert list(ours.state_dict()) == list(module.state_dict())
    assert repr(ours) == repr(module).replace(theirs.__name__, OURS[theirs].__name__)
    for name in theirs.__constants__:
        assert getattr(ours, name) == getattr(module, name), name
    assert isinstance(ours, theirs.__base__)
    ours.load_state_dict(module.state_dict())
    module.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="weight"):
        ours.load_state_dict(theirs(args[0], args[1] + 1, dtype=options.get("dtype")).state_dict())
    if isinstance(module, torch.nn.RNNBase):
        assert all(a is b for a, b in zip(sum(ours.all_weights, []), ours.parameters(), strict=True))
        assert ours.flatten_parameters() is None


@every
def test_options_documentation_and_missing_arguments(theirs):
    ours = OURS[theirs]
    options = OPTIONS | ({"recompute": True} if issubclass(theirs, torch.nn.RNNBase) else {})
    quoted = "".join(f", {name}={value!r}" for name, value in options.items())
    assert repr(ours(3, 5, **options)) == f"{repr(ours(3, 5))[:-1]}{quoted})" and ours.__doc__
    for option, value in (("precision", "fp32"), ("precision", "TF32"), ("backend", "cuda")):
        with pytest.raises(ValueError, match=f"{option} must be one of .*, got '{value}'"):
            ours(3, 5, **{option: value})
    for args, given in (((3,), {}), ((3, 5), {"hidden": 3})):
        with pytest.raises(TypeError):
            ours(*args, **given)


@every
def test_copies_and_pickles(theirs):
    module = OURS[theirs](3, 5, **OPTIONS)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    x = _input(module)
    expected = _results(module, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert type(other) is OURS[theirs] and repr(other) == repr(module)
        assert all(map(torch.equal, _results(other, x), expected))
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert not torch.equal(_results(other, x)[0], expected[0])
    assert all(map(torch.equal, _results(module, x), expected)), "no copy shares its parameters"
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
        for found, expected in zip(_results(module, x), _results(torchs, x), strict=True):
            assert found.is_meta and found.shape == expected.shape
    module = module.to_empty(device=device)
    module.reset_parameters()
    assert _results(module, _input(module, device=device))[0].isfinite().all()


# ---- calls of a cell; those of a layer are in test_lstm and test_recurrent, those of the readout in test_readout_api ----


@backends
@pytest.mark.parametrize("theirs", CELLS, ids=lambda kind: kind.__name__)
def test_every_form_of_a_call(theirs, backend, device):
    theirs, ours = _pair(theirs, 3, 5, device=device, backend=backend)
    x, (h, c) = torch.randn(2, 3, device=device), torch.randn(2, 2, 5, device=device)
    if isinstance(theirs, torch.nn.LSTMCell):
        states, last = [(h, c), [h, c], torch.stack((h, c)).unbind()], (h[0], c[0])
    else:
        states, last = [h], h[0]
    for args in ((x,), (x, None), *((x, hx) for hx in states), (x[0],), (x[0], last)):
        found, expected = results = [ours(*args), theirs(*args)]
        assert type(found) is type(expected)
        _close(*map(tree_leaves, results))
        _close(*(gradients(tree_leaves(result), m.parameters()) for result, m in zip(results, (ours, theirs))))
    _close(ours(input=x, hx=states[0]), theirs(input=x, hx=states[0]))
    assert tree_leaves(ours(x.new_empty(0, 3)))[0].shape == (0, 5)


def _close(found, expected):
    # Another order of the same float32 sums; test_kernels judges the accuracy.
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


@backends
def test_parameters_are_read_on_every_call(backend, device):
    theirs, ours = _pair(torch.nn.LSTMCell, 3, 5, device=device, backend=backend)
    x = torch.randn(2, 3, device=device)
    for cell in (theirs, ours):
        cell(x)
        with torch.no_grad():
            cell.weight_hh.mul_(2)
        cell.bias_ih = torch.nn.Parameter(torch.full_like(cell.bias_ih, 0.5))
    _close(ours(x), theirs(x))
    results, x = [], torch.randn(2, 5, device=device)
    for cell in _pair(torch.nn.LSTMCell, 5, 5, device=device, backend=backend):
        cell.weight_hh = torch.nn.Parameter(torch.linspace(-1, 1, 100, device=device).view(20, 5))
        cell.weight_ih = cell.weight_hh
        results.append(gradients(cell(x, (x, x)), cell.parameters()))
    _close(*results)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_plain_call_on_a_cpu_is_torchs_forward(recompute, monkeypatch):
    theirs, ours = _pair(torch.nn.LSTM, 3, 5, 2)
    ours.recompute = recompute
    x = torch.randn(4, 2, 3)
    monkeypatch.setattr(layers, "autocast", None)  # no other way may be taken
    for input in (x, x[:, 0], pack_padded_sequence(x, torch.tensor([4, 1]))):
        results = [m(input) for m in (ours, theirs)]
        found = [
            torch.autograd.grad(states[0].sum(), m.weight_hh_l0) for (_, states), m in zip(results, (ours, theirs))
        ]
        assert_close((results[0], found[0]), (results[1], found[1]), rtol=0, atol=0)
