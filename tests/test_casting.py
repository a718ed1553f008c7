"""Autocast: how often a parameter is cast, for how long the casts are held, and devices that know no autocast."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout, casting, functional

LOW = torch.bfloat16


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture
def casts(monkeypatch):
    """References to the casts of parameters made from here on."""
    made = []
    cast = casting.cast

    def noting(t, dtype):
        found = cast(t, dtype)
        if isinstance(t, torch.nn.Parameter) and found is not t and not any(r() is found for r in made):
            made.append(torch.utils.weak.TensorWeakRef(found))
        return found

    monkeypatch.setattr(casting, "cast", noting)
    return made


@pytest.fixture
def cell(device):
    return LSTMCell(3, 5, device=device, backend="triton")


def steps(cell, n=4):
    """The states after n steps, each under an autocast of its own."""
    device = cell.weight_ih.device
    x, states = torch.ones(2, 3, device=device), None
    for _ in range(n):
        with torch.autocast(device.type, LOW):
            states = cell(x, states)
    return states


def gradients(states, parameters):
    return torch.autograd.grad(sum(t.float().square().sum() for t in states), list(parameters))


def alive(casts):
    return sum(reference() is not None for reference in casts)


def test_steps_share_one_cast_of_each_parameter(cell, casts):
    states = steps(cell)
    assert len(casts) == alive(casts) == 4
    held = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.add(t.data_ptr()) or t, lambda t: t):
        steps(cell)
    assert len(casts) == 4
    assert {reference().data_ptr() for reference in casts} <= held
    found = gradients(states, cell.parameters())
    low = LSTMCell(3, 5, device=cell.weight_ih.device, dtype=LOW, backend="triton")
    low.load_state_dict(cell.state_dict())
    x, states = torch.ones(2, 3, device=cell.weight_ih.device, dtype=LOW), None
    for _ in range(4):
        states = low(x, states)
    for ours, expected in zip(found, gradients(states, low.parameters())):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected.float(), rtol=0.02, atol=0.02)


def test_nothing_is_held_after_the_backward(cell, casts):
    states = steps(cell)
    sum(t.float().sum() for t in states).backward()
    gc.collect()
    assert len(casts) == 4 and alive(casts) == 0
    steps(cell)
    assert len(casts) == 8


def test_two_graphs_that_share_a_cast_have_a_backward_each(cell):
    first, second = steps(cell), steps(cell)
    assert all(map(torch.equal, gradients(first, cell.parameters()), gradients(second, cell.parameters())))


def replace_values(p):
    with torch.no_grad():
        p.mul_(2)


def replace_memory(p):
    p.data = 2 * p.data


@pytest.mark.parametrize("replace", [replace_values, replace_memory])
def test_a_changed_parameter_is_cast_again(replace, cell):
    before = steps(cell)  # holds the casts
    for p in cell.parameters():
        replace(p)
    found = steps(cell)
    del before
    assert all(map(torch.equal, found, steps(cell)))
    half = LSTMCell(3, 5, device=cell.weight_ih.device, dtype=LOW, backend="triton")
    half.load_state_dict(cell.state_dict())
    x = torch.ones(2, 3, device=cell.weight_ih.device, dtype=LOW)
    states = None
    for _ in range(4):
        states = half(x, states)
    assert all(map(torch.equal, found, states))


def test_another_dtype_is_another_cast(cell):
    before = steps(cell)
    with torch.autocast(cell.weight_ih.device.type, torch.float16):
        h, _ = cell(torch.ones(2, 3, device=cell.weight_ih.device))
    assert h.dtype == torch.float16 and before[0].dtype == LOW


def without_gradients(cell):
    with torch.no_grad():
        return steps(cell)


def without_the_cache(cell):
    device = cell.weight_ih.device
    with torch.autocast(device.type, LOW, cache_enabled=False):
        return cell(torch.ones(2, 3, device=device))


def under_a_dispatch_mode(cell):
    with Watching():
        return steps(cell)


def frozen(cell):
    return steps(cell.requires_grad_(False))


@pytest.mark.parametrize("call", [without_gradients, without_the_cache, under_a_dispatch_mode, frozen])
def test_where_no_cast_is_reused(call, cell):
    casting._casts.clear()
    call(cell)
    assert len(casting._casts) == 0


def test_under_a_transform_no_cast_is_reused(cell):
    casting._casts.clear()
    x = torch.ones(2, 3, device=cell.weight_ih.device)

    def loss(parameters):
        with torch.autocast(x.device.type, LOW):
            return torch.func.functional_call(cell, parameters, (x,))[0].float().sum()

    torch.func.grad(loss)({name: p.detach() for name, p in cell.named_parameters()})
    assert len(casting._casts) == 0


@pytest.mark.parametrize("module", [SoftmaxReadout, LSTM])
def test_calls_of_other_modules_share_casts(module, device, casts):
    module = module(3, 5, device=device, backend="triton")
    x = torch.ones(2, 2, 3, device=device)
    outputs = []
    for _ in range(3):
        with torch.autocast(device.type, LOW):
            outputs.append(module(x))
    assert len(casts) == alive(casts) == len(list(module.parameters()))


def test_a_device_without_autocast():
    """The meta device knows none, and raises when asked."""
    x, h, c = (torch.empty(2, n, device="meta") for n in (3, 5, 5))
    w_ih, w_hh = torch.empty(20, 3, device="meta"), torch.empty(20, 5, device="meta")
    assert functional.lstm_cell(x, (h, c), w_ih, w_hh, backend="reference")[0].shape == (2, 5)
    assert functional.softmax_readout(h, w_hh, backend="reference").shape == (2, 20)
    with torch.autocast("cpu", LOW):
        assert functional.lstm_cell(x, (h, c), w_ih, w_hh, backend="reference")[0].dtype == torch.float32
