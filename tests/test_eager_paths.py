"""What eager calls go through: the short way to the kernels, and all that has to keep off it."""

import inspect
import warnings

import pytest
import torch
from support import cells
from support.operations import cell, operations, readout

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout

pytestmark = pytest.mark.long
three = operations("cell", "readout", "layer with segments")


def lazily_negated(t):
    """t as the imaginary part of a conjugate: its memory holds -t."""
    t = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert t.is_neg()
    return t


@operations("cell", "readout", "layer without biases")
def test_lazily_negated_arguments(operation, device):
    arguments, cotangents = operation.draw(device)
    expected = operation.run(*arguments)
    for position in range(len(arguments)):
        given = [lazily_negated(t) if k == position else t for k, t in enumerate(arguments)]
        assert all(map(torch.equal, operation.run(*given), expected)), f"argument {position}"
    expected = operation.trained(arguments, cotangents)
    found = operation.trained([lazily_negated(t) for t in arguments], cotangents)
    assert all(map(torch.equal, found, expected))


@three
def test_lazily_negated_gradients(operation, device):
    arguments, cotangents = operation.draw(device)
    expected = operation.trained(arguments, cotangents)
    for position in range(len(cotangents)):
        given = [lazily_negated(t) if k == position else t for k, t in enumerate(cotangents)]
        assert all(map(torch.equal, operation.trained(arguments, given), expected)), f"gradient {position}"


def test_operators_take_any_strides(device):
    def other(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    inputs, (dh, dc) = cell.draw(device)
    _, c, gates = torch.ops.lstm_triton.lstm_cell(*inputs, None, None, "lstm", True)
    backward, needs = torch.ops.lstm_triton.lstm_cell_backward, [True] * 7 + [False]
    expected = backward(dh, dc, *inputs, None, c, gates, None, "lstm", needs)
    assert all(map(torch.equal, backward(dh, dc, *inputs, None, other(c), other(gates), None, "lstm", needs), expected))
    inputs, (dy,) = readout.draw(device)
    y = torch.ops.lstm_triton.softmax_readout(*inputs, None, torch.float64, True)
    backward = torch.ops.lstm_triton.softmax_readout_backward
    expected = backward(dy, *inputs, y, None, torch.float64, [True] * 3)
    assert all(map(torch.equal, backward(dy, *inputs, other(y), None, torch.float64, [True] * 3), expected))


# ---- which way a call takes ------------------------------------------------------------------------------------------


@three
def test_a_training_step_looks_up_no_signature(operation, device, monkeypatch):
    """torch.autograd.Function.apply with setup_context does, at several times the cost of the rest."""
    arguments, cotangents = operation.draw(device)
    expected = operation.trained(arguments, cotangents)

    def refuse(*_, **__):
        raise AssertionError("inspect.signature")

    # What the interpreter does at a launch is not meant.
    for name in ("launch", "launch_backward"):
        with_signature(monkeypatch, operation.operator, name)
    monkeypatch.setattr(inspect, "signature", refuse)
    found = operation.trained(arguments, cotangents)
    monkeypatch.undo()
    assert all(map(torch.equal, found, expected))


def with_signature(monkeypatch, operator, name, signature=inspect.signature):
    """Inside this launcher of the operator, inspect.signature is what it was."""
    function = getattr(operator, name)

    def wrapped(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inspect, "signature", signature)
            return function(*args)

    monkeypatch.setattr(operator, name, wrapped)


NODES = {"LSTMCellGradientBackward", "SoftmaxReadoutGradientBackward", "LSTMLayerGradientBackward"}


@three
def test_the_backward_is_recorded_only_where_it_may_be_differentiated(operation, device):
    leaves, cotangents = operation.draw(device)
    outputs = operation.run(*leaves)
    once = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    twice = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    assert all(map(torch.equal, once, twice))
    assert all(g.grad_fn is None for g in once)
    assert NODES & {type(g.grad_fn).__name__ for g in twice}


@three
def test_vjp_after_the_transform_and_without_recording(operation, device):
    """What torch.func.vjp saved are wrappers that it has left: the kernels cannot read them."""
    arguments, cotangents = operation.draw(device)
    expected = operation.trained(arguments, cotangents)[len(cotangents) :]
    _, back = torch.func.vjp(operation.run, *arguments)
    with torch.no_grad():
        found = back(tuple(cotangents))
    torch.testing.assert_close(list(found), expected)


@three
def test_what_a_transform_left_behind_is_a_tensor(operation, device):
    arguments, _ = operation.draw(device)
    left = []
    torch.func.grad(lambda t: (left.append(t), t.sum())[1])(arguments[0])
    assert all(map(torch.equal, operation.run(left[0], *arguments[1:]), operation.run(*arguments)))


@three
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_second_derivatives_in_the_precision_asked_for(operation, precision, device, monkeypatch):
    """torch's products in the formulas then follow it too, whatever its own setting is."""
    other = "ieee" if precision == "tf32" else "tf32"
    settings = []
    vjp = torch.func.vjp

    def noting(*args):
        settings.append(torch.backends.cuda.matmul.fp32_precision)
        return vjp(*args)

    monkeypatch.setattr(torch.func, "vjp", noting)
    leaves, cotangents = operation.draw(device, torch.float32)
    with cells.matmul_precision(other):
        first = torch.autograd.grad(operation.run(*leaves, precision=precision), leaves, cotangents, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        assert torch.backends.cuda.matmul.fp32_precision == other
    assert set(settings) == {precision}


# ---- torch.jit.trace -------------------------------------------------------------------------------------------------


def _flat(results):
    return [t for r in results for t in _flat(r)] if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("module", [LSTMCell, SoftmaxReadout, LSTM])
def test_a_traced_module_equals_it(module, device):
    """Values and gradients, for another batch, whether the trace was made in training or not."""
    module = module(3, 4, device=device, backend="triton")
    batch = (2, 3) if isinstance(module, LSTMCell) else (5, 2, 3)
    example, x = torch.randn(batch, device=device), torch.randn(*batch[:-2], 7, 3, device=device)
    for training in (True, False):
        with warnings.catch_warnings(), torch.set_grad_enabled(training):
            warnings.simplefilter("ignore")  # of checks, which are not recorded; and torch calls tracing deprecated
            traced = torch.jit.trace(module, (example,))
        found, expected = _flat(traced(x)), _flat(module(x))
        assert all(map(torch.equal, found, expected))
        gradients = [
            torch.autograd.grad(sum(t.square().sum() for t in outputs), list(m.parameters()))
            for outputs, m in ((found, traced), (expected, module))
        ]
        torch.testing.assert_close(*gradients)
