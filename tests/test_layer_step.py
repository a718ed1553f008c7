"""A layer's single step: the kernels of the cell, one launch for each direction, with nothing beside its results.

test_sequence judges its values.
"""

from collections import Counter

import pytest
import torch
from support import segmented
from support.lstms import flat

from lstm_triton import LSTM, explain
from lstm_triton.cells import catalogue
from lstm_triton.kernels import launch, search

FORWARD, BACKWARD = "_lstm_cell_forward_kernel", "_lstm_cell_backward_kernel"


def test_a_step_of_another_cell(device, count_launches):
    """Several states of a unit, and both directions."""
    case = segmented.Case(T=1, B=2, H=5, bidirectional=True, cell=catalogue.slstm)
    drawn = segmented.draw(case, device)
    found = segmented.results(case, drawn, "triton")
    assert count_launches() == {FORWARD: 2, BACKWARD: 2}
    segmented.assert_accurate(found, case, drawn)


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
