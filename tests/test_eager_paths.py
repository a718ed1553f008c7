"""What eager calls go through: the short way to the kernels, and all that has to keep off it."""

import pytest
import torch
from support.operations import operations
from torch._dynamo.compiled_autograd import _enable

from lstm_triton.kernels.device import fp32_precision

pytestmark = pytest.mark.long
three = operations("cell", "readout", "layer with segments")


def lazily_negated(t):
    """t as the imaginary part of a conjugate: its memory holds -t."""
    t = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert t.is_neg()
    return t


@operations("cell", "readout", "layer without biases", "layer with segments")
def test_lazily_negated_arguments_and_gradients(operation, device):
    arguments, cotangents = operation.draw(device)
    expected = operation.trained(arguments, cotangents)
    n = len(arguments)
    for position in (*range(n + len(cotangents)), slice(0, n)):
        given = [*arguments, *cotangents]
        chosen = given[position]
        given[position] = [*map(lazily_negated, chosen)] if isinstance(chosen, list) else lazily_negated(chosen)
        assert all(map(torch.equal, operation.trained(given[:n], given[n:]), expected)), position


@three
def test_compiled_autograd_of_an_eager_call(operation, device):
    arguments, cotangents = operation.draw(device)
    expected = operation.trained(arguments, cotangents)
    with _enable(lambda graph: graph):
        assert all(map(torch.equal, operation.trained(arguments, cotangents), expected))


# ---- which way a call takes ------------------------------------------------------------------------------------------


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
def test_what_a_transform_left_behind_is_a_tensor(operation, device):
    """The wrappers that torch.func.vjp saved too, which the kernels cannot read."""
    arguments, cotangents = operation.draw(device)
    outputs, expected = (found := operation.trained(arguments, cotangents))[: len(cotangents)], found[len(cotangents) :]
    left = []
    torch.func.grad(lambda t: (left.append(t), t.sum())[1])(arguments[0])
    assert all(map(torch.equal, operation.run(left[0], *arguments[1:]), outputs))
    _, back = torch.func.vjp(operation.run, *arguments)
    with torch.no_grad():
        torch.testing.assert_close(list(back(tuple(cotangents))), expected)


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
    with fp32_precision(torch.backends.cuda.matmul, other):
        first = torch.autograd.grad(operation.run(*leaves, precision=precision), leaves, cotangents, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        assert torch.backends.cuda.matmul.fp32_precision == other
    assert set(settings) == {precision}
