"""The operators under torch.compile, torch.export and fake tensors: the same values as in eager mode, in one graph."""

import pytest
import torch
from support import cells
from torch._subclasses.fake_tensor import FakeTensorMode

from lstm_triton import LSTMCell, functional

pytestmark = pytest.mark.long


@pytest.fixture
def cell(device):
    return LSTMCell(3, 5, device=device, backend="triton")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _data(device, B=4):
    return [torch.randn(B, n, device=device) for n in (3, 5, 5)]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_training_step_in_one_graph(backend, cell, device):
    x, h, c = _data(device)
    x.requires_grad_()
    wanted = [x, *cell.parameters()]

    def step(x, h, c):
        h, c = cell(x, (h, c))
        h, c = cell(x, (h, c))
        return (h * h).sum() + c.sum()

    eager = step(x, h, c)
    expected = torch.autograd.grad(eager, wanted)
    compiled = torch.compile(step, backend=backend, fullgraph=True)(x, h, c)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, wanted), expected)


def test_inference_in_one_graph(cell, device):
    x, h, c = _data(device)
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found, expected = compiled(x, (h, c)), cell(x, (h, c))
        without_state = compiled(x), cell(x)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, *without_state))
    assert not found[0].requires_grad


def test_batch_size_is_dynamic(cell, device):
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True, dynamic=True)
    for B in (4, 7, 13):
        x, h, c = _data(device, B)
        with torch.no_grad():
            assert all(map(torch.equal, compiled(x, (h, c)), cell(x, (h, c))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_autocast_in_one_graph(cell, device):
    x, h, c = _data(device)

    def step(x, h, c):
        with torch.autocast(device.type, torch.bfloat16):
            return cell(x, (h, c))

    found = torch.compile(step, backend="aot_eager", fullgraph=True)(x, h, c)
    assert found[0].dtype == torch.bfloat16
    assert all(map(torch.equal, found, step(x, h, c)))


def test_second_derivatives_of_a_compiled_step(cell, device):
    """Right, or where torch's compiler has none, refused."""
    x, h, c = _data(device)
    x.requires_grad_()

    def second(cell):
        h1, c1 = cell(x, (h, c))
        (gradient,) = torch.autograd.grad((h1**2).sum() + (c1**2).sum(), x, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), x)[0]

    found = second(torch.compile(cell, backend="eager", fullgraph=True))
    torch.testing.assert_close(found, second(cell))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second(torch.compile(cell, backend="aot_eager", fullgraph=True))


def test_export(cell, device):
    x, h, c = _data(device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(cell, (x, (h, c)), dynamic_shapes=({0: batch}, ({0: batch}, {0: batch})))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.lstm_triton.lstm_cell.default) == 1
    exported = program.module()
    x, h, c = _data(device, 9)
    expected = cell(x, (h, c))
    found = exported(x, (h, c))
    assert all(map(torch.equal, found, expected))
    gradients = torch.autograd.grad(expected[0].sum(), list(cell.parameters()))
    again = torch.autograd.grad(found[0].sum(), list(exported.parameters()))
    torch.testing.assert_close(again, gradients)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("biases", [(True, True), (False, False)], ids=["biases", "no biases"])
def test_forward_operator_passes_opcheck(save, biases, device):
    inputs = cells.draw(2, 3, 5, biases=biases, device=device).inputs
    torch.library.opcheck(torch.ops.lstm_triton.lstm_cell, (*inputs, None, None, "lstm", save))


def test_forward_operator_is_differentiable(device):
    """What an exported program calls. Without the saved gates it refuses."""
    problem = cells.draw(2, 3, 5, device=device)
    leaves = [t.requires_grad_() for t in problem.inputs]
    torch.library.opcheck(torch.ops.lstm_triton.lstm_cell, (*leaves, None, None, "lstm", True))
    h, c, gates = torch.ops.lstm_triton.lstm_cell(*leaves, None, None, "lstm", True)
    assert not gates.requires_grad
    found = torch.autograd.grad((h, c), leaves, problem.cotangents)
    for ours, expected in zip(found, cells.by_kernels(problem)[2:]):
        assert torch.equal(ours, expected)
    h, _, _ = torch.ops.lstm_triton.lstm_cell(*leaves, None, None, "lstm", False)
    with pytest.raises(RuntimeError, match="save=False"):
        h.sum().backward()


@pytest.mark.parametrize("needs", [[True] * 7, [False, True, False, False, True, True, False]], ids=["all", "some"])
def test_backward_operator_passes_opcheck(needs, device):
    problem = cells.draw(2, 3, 5, device=device)
    _, c, gates = torch.ops.lstm_triton.lstm_cell(*problem.inputs, None, None, "lstm", True)
    for dh, dc in (problem.cotangents, (None, problem.cotangents[1])):
        args = (dh, dc, *problem.inputs, None, c, gates, [*needs, False], None, "lstm")
        torch.library.opcheck(torch.ops.lstm_triton.lstm_cell_backward, args)


def test_shapes_without_data(device):
    real = cells.draw(2, 3, 5, device=device)
    expected = cells.by_kernels(real)
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(t).requires_grad_() for t in real.inputs]
        h, c = functional.lstm_cell(leaves[0], tuple(leaves[1:3]), *leaves[3:], backend="triton")
        gradients = torch.autograd.grad(h.sum() + c.sum(), leaves)
    for found, t in zip((h, c, *gradients), expected):
        assert (found.shape, found.dtype, found.device) == (t.shape, t.dtype, t.device)
    h, c, gates = torch.ops.lstm_triton.lstm_cell(*(t.to("meta") for t in real.inputs), None, None, "lstm", True)
    assert h.is_meta and h.shape == c.shape == (2, 5) and gates.shape == (2, 5, 4)
