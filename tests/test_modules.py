"""LSTMCell as a drop-in for torch.nn.LSTMCell: construction, parameters, calls and errors, each beside torch's own."""

import copy
import io
import pickle

import pytest
import torch

from lstm_triton import LSTMCell

BACKENDS = ["auto", "triton", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def _pair(*args, backend="auto", **kwargs):
    """torch's cell and ours, with the same parameters."""
    theirs = torch.nn.LSTMCell(*args, **kwargs)
    ours = LSTMCell(*args, **kwargs, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _close(found, expected):
    # Another order of the same float32 sums; test_cell judges the accuracy.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- construction and parameters -------------------------------------------------------------------------------------

ARGUMENTS = [((3, 5), {}), ((3, 5, False), {}), ((1, 1, True), {"dtype": torch.float64}), ((0, 2), {})]


@pytest.mark.parametrize("args, kwargs", ARGUMENTS, ids=str)
def test_same_parameters_for_one_seed(args, kwargs):
    torch.manual_seed(7)
    theirs = torch.nn.LSTMCell(*args, **kwargs)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    ours = LSTMCell(*args, **kwargs)
    assert torch.equal(torch.rand(1), drawn), "as many random numbers drawn"
    assert isinstance(ours, torch.nn.LSTMCell)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.dtype == b.dtype and a.requires_grad and torch.equal(a, b), name
    assert (ours.input_size, ours.hidden_size, ours.bias) == (theirs.input_size, theirs.hidden_size, theirs.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_loads_both_ways(bias):
    theirs, ours = torch.nn.LSTMCell(3, 5, bias), LSTMCell(3, 5, bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3)
    assert all(map(torch.equal, ours(x), theirs(x)))
    torch.nn.LSTMCell(3, 5, bias).load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="bias_ih"):
        ours.load_state_dict(torch.nn.LSTMCell(3, 5, not bias).state_dict())


def test_repr():
    assert repr(LSTMCell(3, 5)) == repr(torch.nn.LSTMCell(3, 5))
    assert repr(LSTMCell(3, 5, False)) == repr(torch.nn.LSTMCell(3, 5, False))
    cell = LSTMCell(3, 5, precision="tf32", backend="reference")
    assert repr(cell) == "LSTMCell(3, 5, precision='tf32', backend='reference')"


@pytest.mark.parametrize("option, value", [("precision", "fp32"), ("precision", "TF32"), ("backend", "cuda")])
def test_unknown_options(option, value):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got '{value}'"):
        LSTMCell(3, 5, **{option: value})


@pytest.mark.parametrize("args", [(3.5, 4), ("3", 4), (3, -4), (3,)], ids=str)
def test_constructor_errors_are_torchs(args):
    errors = []
    for cell in (torch.nn.LSTMCell, LSTMCell):
        with pytest.raises((TypeError, RuntimeError)) as error:
            cell(*args)
        errors.append((error.type, str(error.value).replace(f"{cell.__name__}.", "")))
    assert errors[0] == errors[1]


def test_copies_and_pickles():
    cell = LSTMCell(3, 5, precision="tf32", backend="reference")
    file = io.BytesIO()
    torch.save(cell, file)
    file.seek(0)
    copies = copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), torch.load(file, weights_only=False)
    x = torch.randn(2, 3)
    for other in copies:
        assert type(other) is LSTMCell and repr(other) == repr(cell)
        assert all(map(torch.equal, other(x), cell(x)))
        assert other.weight_ih is not cell.weight_ih


def test_meta_device_and_to_empty(device):
    cell = LSTMCell(3, 5, device="meta")
    h, c = cell(torch.randn(2, 3, device="meta"))
    assert h.is_meta and h.shape == c.shape == (2, 5)
    cell = cell.to_empty(device=device)
    cell.reset_parameters()
    assert cell(torch.randn(2, 3, device=device))[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moved_to_another_dtype(dtype, device):
    cell = LSTMCell(3, 5, backend="triton").to(device, dtype)
    h, c = cell(torch.randn(2, 3, device=device, dtype=dtype))
    assert h.dtype == c.dtype == dtype


# ---- calls ---------------------------------------------------------------------------------------------------------


@backends
def test_every_form_of_a_call(backend, device):
    theirs, ours = _pair(3, 5, device=device, backend=backend)
    x = torch.randn(2, 3, device=device)
    h, c = torch.randn(2, 2, 5, device=device)
    for args in (
        (x,),
        (x, None),
        (x, (h, c)),
        (x, [h, c]),
        (x[0],),
        (x[0], (h[0], c[0])),
        (x, torch.stack((h, c)).unbind()),
    ):
        found, expected = ours(*args), theirs(*args)
        assert isinstance(found, tuple) and [t.shape for t in found] == [t.shape for t in expected]
        _close(found, expected)
    _close(ours(input=x, hx=(h, c)), theirs(input=x, hx=(h, c)))
    assert ours(x.new_empty(0, 3))[0].shape == (0, 5)


@backends
def test_training_without_a_batch(backend, device):
    theirs, ours = _pair(3, 5, device=device, backend=backend)
    x = torch.randn(3, device=device)
    for cell in (theirs, ours):
        h, c = cell(x)
        h, c = cell(x, (h, c))
        (h.sum() + (c**2).sum()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        _close(a.grad, b.grad)


@backends
def test_parameters_are_read_on_every_call(backend, device):
    theirs, ours = _pair(3, 5, device=device, backend=backend)
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


def test_weight_norm(device):
    x = torch.randn(2, 3, device=device)
    results = []
    for cell in _pair(3, 5, device=device, backend="triton"):
        torch.nn.utils.parametrizations.weight_norm(cell, "weight_hh")
        cell(x, cell(x))[0].sum().backward()
        results.append([p.grad for p in cell.parameters()])
    _close(*results)


def test_frozen_parameters_get_no_gradient(device):
    _, cell = _pair(3, 5, device=device, backend="triton")
    cell.weight_ih.requires_grad_(False)
    cell.bias_hh.requires_grad_(False)
    cell(torch.randn(2, 3, device=device))[0].sum().backward()
    assert [p.grad is None for p in cell.parameters()] == [True, False, False, True]


# ---- errors --------------------------------------------------------------------------------------------------------


def _zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def _states(*shape):
    return _zeros(*shape), _zeros(*shape)


MISTAKES = {  # of a cell with 3 inputs and 4 units
    "input 0D": (_zeros(),),
    "input 3D": (_zeros(2, 2, 3),),
    "input 3D, with states": (_zeros(2, 2, 3), _states(2, 4)),
    "features": (_zeros(2, 5),),
    "features, with states": (_zeros(2, 5), _states(2, 4)),
    "features, unbatched": (_zeros(5),),
    "hx one tensor": (_zeros(2, 3), _zeros(2, 4)),
    "hx one tensor of two": (_zeros(2, 3), _zeros(2, 2, 4)),
    "hx of one": (_zeros(2, 3), _states(2, 4)[:1]),
    "hx of three": (_zeros(2, 3), (*_states(2, 4), _zeros(2, 4))),
    "hx empty": (_zeros(2, 3), ()),
    "hx of None": (_zeros(2, 3), (None, None)),
    "hx a string": (_zeros(2, 3), "hc"),
    "h 3D": (_zeros(2, 3), (_zeros(1, 2, 4), _zeros(2, 4))),
    "c 3D": (_zeros(2, 3), (_zeros(2, 4), _zeros(1, 2, 4))),
    "h 0D": (_zeros(2, 3), (_zeros(), _zeros(2, 4))),
    "h rows": (_zeros(2, 3), (_zeros(3, 4), _zeros(2, 4))),
    "c rows": (_zeros(2, 3), (_zeros(2, 4), _zeros(3, 4))),
    "c one row": (_zeros(2, 3), (_zeros(2, 4), _zeros(1, 4))),
    "h units": (_zeros(2, 3), (_zeros(2, 5), _zeros(2, 4))),
    "c units": (_zeros(2, 3), (_zeros(2, 4), _zeros(2, 5))),
    "states unbatched": (_zeros(2, 3), _states(4)),
    "c unbatched": (_zeros(2, 3), (_zeros(2, 4), _zeros(4))),
    "states batched": (_zeros(3), _states(2, 4)),
    "states batched by one": (_zeros(3), _states(1, 4)),
    "c batched": (_zeros(3), (_zeros(4), _zeros(2, 4))),
    "input a list": ([[0.0, 0.0, 0.0]],),
    "input None": (None,),
}
# The same type, in words that name the arguments.
OTHER_WORDS = {
    "input dtype": ((_zeros(2, 3, dtype=torch.float64),), "must have the same dtype, but got"),
    "h dtype": ((_zeros(2, 3), (_zeros(2, 4, dtype=torch.float64), _zeros(2, 4))), "must have the same dtype, but got"),
    "input of integers": ((_zeros(2, 3, dtype=torch.int64),), "dtype|int64"),
    "hx an integer": ((_zeros(2, 3), 3), "int"),
    "input device": ((_zeros(2, 3, device="meta"),), "device|meta"),
    "h device": ((_zeros(2, 3), (_zeros(2, 4, device="meta"), _zeros(2, 4))), "device"),
}


def _to(device, argument):
    if isinstance(argument, tuple):
        return tuple(_to(device, a) for a in argument)
    return argument.to(device) if isinstance(argument, torch.Tensor) and not argument.is_meta else argument


def _error(cell, args):
    with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError)) as error:
        cell(*args)
    return error.type, str(error.value)


@backends
@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_are_torchs(mistake, backend, device):
    theirs, ours = _pair(3, 4, device=device, backend=backend)
    args = _to(device, MISTAKES[mistake])
    assert _error(ours, args) == _error(theirs, args)


@backends
@pytest.mark.parametrize("mistake", OTHER_WORDS)
def test_errors_are_of_torchs_type(mistake, backend, device):
    theirs, ours = _pair(3, 4, device=device, backend=backend)
    args, words = OTHER_WORDS[mistake]
    args = _to(device, args)
    found, expected = _error(ours, args), _error(theirs, args)
    assert found[0] is expected[0]
    for text in (found[1], expected[1]):
        assert any(word in text for word in words.split("|")), text
