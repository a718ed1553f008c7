"""What eager calls go through: the short way to the kernels, and all that has to keep off it."""

import inspect
import warnings

import pytest
import torch
from support import cells, layers, readouts

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout, functional, operators

pytestmark = pytest.mark.long


def cell(x, h, c, *weights, **options):
    return functional.lstm_cell(x, (h, c), *weights, backend="triton", **options)


def readout(*inputs, **options):
    return (functional.softmax_readout(*inputs, backend="triton", **options),)


def layer(x, h0, c0, *rest, **options):
    y, hidden = functional.lstm(
        x,
        (h0, c0),
        rest[:8],
        resets=torch.tensor([[False], [True], [False]], device=x.device).expand(3, 2),
        reset_state=rest[8:],
        backend="triton",
        **options,
    )
    return y, *hidden


def problem(function, device, **options):
    """(arguments, cotangents)"""
    if function is cell:
        drawn = cells.draw(2, 3, 5, device=device, **options)
        return drawn.inputs, drawn.cotangents
    if function is readout:
        drawn = readouts.draw(3, 4, 130, device=device, **options)
        return drawn.inputs, (drawn.cotangent,)
    drawn = layers.draw(3, 2, 3, 4, 2, device=device, reset_state="stored", **options)
    return drawn.inputs, drawn.cotangents


OPERATORS = {cell: operators.lstm_cell, readout: operators.softmax_readout, layer: operators.lstm_layer}
every_function = pytest.mark.parametrize("function", [cell, readout, layer])


def results(function, arguments, cotangents):
    leaves = [t.detach().requires_grad_() for t in arguments]
    outputs = function(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def lazily_negated(t):
    """t as the imaginary part of a conjugate: its memory holds -t."""
    t = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert t.is_neg()
    return t


@every_function
def test_lazily_negated_arguments(function, device):
    arguments, cotangents = problem(function, device)
    expected = function(*arguments)
    for position in range(len(arguments)):
        given = [lazily_negated(t) if k == position else t for k, t in enumerate(arguments)]
        assert all(map(torch.equal, function(*given), expected)), f"argument {position}"
    expected = results(function, arguments, cotangents)
    found = results(function, [lazily_negated(t) for t in arguments], cotangents)
    assert all(map(torch.equal, found, expected))


@every_function
def test_lazily_negated_gradients(function, device):
    arguments, cotangents = problem(function, device)
    expected = results(function, arguments, cotangents)
    for position in range(len(cotangents)):
        given = [lazily_negated(t) if k == position else t for k, t in enumerate(cotangents)]
        assert all(map(torch.equal, results(function, arguments, given), expected)), f"gradient {position}"


@every_function
@pytest.mark.parametrize("order", ["reversed", "gaps"])
def test_saved_tensors_of_other_strides(function, order, device):
    """A hook may return any tensor of the same values."""

    def unpack(t):
        if order == "gaps":
            return t.repeat_interleave(2, -1)[..., ::2]
        reverse = tuple(range(t.dim()))[::-1]
        return t.permute(reverse).contiguous().permute(reverse)

    arguments, cotangents = problem(function, device)
    expected = results(function, arguments, cotangents)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        found = results(function, arguments, cotangents)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_saved_tensors_of_other_strides_when_recomputing(device):
    arguments, cotangents = problem(layer, device)

    def recomputing(*arguments):
        return layer(*arguments, recompute=True)

    expected = results(recomputing, arguments, cotangents)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t
    ):
        found = results(recomputing, arguments, cotangents)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_operators_take_any_strides(device):
    def other(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    inputs, (dh, dc) = problem(cell, device)
    _, c, gates = torch.ops.lstm_triton.lstm_cell(*inputs, None, None, "lstm", True)
    backward, needs = torch.ops.lstm_triton.lstm_cell_backward, [True] * 7 + [False]
    expected = backward(dh, dc, *inputs, None, c, gates, needs, None, "lstm")
    assert all(map(torch.equal, backward(dh, dc, *inputs, None, other(c), other(gates), needs, None, "lstm"), expected))
    inputs, (dy,) = problem(readout, device)
    y = torch.ops.lstm_triton.softmax_readout(*inputs, None, torch.float32, True)
    backward = torch.ops.lstm_triton.softmax_readout_backward
    expected = backward(dy, *inputs, y, [True] * 3, None, torch.float32)
    assert all(map(torch.equal, backward(dy, *inputs, other(y), [True] * 3, None, torch.float32), expected))


# ---- which way a call takes ------------------------------------------------------------------------------------------


@every_function
def test_a_training_step_looks_up_no_signature(function, device, monkeypatch):
    """torch.autograd.Function.apply with setup_context does, at several times the cost of the rest."""
    arguments, cotangents = problem(function, device)
    expected = results(function, arguments, cotangents)

    def refuse(*_, **__):
        raise AssertionError("inspect.signature")

    # What the interpreter does at a launch is not meant.
    for name in ("launch", "launch_backward"):
        with_signature(monkeypatch, OPERATORS[function], name)
    monkeypatch.setattr(inspect, "signature", refuse)
    found = results(function, arguments, cotangents)
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


NODES = {
    cell: "LSTMCellGradientBackward",
    readout: "SoftmaxReadoutGradientBackward",
    layer: "LSTMLayerGradientBackward",
}


@every_function
def test_the_backward_is_recorded_only_where_it_may_be_differentiated(function, device):
    arguments, cotangents = problem(function, device)
    leaves = [t.requires_grad_() for t in arguments]
    outputs = function(*leaves)
    once = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    twice = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    assert all(map(torch.equal, once, twice))
    assert all(g.grad_fn is None for g in once)
    nodes = {type(g.grad_fn).__name__ for g in twice}
    assert NODES[function] in nodes


@every_function
def test_vjp_after_the_transform_and_without_recording(function, device):
    """What torch.func.vjp saved are wrappers that it has left: the kernels cannot read them."""
    arguments, cotangents = problem(function, device)
    expected = results(function, arguments, cotangents)[len(cotangents) :]
    _, back = torch.func.vjp(function, *arguments)
    with torch.no_grad():
        found = back(tuple(cotangents))
    torch.testing.assert_close(list(found), expected)


@every_function
def test_what_a_transform_left_behind_is_a_tensor(function, device):
    arguments, _ = problem(function, device)
    left = []
    torch.func.grad(lambda t: (left.append(t), t.sum())[1])(arguments[0])
    assert all(map(torch.equal, function(left[0], *arguments[1:]), function(*arguments)))


@every_function
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_second_derivatives_in_the_precision_asked_for(function, precision, device, monkeypatch):
    """torch's products in the formulas then follow it too, whatever its own setting is."""
    other = "ieee" if precision == "tf32" else "tf32"
    settings = []
    vjp = torch.func.vjp

    def noting(*args):
        settings.append(torch.backends.cuda.matmul.fp32_precision)
        return vjp(*args)

    monkeypatch.setattr(torch.func, "vjp", noting)
    arguments, cotangents = problem(function, device)
    leaves = [t.requires_grad_() for t in arguments]
    with cells.matmul_precision(other):
        first = torch.autograd.grad(function(*leaves, precision=precision), leaves, cotangents, create_graph=True)
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
