"""`explain` with the arguments of a call says what the call then does: both are run, over a generated matrix of calls."""

import contextlib
import itertools
import random

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

from lstm_triton import (
    LSTM,
    LSTMCell,
    Recurrent,
    SoftmaxReadout,
    convert,
    dispatch,
    explain,
    hooks,
    measurements,
    shapes,
)
from lstm_triton.cells import catalogue
from lstm_triton.explain import explain_call
from lstm_triton.kernels import interpreter, layer, layer_backward, search
from lstm_triton.kernels.device import device_figures
from lstm_triton.measurements import Row
from lstm_triton.shapes import Shape

pytestmark = pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")

CPU = torch.device("cpu")
BACKENDS = ("auto", "triton", "triton-stepwise", "triton-persistent", "reference", "cudnn")
WAYS = ("forward", "backward")
FEATURES = ("", "resets", "lengths", "cells", "packed", "resets, cells", "unbatched")
AXES = dict(
    backend=BACKENDS,
    features=FEATURES,
    steps=(1, 3),
    rows=(0, 2, 17),
    hidden_size=(4, 5, 40),
    kind=(("float32", "tf32"), ("float32", None), ("bfloat16", None), ("float64", None)),
    num_layers=(1, 2),
    bidirectional=(False, True),
    proj_size=(0, 2),
    recompute=(False, True),
    train=(False, True),
    dropout=(0.0, 0.5),
    batch_first=(False, True),
    autocast=(False, False, True),
    measured=(None, None, "triton", "triton-stepwise"),
)


def _calls():
    """All pairs of backend and features, twice, the others drawn at random."""
    generator = random.Random(0)
    for backend, features in 2 * list(itertools.product(BACKENDS, FEATURES)):
        drawn = {name: generator.choice(values) for name, values in AXES.items()}
        yield drawn | dict(backend=backend, features=features)


def _arguments(call):
    T, B, dtype = call["steps"], call["rows"], getattr(torch, call["kind"][0])
    x, features, options = torch.zeros(T, B, 3, dtype=dtype), call["features"], {}
    if "resets" in features:
        resets = torch.rand(T, B) < 0.3
        options["resets"] = resets.t() if call["batch_first"] else resets
    if "lengths" in features:
        options["lengths"] = torch.randint(0, T + 1, (B,))
    if "cells" in features:
        options["return_cell_states"] = True
    x = x.transpose(0, 1) if call["batch_first"] else x
    if features == "packed" and B:
        x = pack_padded_sequence(x, torch.full((B,), T), batch_first=call["batch_first"])
    return x if features != "unbatched" else torch.zeros(T, 3, dtype=dtype), options


def _measured(module, x, backend):
    """As if this backend, and the second candidate of each way, had been the fastest."""
    shape, steps, _ = shapes.of_call(module, x)
    configs = []
    for way in WAYS:
        found = search.candidates(measurements.problem_of(shape, way), device_figures(CPU))
        alone = [c for c in found if c.persistent and not c.waits]
        configs.append(vars(alone[1]) if len(alone) > 1 else None)
    row = Row(measurements.machine(CPU), shape, steps, backend, 1.0, None, *configs)
    return lambda device: (("your measurements", row),)


@pytest.fixture
def check(monkeypatch):
    """check(module, x, **options): what is explained of a call, which is then made; None where both raise the same error."""
    backends, launched = [], []
    original = dispatch.layer_backend
    monkeypatch.setattr(dispatch, "layer_backend", lambda *a, **k: backends.append(original(*a, **k)) or backends[-1])
    for module, way in ((layer, "forward"), (layer_backward, "backward")):

        def launch(launcher, config, *rest, way=way, launch=module.launch):
            launched.append((way, config))
            return launch(launcher, config, *rest)

        original_step = getattr(module, f"layer_step_{way}")

        def step(first, *rest, way=way, original=original_step):
            D = len((first if way == "forward" else rest[0]).directions)
            launched.extend([(way, layer.OneStep(D))] * D)  # of the cell's kernels one for each direction
            return original(first, *rest)

        monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(module, f"layer_step_{way}", step)
    monkeypatch.setattr(search, "remembered", {})

    def checked(module, x, **options):
        del backends[:], launched[:]
        search.remembered.clear()
        explained, errors = None, []
        try:
            explained = explain_call(module, x, **options)
            assert str(explained) == explain(module, x, **options) and not launched
        except RuntimeError as error:
            errors.append(str(error))
        planned = set(search.remembered)
        try:
            leaves = tree_leaves(module(x, **options), is_leaf=lambda t: isinstance(t, PackedSequence))
            found = [t.data if isinstance(t, PackedSequence) else t for t in leaves]
            if torch.is_grad_enabled():
                torch.autograd.backward(found, [torch.ones_like(t) for t in found])
        except RuntimeError as error:
            errors.append(str(error))
        if explained is None:
            assert len(errors) == 2 and errors[0] == errors[1], errors
            return None
        # The state of a GRU is its h: the gradient of another is planned, and never comes.
        is_gru = hooks.cell_of(module) is catalogue.gru
        assert not errors and (is_gru or set(search.remembered) == planned)
        assert set(backends[-1:] or ["torch"]) == {explained.choice.backend}, (backends, explained)
        for way in WAYS:
            ran = [config for name, config in launched if name == way]
            assert len(ran) == explained.launches.get(way, 0), (way, len(ran), str(explained))
            assert set(ran) == {plan[way] for plan in explained.plans if way in plan}, (way, ran, explained)
        return explained

    return checked


@pytest.mark.long
def test_what_is_explained_is_what_runs(check, monkeypatch):
    explained_ways = set()
    for call in _calls():
        dtype, precision = call["kind"]
        names = ("backend", "num_layers", "bidirectional", "recompute", "batch_first", "proj_size")
        options = {name: call[name] for name in names} | {"dropout": call["dropout"] * (call["num_layers"] > 1)}
        module = LSTM(3, call["hidden_size"], dtype=getattr(torch, dtype), precision=precision, **options)
        module.train(call["train"])
        x, arguments = _arguments(call)
        cast = torch.autocast("cpu", torch.bfloat16) if call["autocast"] else contextlib.nullcontext()
        monkeypatch.setattr(measurements, "rows", lambda device: ())
        with torch.set_grad_enabled(call["train"]), cast:
            if call["measured"] and call["rows"]:
                monkeypatch.setattr(measurements, "rows", _measured(module, x, call["measured"]))
            try:
                explained = check(module, x, **arguments)
            except AssertionError as error:
                raise AssertionError(f"of {call}") from error
        for way, config in explained.plans[0].items() if explained and explained.plans else ():
            explained_ways.add((way, explained.choice.backend, config.persistent))
    assert len(explained_ways) > 8, explained_ways


@pytest.mark.long
@pytest.mark.parametrize("cell", [catalogue.gru, catalogue.slstm, catalogue.zoneout()], ids=lambda cell: cell.name)
def test_calls_of_other_cells(cell, check):
    """Masks are drawn in training; a converted torch.nn.GRU is explained as a GRU is."""
    x, resets = torch.zeros(4, 2, 3), torch.rand(4, 2) < 0.3
    modules = [Recurrent(cell, 3, 5, 2, backend=backend) for backend in ("triton", "triton-stepwise")]
    modules += [convert(torch.nn.GRU(3, 5, 2), backend="triton")] if cell is catalogue.gru else []
    for module, options in itertools.product(modules, ({}, {"resets": resets, "return_states": True})):
        explained = check(module, x, **options)
        assert explained.launches == dict.fromkeys(WAYS, 2 if module.backend == "triton" else 8)
        assert "launches for 4 steps" in str(explained) and "the LSTM's kernels" in str(explained)
    with pytest.raises(TypeError, match="return_cell_states"):
        explain(modules[0], x, return_cell_states=True)
    assert "all steps in one launch" in explain(modules[0], steps=4)


def test_the_sentence_names_launches_configuration_and_source(monkeypatch):
    module, x = LSTM(3, 20, dtype=torch.bfloat16, backend="triton"), torch.zeros(7, 2, 3, dtype=torch.bfloat16)
    text = explain(module, x)
    assert text.startswith("LSTM(3, 20) on cpu, torch.bfloat16: triton: requested; forward 1 launch for 7 steps, 1 ")
    assert "backward 1 launch for 7 steps" in text and text.count("(by the model and the compiler)") == 2
    monkeypatch.setattr(measurements, "rows", _measured(module, x, "triton"))
    monkeypatch.setattr(search, "remembered", {})
    assert explain(module, x).count("(measured)") == 2
    with torch.no_grad():
        assert "backward" not in explain(module, x)
    module.backend = "triton-stepwise"
    assert "forward 7 launches for 7 steps" in explain(module, x)
    assert "with B = 0 no launch" in explain(module, x[:, :0])


def test_calls_of_other_modules_and_shapes():
    for module in (LSTMCell(3, 4), SoftmaxReadout(3, 4)):
        assert explain(module, torch.zeros(2, 3)) == explain(module)
    converted = explain(convert(torch.nn.LSTM(3, 4)), torch.zeros(2, 1, 3))
    assert converted.startswith("LSTM(3, 4) on cpu, torch.float32: torch: ")
    with pytest.raises(TypeError, match="not of Sequential"):
        explain(torch.nn.Sequential(LSTM(3, 4)), torch.zeros(2, 1, 3))
    shape = Shape(3, 4, 2, 2, 0, 5, "resets")
    assert str(shape) == "LSTM(3, 4, 2 layers) B = 5, both directions, float32, ieee, inference, resets"
