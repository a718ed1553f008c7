"""LSTM as a drop-in for torch.nn.LSTM: construction, parameters, copies, errors, dropout and autocast, beside torch's own."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from support.lstms import backends, flat, pair
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_triton import LSTM, layers

# ---- construction and parameters -------------------------------------------------------------------------------------

ARGUMENTS = [
    ((3, 5), {}),
    ((3, 5, 2, False, True, 0.5, True, 4), {}),
    ((3, 5), {"num_layers": 3, "bidirectional": True, "dtype": torch.float64}),
    ((3, 5), {"bias": False, "proj_size": 2, "dtype": torch.bfloat16}),
]


@pytest.mark.parametrize("args, kwargs", ARGUMENTS, ids=str)
def test_same_parameters_for_one_seed(args, kwargs):
    torch.manual_seed(7)
    theirs = torch.nn.LSTM(*args, **kwargs)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    ours = LSTM(*args, **kwargs)
    assert torch.equal(torch.rand(1), drawn), "as many random numbers drawn"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.dtype == b.dtype and a.requires_grad and torch.equal(a, b), name
    assert repr(ours) == repr(theirs)
    for name in torch.nn.LSTM.__constants__:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert all(a is b for a, b in zip(sum(ours.all_weights, []), ours.parameters(), strict=True))
    assert isinstance(ours, torch.nn.RNNBase)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="weight_hh_l0"):
        ours.load_state_dict(torch.nn.LSTM(3, 6, dtype=kwargs.get("dtype")).state_dict())


def test_repr_and_documentation():
    lstm = LSTM(3, 5, precision="tf32", backend="reference", recompute=True)
    assert repr(lstm) == "LSTM(3, 5, precision='tf32', backend='reference', recompute=True)"
    assert LSTM.__doc__ + torch.nn.LSTM.__doc__
    assert lstm.flatten_parameters() is None
    for option, value in (("precision", "fp32"), ("backend", "cuda")):
        with pytest.raises(ValueError, match=f"{option} must be one of .*, got '{value}'"):
            LSTM(3, 5, **{option: value})


def test_copies_and_pickles():
    lstm = LSTM(3, 5, 2, bidirectional=True, precision="tf32", backend="reference", recompute=True)
    file = io.BytesIO()
    torch.save(lstm, file)
    file.seek(0)
    x = torch.randn(4, 2, 3)
    expected = flat(lstm(x))
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), torch.load(file, weights_only=False)):
        assert type(other) is LSTM and repr(other) == repr(lstm)
        assert all(map(torch.equal, flat(other(x)), expected))
        with torch.no_grad():
            other.weight_ih_l0.zero_()
        assert not torch.equal(other(x)[0], expected[0])
    assert all(map(torch.equal, flat(lstm(x)), expected)), "no copy shares its parameters"
    assert copy.copy(lstm).weight_ih_l0 is lstm.weight_ih_l0


def test_instances_without_newer_attributes():
    """What was pickled before an option existed has its default."""
    lstm = LSTM(3, 5)
    for name in ("precision", "backend", "recompute"):
        del lstm.__dict__[name]
    again = pickle.loads(pickle.dumps(lstm))
    assert (again.precision, again.backend, again.recompute) == (None, "auto", False)
    x = torch.randn(4, 2, 3)
    assert torch.equal(again(x)[0], lstm(x)[0]) and repr(again) == "LSTM(3, 5)"


@backends
def test_meta_device_and_to_empty(backend, device):
    lstm = LSTM(3, 5, 2, bidirectional=True, device="meta", backend=backend)
    if backend != "triton":
        y, (h, c) = lstm(torch.randn(4, 2, 3, device="meta"))
        assert y.is_meta and y.shape == (4, 2, 10) and h.shape == c.shape == (4, 2, 5)
    lstm = lstm.to_empty(device=device)
    lstm.reset_parameters()
    assert lstm(torch.randn(4, 2, 3, device=device))[0].isfinite().all()


# ---- errors ------------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ((0, 5), {}),
    ((-1, 5), {}),
    ((3, 0), {}),
    ((3, 5, 0), {}),
    ((3.0, 5), {}),
    (("3", 5), {}),
    ((3, 5.0), {}),
    ((3, 5, 1, 1), {}),
    ((3, 5, 1, "True"), {}),
    ((3, 5), {"batch_first": 0}),
    ((3, 5), {"batch_first": None}),
    ((3, 5), {"dropout": 1.5}),
    ((3, 5), {"dropout": -0.1}),
    ((3, 5), {"dropout": True}),
    ((3, 5), {"dropout": "a"}),
    ((3, 5), {"proj_size": 5}),
    ((3, 5), {"proj_size": -1}),
]


@pytest.mark.parametrize("args, kwargs", BAD_ARGUMENTS, ids=str)
def test_constructor_errors_are_torchs(args, kwargs):
    errors = []
    for module in (torch.nn.LSTM, LSTM):
        with pytest.raises((TypeError, ValueError)) as error:
            module(*args, **kwargs)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_missing_and_unknown_arguments():
    for args, kwargs in (((3,), {}), ((3, 5), {"hidden": 3})):
        with pytest.raises(TypeError):
            LSTM(*args, **kwargs)


def test_warning_of_dropout_with_one_layer():
    texts = []
    for module in (torch.nn.LSTM, LSTM):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module(3, 5, dropout=0.25)
        texts.append([(w.category, str(w.message)) for w in caught])
    assert texts[0] == texts[1] and texts[1][0][0] is UserWarning


def _zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def _states(*shape, **options):
    return _zeros(*shape, **options), _zeros(*shape, **options)


def _packed(*shape, dtype=torch.float32):
    return pack_padded_sequence(_zeros(*shape, dtype=dtype), torch.tensor([2, 4, 1]), enforce_sorted=False)


X = (4, 3, 2)
MISTAKES = {  # of an LSTM with 2 inputs and 3 units
    "input 0D": (_zeros(),),
    "input 1D": (_zeros(2),),
    "input 4D": (_zeros(1, *X),),
    "input a list": ([[0.0, 0.0]],),
    "input None": (None,),
    "input dtype": (_zeros(*X, dtype=torch.float64),),
    "input of integers": (_zeros(*X, dtype=torch.int64),),
    "features": (_zeros(4, 3, 5),),
    "features, with states": (_zeros(4, 3, 5), _states(1, 3, 3)),
    "features, unbatched": (_zeros(4, 5),),
    "no steps": (_zeros(0, 3, 2),),
    "no steps, unbatched": (_zeros(0, 2),),
    "no steps, no rows": (_zeros(0, 0, 2),),
    "hx one tensor": (_zeros(*X), _zeros(1, 3, 3)),
    "hx one tensor of two": (_zeros(*X), _zeros(2, 3, 3)),
    "hx of one": (_zeros(*X), _states(1, 3, 3)[:1]),
    "hx of three": (_zeros(*X), (*_states(1, 3, 3), _zeros(1, 3, 3))),
    "hx empty": (_zeros(*X), ()),
    "hx of None": (_zeros(*X), (None, None)),
    "hx a string": (_zeros(*X), "hc"),
    "hx an integer": (_zeros(*X), 3),
    "states 2D": (_zeros(*X), _states(3, 3)),
    "h 2D": (_zeros(*X), (_zeros(3, 3), _zeros(1, 3, 3))),
    "states 4D": (_zeros(*X), _states(1, 1, 3, 3)),
    "layers": (_zeros(*X), _states(2, 3, 3)),
    "h rows": (_zeros(*X), (_zeros(1, 2, 3), _zeros(1, 3, 3))),
    "c rows": (_zeros(*X), (_zeros(1, 3, 3), _zeros(1, 2, 3))),
    "h units": (_zeros(*X), (_zeros(1, 3, 4), _zeros(1, 3, 3))),
    "c units": (_zeros(*X), (_zeros(1, 3, 3), _zeros(1, 3, 4))),
    "unbatched, states 3D": (_zeros(4, 2), _states(1, 1, 3)),
    "unbatched, states 1D": (_zeros(4, 2), _states(3)),
    "unbatched, units": (_zeros(4, 2), _states(1, 4)),
    "unbatched, layers": (_zeros(4, 2), _states(2, 3)),
    "h device": (_zeros(*X), (_zeros(1, 3, 3, device="meta"), _zeros(1, 3, 3))),
    "packed, hx rows": (_packed(*X), _states(1, 2, 3)),
    "packed, hx of one": (_packed(*X), _states(1, 3, 3)[:1]),
    "packed, hx of None": (_packed(*X), (None, None)),
}
# The same type, in words that name the arguments.
OTHER_WORDS = {
    "hx one tensor 4D": (_zeros(*X), _zeros(2, 1, 3, 3)),
    "states dtype": (_zeros(*X), _states(1, 3, 3, dtype=torch.float64)),
    "c dtype": (_zeros(*X), (_zeros(1, 3, 3), _zeros(1, 3, 3, dtype=torch.float64))),
    "states of integers": (_zeros(*X), _states(1, 3, 3, dtype=torch.int64)),
    "input device": (_zeros(*X, device="meta"),),
    "packed, features": (_packed(4, 3, 5),),
    "packed, input dtype": (_packed(*X, dtype=torch.float64),),
    "packed, hx units": (_packed(*X), _states(1, 3, 4)),
    "packed, hx layers": (_packed(*X), _states(2, 3, 3)),
    "packed, hx dtype": (_packed(*X), _states(1, 3, 3, dtype=torch.float64)),
}


def _to(device, argument):
    if type(argument) is tuple:
        return tuple(_to(device, a) for a in argument)
    return argument if not hasattr(argument, "to") or getattr(argument, "is_meta", False) else argument.to(device)


def _error(module, args) -> tuple[type, str]:
    with pytest.raises((AttributeError, IndexError, RuntimeError, TypeError, ValueError)) as error:
        module(*args)
    return error.type, str(error.value)


@backends
@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_are_torchs(mistake, backend, device):
    theirs, ours = pair(2, 3, backend=backend, device=device, dtype=torch.float32)
    args = _to(device, MISTAKES[mistake])
    assert _error(ours, args) == _error(theirs, args)


@backends
@pytest.mark.parametrize("mistake", OTHER_WORDS)
def test_errors_are_of_torchs_type(mistake, backend, device):
    theirs, ours = pair(2, 3, backend=backend, device=device, dtype=torch.float32)
    args = _to(device, OTHER_WORDS[mistake])
    assert _error(ours, args)[0] is _error(theirs, args)[0]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_weights_of_another_dtype(backend, device):
    _, lstm = pair(2, 3, backend=backend, device=device, dtype=torch.float32)
    lstm.weight_hh_l0 = torch.nn.Parameter(lstm.weight_hh_l0.double())
    with pytest.raises(RuntimeError, match=r"Input and weights\[1\] must have the same dtype"):
        lstm(_zeros(*X, device=device))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_plain_call_on_a_cpu_is_torchs_forward(recompute, monkeypatch):
    theirs, ours = torch.nn.LSTM(3, 5, 2), LSTM(3, 5, 2, recompute=recompute)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3)
    monkeypatch.setattr(layers, "autocast", None)  # no other way may be taken
    for input in (x, x[:, 0], torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 1]))):
        (y, states), (expected, expected_states) = ours(input), theirs(input)
        torch.testing.assert_close((y, states), (expected, expected_states), rtol=0, atol=0)
        grads = [
            torch.autograd.grad(s[0].sum(), m.weight_hh_l0) for m, s in ((ours, states), (theirs, expected_states))
        ]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
