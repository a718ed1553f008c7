"""A layer's single step: the kernels of the cell, one launch for each direction, with nothing beside its results."""

from collections import Counter

import pytest
import torch
from support import layers
from support.aot import KINDS
from support.lstms import flat, gradients
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM, Recurrent, explain
from lstm_triton.cells import catalogue
from lstm_triton.kernels import launch, layer_step, search

FORWARD, BACKWARD = "_lstm_cell_forward_kernel", "_lstm_cell_backward_kernel"


COMPILED = [("fp32", 1, {}), ("tf32", 2, {"cells": True}), ("bf16", 2, {"batch_major": True})]
INTERPRETED = [
    *COMPILED,
    ("tf32x3", 1, {"bias": False}),
    ("fp16", 1, {"cells": True}),
    ("fp64", 2, {"bias": False, "cells": True}),
]


def _step(kind, D, options, device):
    dtype, precision = KINDS[kind]
    return layers.draw(1, 3, 5, 19, D, dtype, precision=precision, device=device, **options)


@pytest.mark.compiled
@pytest.mark.parametrize("kind, D, options", COMPILED)
def test_a_step_is_as_accurate_as_torch(kind, D, options, device, count_launches):
    problem = _step(kind, D, options, device)
    results = layers.by_kernels(problem)
    assert count_launches(every=True) == {FORWARD: D, BACKWARD: D}
    layers.assert_as_accurate_as_torch(results, problem)
    for again, result in zip(layers.by_kernels(problem, "triton-stepwise"), results):
        assert torch.equal(again, result)


@pytest.mark.parametrize("kind, D, options", INTERPRETED)
def test_a_step_is_that_of_the_sequence_kernels(kind, D, options, device, count_launches, monkeypatch):
    problem = _step(kind, D, options, device)
    results = layers.by_kernels(problem)
    layers.assert_as_accurate_as_torch(results, problem)
    monkeypatch.setattr(layer_step, "serves", lambda *_: False)
    monkeypatch.setattr("lstm_triton.kernels.layer_backward.serves", lambda *_: False)
    count_launches()
    by_sequence = layers.by_kernels(problem)
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1, "_lstm_sequence_backward_kernel": 1}
    if not kind.startswith("tf32"):  # of which the CPU's GEMM, beside the sequence kernels, knows nothing
        layers.assert_close(results, by_sequence, problem, ulps=4)


def test_a_step_of_another_cell(device, count_launches):
    """Several states of a unit, and both directions."""
    options = dict(bidirectional=True, dtype=torch.float64, device=device)
    module, reference = (Recurrent(catalogue.slstm, 3, 5, backend=of, **options) for of in ("triton", "reference"))
    reference.load_state_dict(module.state_dict())
    x = torch.randn(1, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for each in (module, reference):
        outputs = tree_leaves(each(x, return_states=True))
        found.append([*outputs, *gradients(outputs, [x, *each.parameters()])])
    assert count_launches() == {FORWARD: 2, BACKWARD: 2}
    torch.testing.assert_close(*found)


@pytest.fixture
def without_kernels(monkeypatch):
    """Names of the kernels that would run."""
    names = []
    monkeypatch.setattr(launch.Launcher, "__call__", lambda self, *_, **__: names.append(self.kernel.fn.__name__))
    return names


def _operations(call):
    """How many of each operation of torch runs, views and what only calls another one apart."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = Counter(event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::"))
    views = "select slice unflatten view as_strided transpose unsqueeze expand detach alias view_as".split()
    return {name: n for name, n in names.items() if name not in (*views, "new_empty", "empty_like", "result_type")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted on a CPU")
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_step_with_carried_state_allocates_its_results_alone(batch_first, without_kernels, monkeypatch):
    """It asks nothing of the search either, which the capture of a CUDA graph would forbid."""
    monkeypatch.setattr(search, "choose", None)
    for module in ("layout", "cell_backward"):
        monkeypatch.setattr(f"lstm_triton.kernels.{module}.torch", torch)  # memory that is not poisoned
    lstm = LSTM(4, 40, batch_first=batch_first, backend="triton")
    x, hx = torch.zeros(*((2, 1) if batch_first else (1, 2)), 4), (torch.zeros(1, 2, 40), torch.zeros(1, 2, 40))
    with torch.no_grad():
        lstm(x, hx)
        assert _operations(lambda: lstm(x, hx)) == {"empty": 3}, "y, h and c"
    assert without_kernels == [FORWARD, FORWARD]
    outputs = []
    assert _operations(lambda: outputs.extend(lstm(x, hx))) == {"empty": 5}, "c once more, and the gates"
    y, (h, c) = outputs
    cotangents = [torch.ones_like(t) for t in (y, h, c)]
    weights = list(lstm.parameters())
    without_kernels.clear()
    found = _operations(lambda: torch.autograd.grad((y, h, c), weights, cotangents))
    assert found == {"empty": len(weights), "add": 1}, "y and h are one"
    assert without_kernels == [BACKWARD]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted on a CPU")
def test_what_the_cell_has_not_takes_the_sequence_kernels(without_kernels):
    lstm = LSTM(4, 5, num_layers=2, dropout=0.5, backend="triton")
    x = torch.zeros(1, 2, 4)
    for options in (dict(resets=torch.ones(1, 2, dtype=torch.bool)), dict(lengths=torch.tensor([1, 0]))):
        without_kernels.clear()
        lstm.eval()(x, **options)
        assert FORWARD not in without_kernels, options
    without_kernels.clear()
    lstm.train()(x)
    assert without_kernels[1:] == ["_lstm_sequence_forward_kernel", FORWARD], "the first of two has dropout"


def test_explain_names_the_kernel_of_the_cell():
    lstm = LSTM(4, 5, num_layers=2, bidirectional=True, backend="triton-persistent")
    text = explain(lstm, torch.zeros(1, 2, 4))
    assert "; forward 4 launches of the cell's kernel for 1 step, backward 4 launches of the cell's kernel" in text
    assert "cell's" not in explain(lstm, torch.zeros(2, 2, 4))


@pytest.mark.long
def test_compiled_for_any_number_of_steps(device):
    """What was compiled for several steps never meets one step; a step alone is another graph."""
    torch._dynamo.reset()
    lstm = LSTM(3, 5, device=device, backend="triton", precision="ieee")
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (4, 1, 7):
        x = torch.randn(T, 2, 3, device=device, requires_grad=True)
        results = []
        for module in (compiled, lstm):
            found = flat(module(x))
            leaves = [x, *lstm.parameters()]
            results.append([*found, *torch.autograd.grad(found, leaves, [torch.ones_like(t) for t in found])])
        torch.testing.assert_close(*results)
    torch._dynamo.reset()
