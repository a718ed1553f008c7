"""`explain` with the arguments of a call says what the call then does: both are run, over a generated matrix of calls."""

import contextlib
import itertools
import random

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_triton import LSTM, LSTMCell, Recurrent, SoftmaxReadout, convert, dispatch, explain, measurements
from lstm_triton.cells import catalogue
from lstm_triton.explain import explain_call
from lstm_triton.kernels import interpreter, layer, layer_backward, search
from lstm_triton.kernels.device import device_figures
from lstm_triton.measurements import Row
from lstm_triton.shapes import Shape

pytestmark = pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")

CPU = torch.device("cpu")
BACKENDS = ("auto", "triton", "triton-stepwise", "triton-persistent", "reference", "cudnn")
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
CALLS = 2 * len(BACKENDS) * len(FEATURES)


def _calls():
    """Every value of every axis with every value of the first two, the others drawn at random."""
    generator = random.Random(0)
    pairs = itertools.cycle(itertools.product(BACKENDS, FEATURES))
    for (backend, features), _ in zip(pairs, range(CALLS)):
        drawn = {name: generator.choice(values) for name, values in AXES.items()}
        yield drawn | dict(backend=backend, features=features)


def _arguments(call, x):
    T, B = x.shape[:2]
    features, kwargs = call["features"].split(", "), {}
    if "resets" in features:
        kwargs["resets"] = torch.rand(T, B) < 0.3
    if "lengths" in features:
        kwargs["lengths"] = torch.randint(0, T + 1, (B,))
    if "cells" in features:
        kwargs["return_cell_states"] = True
    if call["batch_first"]:
        x = x.transpose(0, 1)
        kwargs |= {name: flags.t() for name, flags in kwargs.items() if name == "resets"}
    if "packed" in features and B:
        x = pack_padded_sequence(x, torch.full((B,), T), batch_first=call["batch_first"])
    if "unbatched" in features:
        x = torch.zeros(T, 3, dtype=x.dtype)
    return x, kwargs


def _measured(module, x, backend):
    """As if this backend, and the second candidate of each way, had been the fastest."""
    from lstm_triton import shapes

    shape, steps, _ = shapes.of_call(module, x)
    configs = []
    for way in ("forward", "backward"):
        found = search.candidates(measurements.problem_of(shape, way), device_figures(CPU))
        alone = [c for c in found if c.persistent and not c.waits]
        configs.append(vars(alone[1]) if len(alone) > 1 else None)
    return Row(measurements.machine(CPU), shape, steps, backend, 1.0, None, *configs)


@pytest.fixture
def recorded(monkeypatch):
    """What runs: names of backends, and (way, configuration) of each launch; of the cell's kernels one for each direction."""
    backends, launched = [], []
    original = dispatch.layer_backend
    monkeypatch.setattr(dispatch, "layer_backend", lambda *a, **k: backends.append(original(*a, **k)) or backends[-1])
    for module, way in ((layer, "forward"), (layer_backward, "backward")):

        def launch(launcher, config, *rest, way=way, launch=module.launch):
            launched.append((way, config))
            return launch(launcher, config, *rest)

        monkeypatch.setattr(module, "launch", launch)
        original_step = getattr(module, f"layer_step_{way}")

        def step(first, *rest, way=way, original=original_step):
            D = len((first if way == "forward" else rest[0]).directions)
            launched.extend([(way, layer.OneStep(D))] * D)
            return original(first, *rest)

        monkeypatch.setattr(module, f"layer_step_{way}", step)
    monkeypatch.setattr(search, "remembered", {})
    return backends, launched


def _run(call, module, x, kwargs):
    outputs, states, *cells = module(x, **kwargs)
    found = [t.data if isinstance(t, PackedSequence) else t for t in (outputs, *states, *cells)]
    if call["train"]:
        torch.autograd.backward(found, [torch.ones_like(t) for t in found])


@pytest.mark.long
def test_what_is_explained_is_what_runs(recorded, monkeypatch):
    backends, launched = recorded
    explained_ways = set()
    for call in _calls():
        dtype, precision = call["kind"]
        names = ("backend", "num_layers", "bidirectional", "recompute", "batch_first", "proj_size")
        options = {name: call[name] for name in names} | {"dropout": call["dropout"] * (call["num_layers"] > 1)}
        module = LSTM(3, call["hidden_size"], dtype=getattr(torch, dtype), precision=precision, **options)
        module.train(call["train"])
        x, kwargs = _arguments(call, torch.zeros(call["steps"], call["rows"], 3, dtype=getattr(torch, dtype)))
        cast = torch.autocast("cpu", torch.bfloat16) if call["autocast"] else contextlib.nullcontext()
        monkeypatch.setattr(measurements, "rows", lambda device: ())
        del backends[:], launched[:]
        search.remembered.clear()
        with torch.set_grad_enabled(call["train"]), cast:
            if call["measured"] and call["rows"]:
                row = _measured(module, x, call["measured"])
                monkeypatch.setattr(measurements, "rows", lambda device, row=row: (("your measurements", row),))
            errors, explained = [], None
            try:
                explained = explain_call(module, x, **kwargs)
                assert str(explained) == explain(module, x, **kwargs) and not launched
                planned = set(search.remembered)
            except RuntimeError as error:
                errors.append(str(error))
            try:
                _run(call, module, x, kwargs)
            except RuntimeError as error:
                errors.append(str(error))
        if explained is None:
            assert len(errors) == 2 and errors[0] == errors[1], (call, errors)
            continue
        assert not errors, (call, errors)
        assert set(search.remembered) == planned, call
        assert set(backends[-1:] or ["torch"]) == {explained.choice.backend}, (call, backends, explained)
        for way in ("forward", "backward"):
            ran = [config for name, config in launched if name == way]
            assert len(ran) == explained.launches.get(way, 0), (call, way, len(ran), str(explained))
            assert set(ran) == {plan[way] for plan in explained.plans if way in plan}, (call, way, ran, explained)
            explained_ways.add((way, explained.choice.backend, bool(ran) and ran[0].persistent))
    assert len(explained_ways) > 8, explained_ways


@pytest.mark.long
@pytest.mark.parametrize("cell", [catalogue.gru, catalogue.slstm, catalogue.zoneout()], ids=lambda cell: cell.name)
def test_calls_of_other_cells(cell, recorded):
    """Masks are drawn in training; a converted torch.nn.GRU is explained as a GRU is."""
    _, launched = recorded
    x, resets = torch.zeros(4, 2, 3), torch.rand(4, 2) < 0.3
    modules = [Recurrent(cell, 3, 5, 2, backend=backend) for backend in ("triton", "triton-stepwise")]
    modules += [convert(torch.nn.GRU(3, 5, 2), backend="triton")] if cell is catalogue.gru else []
    for module, options in itertools.product(modules, ({}, {"resets": resets, "return_states": True})):
        search.remembered.clear()
        explained = explain_call(module, x, **options)
        assert not launched
        module(x, **options)[0].sum().backward()
        for way in ("forward", "backward"):
            ran = [config for name, config in launched if name == way]
            assert len(ran) == explained.launches[way] == (2 if module.backend == "triton" else 8)
            assert set(ran) == {plan[way] for plan in explained.plans}
        del launched[:]
        assert "launches for 4 steps" in str(explained) and "the LSTM's kernels" in str(explained)
    with pytest.raises(TypeError, match="return_cell_states"):
        explain(modules[0], x, return_cell_states=True)
    assert "all steps in one launch" in explain(modules[0], steps=4)


def test_the_sentence_names_launches_configuration_and_source(monkeypatch):
    module = LSTM(3, 20, dtype=torch.bfloat16, backend="triton")
    x = torch.zeros(7, 2, 3, dtype=torch.bfloat16)
    text = explain(module, x)
    assert text.startswith("LSTM(3, 20) on cpu, torch.bfloat16: triton: asked for; forward 1 launch for 7 steps, 1 ")
    assert "backward 1 launch for 7 steps" in text and text.count("(by the model and the compiler)") == 2
    row = _measured(module, x, "triton")
    monkeypatch.setattr(measurements, "rows", lambda device: (("your measurements", row),))
    monkeypatch.setattr(search, "remembered", {})
    assert explain(module, x).count("(measured)") == 2
    with torch.no_grad():
        assert "backward" not in explain(module, x)
    module.backend = "triton-stepwise"
    assert "forward 7 launches for 7 steps" in explain(module, x)
    assert "with B = 0 no launch" in explain(module, x[:, :0])


def test_calls_of_other_modules():
    cell, readout = LSTMCell(3, 4), SoftmaxReadout(3, 4)
    assert explain(cell, torch.zeros(2, 3)) == explain(cell) and explain(readout, torch.zeros(2, 3)) == explain(readout)
    assert explain(convert(torch.nn.LSTM(3, 4)), torch.zeros(2, 1, 3)).startswith(
        "LSTM(3, 4) on cpu, torch.float32: torch: "
    )
    with pytest.raises(TypeError, match="not of Sequential"):
        explain(torch.nn.Sequential(LSTM(3, 4)), torch.zeros(2, 1, 3))


def test_shapes_name_what_matters():
    assert (
        str(Shape(3, 4, 2, 2, 0, 5, "resets"))
        == "LSTM(3, 4, 2 layers) B = 5, both directions, float32, ieee, inference, resets"
    )
