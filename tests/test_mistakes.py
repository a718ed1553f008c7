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


def _zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def _states(*shape, **options):
    return _zeros(*shape, **options), _zeros(*shape, **options)


def _packed(*shape, dtype=torch.float32):
    return pack_padded_sequence(_zeros(*shape, dtype=dtype), torch.tensor([2, 4, 1]), enforce_sorted=False)


# ---- modules, beside torch's own: with 2 inputs and 3 units ----------------------------------------------------------

F64 = {"dtype": torch.float64}
OURS = {kind.__name__: kind for kind in (LSTM, LSTMCell, GRU, GRUCell)}
# Of these mistakes the type is torch's, and the words name the argument.
WORDS = {
    r"(states|c|hx) dtype|packed, input dtype|Cell, \w+ dtype|states of integers": "must have the same dtype",
    "Cell, input of integers": "dtype|int64",
    "input device|Cell, h device": "device|meta",
    "packed, (features|hx (units|layers))": "must be equal to input_size|Expected hidden",
    "hx 4D|hx an integer": "tuple of two Tensors|int",
    "^GRU, (h (units|rows|unbatched)|layers)": r"Expected hidden\[0\]",
    "^GRU, (h of|states 1D)": "hx and cx should",
    "^GRUCell, input (a list|None)": "no attribute",
}


def _of_both(x, *layers):
    """For a good input with 3 batch rows; layers: () of a cell, (1,) of a layer."""
    one = x[..., 0, :]
    h = c = _zeros(*layers, 3, 3)
    mistakes = {
        "input 0D": (_zeros(),),
        "input of a dimension more": (_zeros(1, 1, 3, 2) if layers else _zeros(1, 3, 2),),
        "input a list": ([[0.0, 0.0]],),
        "input None": (None,),
        "input dtype": (x.double(),),
        "input of integers": (x.long(),),
        "input device": (x.to("meta"),),
        "features": (_zeros(*x.shape[:-1], 5),),
        "features, unbatched": (_zeros(*one.shape[:-1], 5),),
        "h units": (x, (_zeros(*layers, 3, 4), c)),
        "h rows": (x, (h[..., :2, :], c)),
        "h of a dimension more": (x, (h[None], c)),
        "h device": (x, (h.to("meta"), c)),
        "h of a batch, for an input without one": (one, (h if layers else h[:2], c)),
        "h unbatched, units": (one, (_zeros(*layers, 4), _zeros(*layers, 3))),
        "states dtype": (x, (h.double(), c.double())),
    }
    return mistakes, {
        "hx one tensor": (x, h),
        "hx of one": (x, (h,)),
        "hx of three": (x, (h, c, c)),
        "hx empty": (x, ()),
        "hx of None": (x, (None, None)),
        "c units": (x, (h, _zeros(*layers, 3, 4))),
        "c rows": (x, (h, c[..., :2, :])),
        "c one row": (x, (h, c[..., :1, :])),
        "c of a dimension more": (x, (h, c[None])),
        "c unbatched": (x, (h, c[..., 0, :])),
        "states unbatched": (x, (h[..., 0, :], c[..., 0, :])),
    }


X = _zeros(4, 3, 2)
OF_A_LAYER, OF_TWO_STATES = _of_both(X, 1)
OF_A_LAYER |= {
    "no steps": (X[:0],),
    "layers": (X, _states(2, 3, 3)),
    "states 1D, unbatched": (X[:, 0], _states(3)),
    "packed, hx rows": (_packed(4, 3, 2), _states(1, 2, 3)),
}
OF_TWO_STATES |= {
    "hx a string": (X, "hc"),
    "c dtype": (X, (_zeros(1, 3, 3), _zeros(1, 3, 3, **F64))),
    "hx 4D": (X, _zeros(2, 1, 3, 3)),
    "states of integers": (X, tuple(t.long() for t in _states(1, 3, 3))),
    "packed, hx of one": (_packed(4, 3, 2), _states(1, 3, 3)[:1]),
    "packed, features": (_packed(4, 3, 5),),
    "packed, input dtype": (_packed(4, 3, 2, **F64),),
    "packed, hx units": (_packed(4, 3, 2), _states(1, 3, 4)),
    "packed, hx layers": (_packed(4, 3, 2), _states(2, 3, 3)),
    "packed, hx dtype": (_packed(4, 3, 2), _states(1, 3, 3, **F64)),
}
OF_A_CELL, OF_A_CELL_OF_TWO = _of_both(X[0])
OF_A_CELL |= {"h 0D": (X[0], (_zeros(), _zeros(3, 3)))}
OF_A_CELL_OF_TWO |= {"hx an integer": (X[0], 3)}
OF_MODULES = {"LSTM": OF_A_LAYER | OF_TWO_STATES, "LSTMCell": OF_A_CELL | OF_A_CELL_OF_TWO}
for _kind, _table in (("GRU", OF_A_LAYER), ("GRUCell", OF_A_CELL)):  # with h in place of (h, c)
    OF_MODULES[_kind] = {name: (x, *(h for h, _ in hx)) for name, (x, *hx) in _table.items()}
MISTAKES = {f"{kind}, {name}": (kind, args) for kind, table in OF_MODULES.items() for name, args in table.items()}
# ((arguments, options), ...) of constructors.
BAD_LAYERS = [
    *(((0, 5), {}), ((-1, 5), {}), ((3, 0), {}), ((3, 5, 0), {}), ((3.0, 5), {}), (("3", 5), {}), ((3, 5.0), {})),
    *(((3, 5, 1, 1), {}), ((3, 5, 1, "True"), {}), ((3, 5), {"batch_first": 0}), ((3, 5), {"batch_first": None})),
    *(((3, 5), {"dropout": p}) for p in (1.5, -0.1, True, "a")),
    *(((3, 5), {"proj_size": size}) for size in (5, -1)),
]
BAD_CELLS = [((size, H), {}) for size, H in ((3.5, 4), ("3", 4), (3, -4))] + [((3,), {})]


def _raised(call, *args, **options):
    with pytest.raises(ERRORS) as error:
        call(*args, **options)
    return error.type, str(error.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_are_torchs(mistake, device):
    name, args = MISTAKES[mistake]
    args = tree_map(lambda a: a.to(device) if isinstance(a, torch.Tensor) and not a.is_meta else a, args)
    ours = OURS[name](2, 3, device=device, backend="triton")
    expected, found = (_raised(module, *args) for module in (getattr(torch.nn, name)(2, 3, device=device), ours))
    words = "|".join(text for key, text in WORDS.items() if re.search(key, mistake))
    assert found == expected or (words and found[0] is expected[0] and re.search(words, found[1])), (found, expected)


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
        "a state's dtype": (lambda: lstm(x, (hx[0], hx[1].double()), w), RuntimeError, r"hx\[1\] must have the same"),
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
