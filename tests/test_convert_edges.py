"""convert and patch in other people's code: classes, names imported early, parametrizations, pickles, what is said."""

import copy
import logging
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from support.lstms import flat, gradients
from torch.nn import LSTM as EarlyLSTM  # as clients import it, before any patch
from torch.nn import LSTMCell as EarlyCell
from torch.testing import assert_close

from lstm_triton import LSTM, LSTMCell, convert, explain, patch, to_torch

X = torch.randn(4, 2, 3)


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


def _is_converted(module) -> bool:
    try:
        module(torch.randn(4, 2, module.input_size), return_cell_states=True)
    except TypeError:
        return False
    return True


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- which classes -------------------------------------------------------------------------------------------------


def test_modules_that_are_not_converted_are_torchs(no_warnings):
    convert(torch.nn.LSTM(3, 5))
    plain = torch.nn.LSTM(3, 5)
    assert not _is_converted(plain) and repr(plain) == "LSTM(3, 5)" and not hasattr(plain, "backend")
    assert explain(torch.nn.Sequential(plain)) == "0: LSTM: torch's own: not converted."
    with pytest.raises(TypeError, match="unexpected keyword argument 'resets'"):
        plain(X, resets=torch.zeros(4, 2, dtype=torch.bool))


def test_derived_classes(no_warnings):
    ours, theirs = Derived(3, 5), Derived(3, 5)
    theirs.load_state_dict(ours.state_dict())
    assert convert(ours) is ours and type(ours) is Derived and ours.gain == 2 and _is_converted(ours)
    assert_close(flat(ours(X)), flat(theirs(X)))
    assert type(pickle.loads(pickle.dumps(ours))) is Derived and _is_converted(copy.deepcopy(ours))
    assert not _is_converted(to_torch(ours)) and repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "module, reason",
    [
        (Overriding(3, 5), "its class Overriding has a forward of its own"),
        (WithBackend(3, 5), "its class WithBackend has an attribute 'backend' of its own"),
    ],
    ids=["forward", "attribute"],
)
def test_what_is_left_and_why(module, reason):
    model = torch.nn.ModuleDict({"encoder": module, "decoder": torch.nn.LSTM(3, 5)})
    before = dict(module.__dict__)
    with pytest.warns(UserWarning, match=rf"^convert\(\) left encoder \({type(module).__name__}\): {reason}$"):
        convert(model)
    assert module.__dict__ == before and _is_converted(model["decoder"])
    assert explain(model).splitlines()[0] == f"encoder: {type(module).__name__}: torch's own: {reason}."
    assert explain(model).splitlines()[1].startswith("decoder: LSTM(3, 5) on cpu, torch.float32: ")


def test_a_forward_replaced_on_the_module_is_left():
    """As by accelerate's hooks: what is called does not look at the class."""
    module = torch.nn.LSTM(3, 5)
    module.forward = module.forward
    with pytest.warns(UserWarning, match="convert.. left the module itself .LSTM.: its forward has been replaced"):
        convert(module)


def test_compilable_leaves_derived_classes():
    with pytest.warns(UserWarning, match="left 0 .Derived.: torch.compile refuses its class"):
        model = convert(torch.nn.Sequential(Derived(3, 5), torch.nn.LSTM(3, 5)), compilable=True)
    assert type(model[0]) is Derived and not _is_converted(model[0]) and type(model[1]) is LSTM


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
    assert_close(found, expected)
    assert_close(gradients(found, [x, *model.parameters()]), gradients(expected, [x, *model.parameters()]))
    cell = convert(torch.nn.LSTMCell(3, 5), backend="triton", precision="ieee")
    found = torch.compile(cell, backend="aot_eager", fullgraph=True)(X[0])
    assert_close(found, cell(X[0]))
    torch._dynamo.reset()


# ---- what is said --------------------------------------------------------------------------------------------------


def test_a_conversion_of_nothing_warns():
    with pytest.warns(UserWarning, match=r"^convert\(\) found nothing to convert in Linear$"):
        convert(torch.nn.Linear(2, 3))
    model = convert(torch.nn.Sequential(torch.nn.LSTM(3, 5)), backend="reference")
    match = r"^convert\(\) found nothing to convert in Sequential; 0 \(LSTM\) had been converted before$"
    with pytest.warns(UserWarning, match=match):
        convert(model)
    assert model[0].backend == "reference", "its options stay"


def test_what_was_converted_is_logged(caplog, no_warnings):
    model = torch.nn.Sequential(torch.nn.LSTM(3, 5), torch.nn.Linear(5, 2), LSTMCell(3, 5), Derived(3, 5))
    with caplog.at_level(logging.INFO, logger="lstm_triton"):
        convert(model)
    assert [record.getMessage() for record in caplog.records] == [
        "converted: 0 (LSTM), 3 (Derived)",
        "had been converted before: 2 (LSTMCell)",
    ]


# ---- pickles -------------------------------------------------------------------------------------------------------


def test_a_pickle_is_converted_where_nothing_has_been(tmp_path, no_warnings):
    """In a process that has not called convert, and does not import the package by itself."""
    torch.save(convert(torch.nn.LSTM(3, 5), backend="reference"), tmp_path / "lstm.pt")
    load = f"""
import torch
lstm = torch.load({str(tmp_path / "lstm.pt")!r}, weights_only=False)
assert type(lstm) is torch.nn.LSTM and lstm.backend == "reference"
assert lstm(torch.randn(4, 2, 3), return_cell_states=True)[2].shape == (4, 2, 5)
"""
    subprocess.run([sys.executable, "-c", load], check=True)


# ---- parametrizations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert_first", [True, False])
def test_parametrized_modules(convert_first, no_warnings):
    torch.manual_seed(1)
    theirs = torch.nn.LSTM(3, 5)
    ours = copy.deepcopy(theirs)
    if convert_first:
        convert(ours)
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    if not convert_first:
        convert(ours)
    assert _is_converted(ours) and type(ours).__mro__[1] is torch.nn.LSTM
    for x in (X, X[:, 0]):
        found, expected = flat(ours(x)), flat(theirs(x))
        assert_close(found, expected)
        assert_close(gradients(found, ours.parameters()), gradients(expected, theirs.parameters()))


@pytest.mark.parametrize("backend", ["auto", "reference"])  # on a CPU a plain call of the first is torch's own forward
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("cell", [False, True])
def test_parametrizations_are_evaluated_as_often_as_in_torchs(cell, own, backend):
    """spectral_norm goes on with its power iteration at every evaluation in training."""
    torch.manual_seed(1)
    theirs = torch.nn.LSTMCell(3, 5) if cell else torch.nn.LSTM(3, 5)
    ours = copy.deepcopy(theirs)
    if own:
        ours = LSTMCell(3, 5) if cell else LSTM(3, 5)
        ours.load_state_dict(theirs.state_dict())
    name = "weight_hh" if cell else "weight_hh_l0"
    for module in (ours, theirs):
        torch.manual_seed(2)
        torch.nn.utils.parametrizations.spectral_norm(module, name)
    if not own:
        convert(ours)
    ours.backend = backend
    inputs = (X[0], X[0, 0]) if cell else (X, X[:, 0], torch.nn.utils.rnn.pack_sequence([X[:, 0], X[:2, 1]]))
    for x in inputs:
        ours(x), theirs(x)
        for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            assert torch.equal(a, b), name


# ---- patch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.LSTM(3, 5),
        lambda: EarlyLSTM(3, 5),
        lambda: torch.nn.modules.rnn.LSTM(3, 5),
        lambda: Derived(3, 5),
    ],
    ids=["torch.nn", "imported early", "torch.nn.modules.rnn", "derived early"],
)
def test_patch_whatever_the_name(build, no_warnings):
    before = build()
    with patch(backend="reference", recompute=True):
        inside = build()
    after = build()
    assert _is_converted(inside) and type(inside) is type(before)
    assert (inside.precision, inside.backend, inside.recompute) == (None, "reference", True)
    assert not _is_converted(before) and not _is_converted(after)


def test_patch_of_cells_and_what_has_its_own_forward(no_warnings):
    with patch(precision="ieee"):
        cell, own, ours, rnn = EarlyCell(3, 5), Overriding(3, 5), LSTMCell(3, 5), torch.nn.RNN(3, 5)
    assert type(cell) is torch.nn.LSTMCell and cell.precision == "ieee" and "backend='auto'" in repr(cell)
    assert not hasattr(own, "backend") and own(X).shape == (4, 2, 5)
    assert ours.precision is None and not hasattr(rnn, "backend")


def test_patch_draws_the_same_parameters_and_ends_with_an_error(no_warnings):
    torch.manual_seed(1)
    with pytest.raises(KeyError), patch():
        inside = torch.nn.LSTM(3, 5, 2)
        raise KeyError
    torch.manual_seed(1)
    outside = torch.nn.LSTM(3, 5, 2)
    assert _is_converted(inside) and not _is_converted(outside)
    assert_close(flat(inside(X)), flat(outside(X)))
    with pytest.raises(ValueError, match="backend must be one of"), patch(backend="cuda"):
        pass


def test_patches_nest_and_convert_inside(no_warnings):
    with patch():
        with patch(backend="reference"):
            inner = torch.nn.LSTM(3, 5)
        outer = torch.nn.LSTM(3, 5)
        to_torch(outer)
        assert not _is_converted(outer) and _is_converted(convert(outer))
    assert (inner.backend, outer.backend) == ("reference", "auto")
