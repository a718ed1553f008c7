"""What calls of LSTM and LSTMCell raise for arguments that do not fit: what torch's own raise."""

import re

import pytest
import torch
from test_modules import pair, raised
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map

from lstm_triton import LSTM


def _zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def _states(*shape, **options):
    return _zeros(*shape, **options), _zeros(*shape, **options)


def _packed(*shape, dtype=torch.float32):
    return pack_padded_sequence(_zeros(*shape, dtype=dtype), torch.tensor([2, 4, 1]), enforce_sorted=False)


def _meta(*shape):
    return _zeros(*shape, device="meta")


F64, INT = {"dtype": torch.float64}, {"dtype": torch.int64}
X = _zeros(4, 3, 2)
OF_A_LAYER = {  # with 2 inputs and 3 units
    "input 0D": (_zeros(),),
    "input 1D": (_zeros(2),),
    "input 4D": (X[None],),
    "input a list": ([[0.0, 0.0]],),
    "input None": (None,),
    "input dtype": (X.double(),),
    "input of integers": (X.long(),),
    "features": (_zeros(4, 3, 5),),
    "features, with states": (_zeros(4, 3, 5), _states(1, 3, 3)),
    "features, unbatched": (_zeros(4, 5),),
    "no steps": (_zeros(0, 3, 2),),
    "no steps, unbatched": (_zeros(0, 2),),
    "no steps, no rows": (_zeros(0, 0, 2),),
    "hx one tensor": (X, _zeros(1, 3, 3)),
    "hx one tensor of two": (X, _zeros(2, 3, 3)),
    "hx of one": (X, _states(1, 3, 3)[:1]),
    "hx of three": (X, (*_states(1, 3, 3), _zeros(1, 3, 3))),
    "hx empty": (X, ()),
    "hx of None": (X, (None, None)),
    "hx a string": (X, "hc"),
    "hx an integer": (X, 3),
    "states 2D": (X, _states(3, 3)),
    "h 2D": (X, (_zeros(3, 3), _zeros(1, 3, 3))),
    "states 4D": (X, _states(1, 1, 3, 3)),
    "layers": (X, _states(2, 3, 3)),
    "h rows": (X, (_zeros(1, 2, 3), _zeros(1, 3, 3))),
    "c rows": (X, (_zeros(1, 3, 3), _zeros(1, 2, 3))),
    "h units": (X, (_zeros(1, 3, 4), _zeros(1, 3, 3))),
    "c units": (X, (_zeros(1, 3, 3), _zeros(1, 3, 4))),
    "unbatched, states 3D": (X[:, 0], _states(1, 1, 3)),
    "unbatched, states 1D": (X[:, 0], _states(3)),
    "unbatched, units": (X[:, 0], _states(1, 4)),
    "unbatched, layers": (X[:, 0], _states(2, 3)),
    "h device": (X, (_meta(1, 3, 3), _zeros(1, 3, 3))),
    "packed, hx rows": (_packed(4, 3, 2), _states(1, 2, 3)),
    "packed, hx of one": (_packed(4, 3, 2), _states(1, 3, 3)[:1]),
    "packed, hx of None": (_packed(4, 3, 2), (None, None)),
}
OF_A_CELL = {  # with 2 inputs and 3 units
    "input 0D": (_zeros(),),
    "input 3D": (X,),
    "input 3D, with states": (X, _states(3, 3)),
    "features": (_zeros(3, 5),),
    "features, with states": (_zeros(3, 5), _states(3, 3)),
    "features, unbatched": (_zeros(5),),
    "hx one tensor": (X[0], _zeros(3, 3)),
    "hx one tensor of two": (X[0], _zeros(2, 3, 3)),
    "hx of one": (X[0], _states(3, 3)[:1]),
    "hx of three": (X[0], (*_states(3, 3), _zeros(3, 3))),
    "hx empty": (X[0], ()),
    "hx of None": (X[0], (None, None)),
    "hx a string": (X[0], "hc"),
    "h 3D": (X[0], (_zeros(1, 3, 3), _zeros(3, 3))),
    "c 3D": (X[0], (_zeros(3, 3), _zeros(1, 3, 3))),
    "h 0D": (X[0], (_zeros(), _zeros(3, 3))),
    "h rows": (X[0], (_zeros(2, 3), _zeros(3, 3))),
    "c rows": (X[0], (_zeros(3, 3), _zeros(2, 3))),
    "c one row": (X[0], (_zeros(3, 3), _zeros(1, 3))),
    "h units": (X[0], (_zeros(3, 5), _zeros(3, 3))),
    "c units": (X[0], (_zeros(3, 3), _zeros(3, 5))),
    "states unbatched": (X[0], _states(3)),
    "c unbatched": (X[0], (_zeros(3, 3), _zeros(3))),
    "states batched": (X[0, 0], _states(2, 3)),
    "states batched by one": (X[0, 0], _states(1, 3)),
    "c batched": (X[0, 0], (_zeros(3), _zeros(2, 3))),
    "input a list": ([[0.0, 0.0]],),
    "input None": (None,),
}
# The same type, in words that name the arguments: what they say, of a layer and of a cell.
SAME_DTYPE = "must have the same dtype"
OTHER_WORDS_OF_A_LAYER = {
    "hx one tensor 4D": ((X, _zeros(2, 1, 3, 3)), "tuple of two Tensors"),
    "states dtype": ((X, _states(1, 3, 3, **F64)), SAME_DTYPE),
    "c dtype": ((X, (_zeros(1, 3, 3), _zeros(1, 3, 3, **F64))), SAME_DTYPE),
    "states of integers": ((X, _states(1, 3, 3, **INT)), SAME_DTYPE),
    "input device": ((X.to("meta"),), "device|meta"),
    "packed, features": ((_packed(4, 3, 5),), "must be equal to input_size"),
    "packed, input dtype": ((_packed(4, 3, 2, **F64),), SAME_DTYPE),
    "packed, hx units": ((_packed(4, 3, 2), _states(1, 3, 4)), "Expected hidden"),
    "packed, hx layers": ((_packed(4, 3, 2), _states(2, 3, 3)), "Expected hidden"),
    "packed, hx dtype": ((_packed(4, 3, 2), _states(1, 3, 3, **F64)), SAME_DTYPE),
}
OTHER_WORDS_OF_A_CELL = {
    "input dtype": ((X[0].double(),), SAME_DTYPE),
    "h dtype": ((X[0], (_zeros(3, 3, **F64), _zeros(3, 3))), SAME_DTYPE),
    "input of integers": ((X[0].long(),), "dtype|int64"),
    "hx an integer": ((X[0], 3), "int"),
    "input device": ((X[0].to("meta"),), "device|meta"),
    "h device": ((X[0], (_meta(3, 3), _zeros(3, 3))), "device"),
}


def _both(theirs, args, backend, device):
    """The errors of our module and of torch's."""
    module, ours = pair(theirs, 2, 3, device=device, backend=backend)
    args = tree_map(lambda a: a.to(device) if isinstance(a, torch.Tensor) and not a.is_meta else a, args)
    return (raised(kind, *args) for kind in (ours, module))


def _mistakes(of_a_layer, of_a_cell):
    named = [(torch.nn.LSTM, name, given) for name, given in of_a_layer.items()]
    named += [(torch.nn.LSTMCell, name, given) for name, given in of_a_cell.items()]
    cases = [pytest.param(kind, given, id=f"{kind.__name__}, {name}") for kind, name, given in named]
    return pytest.mark.parametrize("theirs, mistake", cases)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@_mistakes(OF_A_LAYER, OF_A_CELL)
def test_errors_are_torchs(theirs, mistake, backend, device):
    found, expected = _both(theirs, mistake, backend, device)
    assert found == expected


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@_mistakes(OTHER_WORDS_OF_A_LAYER, OTHER_WORDS_OF_A_CELL)
def test_errors_are_of_torchs_type(theirs, mistake, backend, device):
    args, words = mistake
    found, expected = _both(theirs, args, backend, device)
    assert found == expected or (found[0] is expected[0] and re.search(words, found[1])), found


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_weights_of_another_dtype(backend, device):
    lstm = LSTM(2, 3, backend=backend, device=device)
    lstm.weight_hh_l0 = torch.nn.Parameter(lstm.weight_hh_l0.double())
    with pytest.raises(RuntimeError, match=r"Input and weights\[1\] must have the same dtype"):
        lstm(X.to(device))
