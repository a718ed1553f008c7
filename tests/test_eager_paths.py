"""What eager calls go through: the short way to the kernels, what has to keep off it, and what they read of their inputs."""

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


@three
def test_lazily_negated_arguments_and_gradients(operation, device):
    arguments, cotangents = operation.draw(device)
    expected = operation.trained(arguments, cotangents)
    n = len(arguments)  # each of a step's, some of a layer's, and all at once
    for position in (*range(0, n + len(cotangents), max(1, n // 4)), slice(0, n)):
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


# ---- what is read ------------------------------------------------------------------------------------------------------

steps = operations("cell", "readout", "GRU cell")


def _trainable(leaves, dims):
    """Copies that need gradients where they are parameters of so many dimensions; and those that do."""
    leaves = [t.detach().clone() for t in leaves]
    return leaves, [t.requires_grad_() for t in leaves if len(t) != len(leaves[0]) and t.dim() in dims]


@steps
@pytest.mark.parametrize("dims", [(1,), (1, 2)], ids=["biases", "all"])
def test_a_step_between_forward_and_backward(dims, operation, device):
    """Inputs that no derivative reads may change in between, as with torch's cell and linear layer."""
    found = []
    for function in (operation.run, operation.torchs):
        leaves, parameters = _trainable(operation.draw(device)[0], (1, 2))
        leaves[0].requires_grad_(2 not in dims)
        first, second = (sum(t.pow(n).sum() for t in function(*leaves)) for n in (2, 3))
        first.backward()
        with torch.no_grad():
            for p in parameters:
                if p.dim() in dims:
                    p.sub_(p.grad)
                p.grad = None
        second.backward()
        found.append([p.grad for p in parameters])
    torch.testing.assert_close(*found)


@operations("cell", "readout")  # the GRU cell's weights come permuted
def test_what_is_read_may_not_change(operation, device):
    """By the first derivative not the weights, by the second nothing."""
    leaves, cotangents = operation.draw(device)
    batches = [torch.ones(2, *g.shape, dtype=g.dtype, device=device) for g in cotangents]
    for dim, arrived, options, error in (
        (2, cotangents, {}, "modified by an inplace operation"),
        (1, cotangents, {"create_graph": True}, "b.* is at version"),
        (1, batches, {"is_grads_batched": True}, "b.* is at version"),
    ):
        outputs = operation.run(*leaves)
        with torch.no_grad():
            next(t for t in leaves if len(t) != len(leaves[0]) and t.dim() == dim).mul_(2)
        with pytest.raises(RuntimeError, match=error):
            torch.autograd.grad(outputs, leaves[0], arrived, **options)


@steps
def test_inference_tensors_that_are_not_read(operation, device):
    found = []
    for function in (operation.run, operation.torchs):
        leaves, biases = _trainable(operation.draw(device)[0], (1,))
        with torch.inference_mode():
            leaves[0] = leaves[0].clone()
        found.append(torch.autograd.grad(sum(t.square().sum() for t in function(*leaves)), biases))
    torch.testing.assert_close(*found)
