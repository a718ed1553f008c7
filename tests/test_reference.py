"""The plain-PyTorch reference of the cell against torch.nn.LSTMCell, in float64."""

import pytest
import torch
from support import cells
from support.extended import Extended
from torch.autograd import gradcheck, gradgradcheck

from lstm_triton import reference

SHAPES = [(1, 1, 1), (3, 7, 5), (4, 1, 6), (2, 0, 3), (0, 3, 2)]


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)], ids=["both", "b_ih", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_written_backward_are_torchs(shape, biases):
    problem = cells.draw(*shape, torch.float64, biases=biases)
    h, c, *gradients = cells.by_torch(problem)
    torch.testing.assert_close(reference.lstm_cell(*problem.inputs), (h, c))
    found = reference.lstm_cell_backward(problem.cotangents, *problem.inputs)
    assert len(found) == 6
    torch.testing.assert_close(found[:5], tuple(gradients[:5]))
    for expected in gradients[5:]:
        if expected is not None:
            torch.testing.assert_close(found[5], expected)


def test_reference_is_differentiable_twice_and_its_backward_once():
    problem = cells.draw(2, 2, 2, torch.float64)
    leaves = [t.requires_grad_() for t in (*problem.cotangents, *problem.inputs)]
    assert gradcheck(reference.lstm_cell, leaves[2:], fast_mode=True)
    assert gradgradcheck(reference.lstm_cell, leaves[2:], fast_mode=True)
    assert gradcheck(_backward, leaves, fast_mode=True)


def _backward(dh, dc, *inputs):
    return reference.lstm_cell_backward((dh, dc), *inputs)


@pytest.mark.parametrize("asked", [range(6), (0,), (3, 5), ()], ids=str)
def test_double_backward(asked):
    problem = cells.draw(2, 3, 4, torch.float64)
    inputs = [t.requires_grad_() for t in (*problem.cotangents, *problem.inputs)]
    results = _backward(*inputs)
    grads = [torch.randn_like(t) if k in asked else None for k, t in enumerate(results)]
    found = reference.back_through(_backward, grads, inputs)
    if not asked:
        assert found == [None] * 9
        return
    chosen = [(results[k], grads[k]) for k in asked]
    expected = torch.autograd.grad(
        [r for r, _ in chosen], inputs, [g for _, g in chosen], allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(tuple(found), expected)


def test_double_backward_without_biases():
    problem = cells.draw(2, 3, 4, torch.float64, biases=(True, False))
    inputs = (*problem.cotangents, *problem.inputs)
    grads = [torch.randn_like(t) for t in _backward(*inputs)]
    found = reference.back_through(_backward, grads, inputs)
    assert [t is None for t in found] == [t is None for t in inputs]


def test_extended_precision_is_the_same_formula():
    """The truth of float64 results: equal to float64, but not to the last bit."""
    problem = cells.draw(3, 7, 5, torch.float64)
    wide = [Extended.of(t) for t in problem.inputs]
    for found, expected in zip(reference.lstm_cell(*wide), reference.lstm_cell(*problem.inputs)):
        torch.testing.assert_close(found.rounded(), expected)
        assert not torch.equal(found.rounded(), expected)
