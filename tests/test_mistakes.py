"""What is said about arguments that do not fit: what torch's own say, before a kernel of anybody's reads past their end."""

import itertools
import re
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_map

from lstm_triton import GRU, LSTM, GRUCell, LSTMCell, SoftmaxReadout, explain, functional

ERRORS = AttributeError, IndexError, RuntimeError, TypeError, ValueError


def _zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def _states(*shape, **options):
    return _zeros(*shape, **options), _zeros(*shape, **options)


def _packed(*shape, dtype=torch.float32):
    return pack_padded_sequence(_zeros(*shape, dtype=dtype), torch.tensor([2, 4, 1]), enforce_sorted=False)


# ---- modules, beside torch's own: with 2 inputs and 3 units ----------------------------------------------------------

F64, INT, META = {"dtype": torch.float64}, {"dtype": torch.int64}, {"device": "meta"}
X = _zeros(4, 3, 2)
OF_A_LAYER = {
    "input 0D": (_zeros(),),
    "input 4D": (X[None],),
    "input a list": ([[0.0, 0.0]],),
    "input None": (None,),
    "input dtype": (X.double(),),
    "input of integers": (X.long(),),
    "features": (_zeros(4, 3, 5),),
    "features, unbatched": (_zeros(4, 5),),
    "no steps": (_zeros(0, 3, 2),),
    "hx one tensor": (X, _zeros(1, 3, 3)),
    "hx of one": (X, _states(1, 3, 3)[:1]),
    "hx of three": (X, (*_states(1, 3, 3), _zeros(1, 3, 3))),
    "hx empty": (X, ()),
    "hx of None": (X, (None, None)),
    "hx a string": (X, "hc"),
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
    "h device": (X, (_zeros(1, 3, 3, **META), _zeros(1, 3, 3))),
    "packed, hx rows": (_packed(4, 3, 2), _states(1, 2, 3)),
    "packed, hx of one": (_packed(4, 3, 2), _states(1, 3, 3)[:1]),
}
OF_A_CELL = {
    "input 0D": (_zeros(),),
    "input 3D": (X,),
    "features": (_zeros(3, 5),),
    "features, unbatched": (_zeros(5),),
    "hx one tensor": (X[0], _zeros(3, 3)),
    "hx of one": (X[0], _states(3, 3)[:1]),
    "hx of three": (X[0], (*_states(3, 3), _zeros(3, 3))),
    "hx empty": (X[0], ()),
    "hx of None": (X[0], (None, None)),
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
    "input a list": ([[0.0, 0.0]],),
    "input None": (None,),
}
# The same type, in words that name the arguments.
DTYPE = "must have the same dtype"
OTHER_WORDS_OF_A_LAYER = {
    "hx one tensor 4D": ("tuple of two Tensors", X, _zeros(2, 1, 3, 3)),
    "states dtype": (DTYPE, X, _states(1, 3, 3, **F64)),
    "c dtype": (DTYPE, X, (_zeros(1, 3, 3), _zeros(1, 3, 3, **F64))),
    "states of integers": (DTYPE, X, _states(1, 3, 3, **INT)),
    "input device": ("device|meta", X.to("meta")),
    "packed, features": ("must be equal to input_size", _packed(4, 3, 5)),
    "packed, input dtype": (DTYPE, _packed(4, 3, 2, **F64)),
    "packed, hx units": ("Expected hidden", _packed(4, 3, 2), _states(1, 3, 4)),
    "packed, hx layers": ("Expected hidden", _packed(4, 3, 2), _states(2, 3, 3)),
    "packed, hx dtype": (DTYPE, _packed(4, 3, 2), _states(1, 3, 3, **F64)),
}
OTHER_WORDS_OF_A_CELL = {
    "input dtype": (DTYPE, X[0].double()),
    "h dtype": (DTYPE, X[0], (_zeros(3, 3, **F64), _zeros(3, 3))),
    "input of integers": ("dtype|int64", X[0].long()),
    "hx an integer": ("int", X[0], 3),
    "input device": ("device|meta", X[0].to("meta")),
    "h device": ("device", X[0], (_zeros(3, 3, **META), _zeros(3, 3))),
}
MISTAKES = {}
for _kind, _table in (("LSTM", OF_A_LAYER), ("LSTMCell", OF_A_CELL)):
    MISTAKES |= {f"{_kind}, {name}": (_kind, None, args) for name, args in _table.items()}
for _kind, _table in (("GRU", OF_A_LAYER), ("GRUCell", OF_A_CELL)):  # with h in place of (h, c)
    _words = r"Expected hidden\[0\] size|, hx and cx should also be|object has no attribute"
    _rows = {name: args for name, args in _table.items() if not re.search(r"\b(hx|c)\b|^states", name)}
    MISTAKES |= {f"{_kind}, {n}": (_kind, _words, (x, *(h for h, _ in hx))) for n, (x, *hx) in _rows.items()}
for _kind, _table in (("LSTM", OTHER_WORDS_OF_A_LAYER), ("LSTMCell", OTHER_WORDS_OF_A_CELL)):
    MISTAKES |= {f"{_kind}, {name}": (_kind, words, args) for name, (words, *args) in _table.items()}


# ((arguments, options), ...) of constructors.
BAD_LAYERS = [
    *(((0, 5), {}), ((-1, 5), {}), ((3, 0), {}), ((3, 5, 0), {}), ((3.0, 5), {}), (("3", 5), {}), ((3, 5.0), {})),
    *(((3, 5, 1, 1), {}), ((3, 5, 1, "True"), {}), ((3, 5), {"batch_first": 0}), ((3, 5), {"batch_first": None})),
    *(((3, 5), {"dropout": p}) for p in (1.5, -0.1, True, "a")),
    *(((3, 5), {"proj_size": size}) for size in (5, -1)),
]
BAD_CELLS = [((size, H), {}) for size, H in ((3.5, 4), ("3", 4), (3, -4))] + [((3,), {})]
OURS = {kind.__name__: kind for kind in (LSTM, LSTMCell, GRU, GRUCell)}


def _raised(call, *args, **options):
    with pytest.raises(ERRORS) as error:
        call(*args, **options)
    return error.type, str(error.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_are_torchs(mistake, device):
    name, words, args = MISTAKES[mistake]
    args = tree_map(lambda a: a.to(device) if isinstance(a, torch.Tensor) and not a.is_meta else a, args)
    ours = OURS[name](2, 3, device=device, backend="triton")
    expected, found = (_raised(module, *args) for module in (getattr(torch.nn, name)(2, 3, device=device), ours))
    assert found == expected or (words and found[0] is expected[0] and re.search(words, found[1])), found


@pytest.mark.parametrize("name", OURS)
def test_errors_and_warnings_of_constructors_are_torchs(name):
    theirs, ours = getattr(torch.nn, name), OURS[name]
    for kind in (theirs, ours) if "Cell" not in name else ():
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            kind(3, 5, dropout=0.25)
    for args, options in BAD_CELLS if "Cell" in name else BAD_LAYERS:
        found, expected = (_raised(kind, *args, **options) for kind in (ours, theirs))
        assert (found[0], found[1].replace(f"{name}.", "")) == (expected[0], expected[1].replace(f"{name}.", "")), args


# ---- functions of weights, and what torch has not: on the kernels' backend ----------------------------------------

IN = _zeros(3, 2, 4), _states(1, 2, 5), [_zeros(20, 4), _zeros(20, 5), _zeros(20), _zeros(20)]
FLAGS = [[True, False]] * 4
lstm, lstm_cell, softmax_readout = (
    partial(function, backend="triton")
    for function in (functional.lstm, functional.lstm_cell, functional.softmax_readout)
)


def _lstm(x, batch_first=False, **arguments):
    return lambda: LSTM(2, 3, backend="triton", batch_first=batch_first)(x, **arguments)


def _calls_of_the_readout(h, w):
    w, b = w[0], w[2]
    return {
        f"{name} of a readout": (partial(softmax_readout, *args), RuntimeError, words)
        for name, words, *args in (
            ("size of h", "shapes cannot be multiplied", h[..., 1:], w, b),
            ("h without dimensions", r"h must be \[..., H\]", h[0, 0, 0], w, b),
            ("rank of the weight", r"weight \[V, H\]", h, w[None], b),
            ("size of the bias", "bias must have size 20", h, w, b[1:]),
            ("dtype of the weight", "same dtype", h, w.double(), b),
            ("dtype of the bias", "same dtype", h, w, b.half()),
            ("device of the weight", "same device", h, w.to("meta"), b),
            ("device of the bias", "same device", h, w, b.to("meta")),
        )
    } | {
        "no h of a readout": (lambda: softmax_readout(None, w), TypeError, "Tensor"),
        "unknown precision of a readout": (lambda: softmax_readout(h, w, precision="fp8"), ValueError, "precision"),
        "unknown backend of a readout": (lambda: softmax_readout(h, w, backend="cuda"), ValueError, "backend"),
        "no weight of a readout": (lambda: softmax_readout(h, None), TypeError, "Tensor"),
    }


def _calls(x, hx, w):
    return {
        "x of two dimensions": (lambda: lstm(x[0], hx, w), ValueError, "Expected input to be 3D, got 2D"),
        "no steps": (lambda: lstm(x[:0], hx, w), RuntimeError, "sequence length to be larger than 0"),
        "x too wide": (lambda: lstm(x.repeat(1, 1, 2), hx, w), RuntimeError, "input_size. Expected 4, got 8"),
        "one weight": (lambda: lstm(x, hx, w[:1]), RuntimeError, "needs w_ih and w_hh"),
        "a vector for w_hh": (lambda: lstm(x, hx, [w[0], w[2]]), RuntimeError, "needs w_ih and w_hh"),
        "a weight of no dimension": (lambda: lstm(x, hx, [_zeros(), w[1]]), RuntimeError, "needs w_ih and w_hh"),
        "three weights": (lambda: lstm(x, hx, w[:3]), RuntimeError, "weights must be w_ih and w_hh"),
        "a bias too short": (lambda: lstm(x, hx, [*w[:3], w[3][1:]]), RuntimeError, r"weights\[3\] must have size"),
        "one state": (lambda: lstm(x, hx[:1], w), RuntimeError, "expects two hidden states"),
        "three states": (lambda: lstm(x, (*hx, hx[0]), w), RuntimeError, "expects two hidden states"),
        "a tensor for states": (lambda: lstm(x, torch.stack(hx), w), TypeError, "tuple of two Tensors"),
        "a dict for states": (lambda: lstm(x, dict(enumerate(hx)), w), TypeError, "tuple of two Tensors"),
        "states of None": (lambda: lstm(x, (None, None), w), TypeError, "tuple of two Tensors"),
        "states of other rows": (lambda: lstm(x, (hx[0][:, :1], hx[1]), w), RuntimeError, r"Expected hidden\[0\]"),
        "a state's dtype": (
            lambda: lstm(x, (hx[0], hx[1].double()), w),
            RuntimeError,
            r"hx\[1\] must have the same dtype",
        ),
        "a weight's device": (lambda: lstm(x, hx, [*w[:3], w[3].to("meta")]), RuntimeError, "parameter tensor at meta"),
        "unknown precision": (lambda: lstm(x, hx, w, precision="fp8"), ValueError, "precision must be"),
        "unknown backend": (lambda: functional.lstm(x, hx, w, backend="cuda"), ValueError, "backend must be"),
        "a row longer than x": (lambda: lstm(x, hx, w, lengths=torch.tensor([1, 4])), ValueError, "lengths"),
        "no weight": (lambda: lstm(x, None, [None, w[1]]), TypeError, "Tensor"),
        "no weight of a cell": (lambda: lstm_cell(x[0], _states(2, 5), None, w[1]), TypeError, "Tensor"),
        "a weight of another dtype": (
            lambda: functional_call(
                LSTM(2, 3, backend="triton"), {"weight_hh_l0": _zeros(12, 3, **F64)}, _zeros(4, 3, 2)
            ),
            RuntimeError,
            r"Input and weights\[1\] must have the same dtype",
        ),
        **_calls_of_the_readout(x, w),
        "no h of a module": (lambda: SoftmaxReadout(2, 3, backend="triton")(None), TypeError, "Tensor"),
        "resets a list": (_lstm(_zeros(4, 4, 2), resets=FLAGS), TypeError, "must be a tensor"),
        "resets an array": (_lstm(_zeros(4, 2), resets=torch.tensor(FLAGS).numpy()), TypeError, "must be a tensor"),
        "resets a list, batch first": (_lstm(_zeros(4, 4, 2), True, resets=FLAGS), TypeError, "must be a tensor"),
        "lengths an integer": (_lstm(_zeros(4, 2), lengths=3), TypeError, "must be a tensor"),
        "lengths a list": (_lstm(_zeros(4, 2, 2), lengths=[4, 2]), TypeError, "must be a tensor"),
        "hx a dict": (_lstm(_zeros(4, 3, 2), hx=dict(enumerate(_states(1, 3, 3)))), TypeError, "tuple of two Tensors"),
    }


@pytest.mark.parametrize("mistake", _calls(*IN))
def test_errors_name_the_argument(mistake, device):
    with torch.device(device):
        call, error, words = _calls(*tree_map(lambda t: t.to(device), IN))[mistake]
        with pytest.raises(error, match=words):
            call()


def test_explain_no_rows():
    assert "with B = 0" in explain(LSTM(2, 3, backend="triton"), batch=0)


# ---- what torch's kernels would read past the end of, or at address 0: so "auto" too -------------------------------

backends = pytest.mark.parametrize("backend", ["auto", "triton"])


def _past_the_end(backend):
    """Calls, and the words of their RuntimeError."""
    sizes = torch.tensor([2, 2])
    for rows in (3, 5):
        packed = PackedSequence(_zeros(rows, 2), sizes)
        for kind, options in ((LSTM, {}), (LSTM, {"proj_size": 2}), (GRU, {})):
            yield kind(2, 3, backend=backend, **options), (packed,), f"has 4 rows, got {rows}"
    states = [(1, None), (7, None), (7, (1, 2, 3)), (2, (1, 2, 7)), (2, (1, 1, 3)), (2, (2, 3))]
    for features, state in states:
        given = PackedSequence(_zeros(4, features), sizes), None if state is None else _states(*state)
        yield LSTM(2, 3, backend=backend), given, "must be equal to input_size|Expected hidden"
    for H, kind in itertools.product((1, 2, 3), (LSTMCell, GRUCell)):
        for state in (_zeros(H, H), _zeros(1, H)):  # of a batch, for an input without one
            yield kind(3, H, backend=backend), (_zeros(3), (state, state) if kind is LSTMCell else state), "hidden"
    x = _zeros(4, 2, 2)
    inputs = {kind: [x, pack_padded_sequence(x, [4, 2])] for kind in (LSTM, GRU)}
    inputs |= {LSTMCell: [x[0]], GRUCell: [x[0]], SoftmaxReadout: [x]}
    for (kind, given), bias in itertools.product(inputs.items(), (False, True)):
        for input in given:
            yield kind(2, 3, bias=bias, device="meta", backend=backend), (input,), "device"


@backends
def test_what_does_not_fit_is_not_read(backend):
    for module, args, words in _past_the_end(backend):
        with pytest.raises(RuntimeError, match=words):
            module(*args)


# ---- no mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_lengths_may_be_unsigned(dtype):
    module, x, lengths = LSTM(2, 3), torch.randn(4, 2, 2), torch.tensor([1, 4])
    assert torch.equal(module(x, lengths=lengths.to(dtype))[0], module(x, lengths=lengths)[0])
    with pytest.raises(ValueError, match="lengths must lie in 0 ... 4"):
        module(x, lengths=torch.tensor([1, 5]).to(dtype))


@backends
def test_parameters_without_memory_that_are_not_used(backend):
    module, packed = GRU(2, 3, device="meta", backend=backend), pack_padded_sequence(torch.zeros(4, 2, 2), [4, 2])
    functional_call(module, dict(GRU(2, 3).named_parameters()), (packed,))


@backends
@pytest.mark.parametrize("segments", [False, True])
def test_packed_under_another_default_device(segments, backend):
    module, x = LSTM(2, 3, backend=backend), pack_padded_sequence(torch.randn(4, 2, 2), [4, 2])
    options = {"return_cell_states": True, "resets": torch.tensor([[False, True]] * 4)} if segments else {}
    expected = module(x, **options)[0].data
    with torch.device("meta"):
        assert torch.equal(module(x, **options)[0].data, expected)


@backends
def test_lengths_that_the_host_cannot_read(backend):
    # In float32 the kernels round as tf32, the reference does not.
    module = LSTM(2, 3, backend=backend, dtype=torch.float64).requires_grad_(False)
    x, lengths = torch.randn(4, 2, 2, dtype=torch.float64), torch.tensor([4, 2])

    def call(x, lengths):
        return module(x, lengths=lengths)[0]

    expected = call(x, lengths)
    both = torch.func.vmap(call, in_dims=(None, 0))(x, torch.stack([lengths, lengths.flip(0)]))
    torch.testing.assert_close(both, torch.stack([expected, call(x, lengths.flip(0))]))
    torch.testing.assert_close(torch.func.linearize(lambda x: call(x, lengths), x)[0], expected)
    torch.testing.assert_close(make_fx(call)(x, lengths)(x, lengths), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x), mode.from_tensor(lengths)).shape == (4, 2, 3)
