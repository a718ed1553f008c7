"""The cell as a PyTorch operator: derivatives of every order and partial ones, transforms, autocast, inference."""

import warnings

import pytest
import torch
from support import cells
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from lstm_triton import LSTMCell, functional, operators, reference

NAMES = cells.INPUTS


def kernels(x, h, c, *weights):
    return functional.lstm_cell(x, (h, c), *weights, backend="triton")


def torchs(x, h, c, *weights):
    return torch.lstm_cell(x, (h, c), *weights)


@pytest.fixture
def problem(device):
    return cells.draw(2, 3, 2, torch.float64, device=device)


@pytest.fixture
def leaves(problem):
    return [t.requires_grad_() for t in problem.inputs]


@pytest.fixture(autouse=True)
def no_autograd_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*autograd kernel.*")
        warnings.filterwarnings("error", ".*silently incorrect.*")
        yield


# ---- derivatives ---------------------------------------------------------------------------------------------------


def test_gradients_by_differences(leaves):
    assert gradcheck(kernels, leaves, fast_mode=True)


@pytest.mark.slow
def test_every_gradient_by_differences(leaves):
    assert gradcheck(kernels, leaves)
    assert gradgradcheck(kernels, leaves)


@pytest.mark.long
def test_second_derivatives_by_differences(leaves):
    assert gradgradcheck(kernels, leaves, fast_mode=True)


def _loss(results):
    return sum((t**2).sum() + (t**3).sum() for t in results)


@pytest.mark.parametrize("used", ["h", "c", "both"])
def test_derivatives_up_to_the_third_equal_torchs(used, leaves):
    def derivatives(cell):
        results = [t for t, name in zip(cell(*leaves), "hc") if used in (name, "both")]
        orders = []
        for _ in range(3):
            results = torch.autograd.grad(_loss(results), leaves, create_graph=True)
            orders += results
        return orders

    for found, expected in zip(derivatives(kernels), derivatives(torchs), strict=True):
        torch.testing.assert_close(found, expected)


def test_second_derivatives_where_inputs_depend_on_each_other(problem):
    """One weight in both places, h = c, and x computed from h: each gradient is the total one."""
    w = problem.inputs[4].clone().requires_grad_()
    h = problem.inputs[1].clone().requires_grad_()

    def derivatives(cell):
        results = cell(torch.tanh(h), h, h, w, w, None, None)
        first = torch.autograd.grad(_loss(results), (w, h), create_graph=True)
        return *first, *torch.autograd.grad(_loss(first), (w, h))

    for found, expected in zip(derivatives(kernels), derivatives(torchs)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [*NAMES, "b_ih and b_hh", "nothing but h and w_hh"])
def test_only_what_needs_a_gradient_is_computed(name, problem, monkeypatch):
    asked = {n for n in NAMES if n in name.split()}
    inputs = [t.clone().requires_grad_(n in asked) for n, t in zip(NAMES, problem.inputs)]
    needs = []
    launch = operators.lstm_cell.launch_backward

    def launch_backward(grads, inputs, saved, names, options):
        needs.append(names)
        return launch(grads, inputs, saved, names, options)

    monkeypatch.setattr(operators.lstm_cell, "launch_backward", launch_backward)
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(kernels(*inputs), wanted, problem.cotangents)
    expected = torch.autograd.grad(torchs(*inputs), wanted, problem.cotangents)
    torch.testing.assert_close(found, expected)
    assert needs == [asked]


@pytest.mark.parametrize("used", ["h", "c"])
def test_a_gradient_that_does_not_arrive_is_none_and_not_zeros(used, leaves, problem, monkeypatch):
    arrived = []
    launch = operators.lstm_cell.launch_backward
    monkeypatch.setattr(
        operators.lstm_cell, "launch_backward", lambda grads, *args: arrived.append(grads) or launch(grads, *args)
    )
    index = "hc".index(used)
    found = torch.autograd.grad(kernels(*leaves)[index], leaves, problem.cotangents[index])
    expected = torch.autograd.grad(torchs(*leaves)[index], leaves, problem.cotangents[index])
    torch.testing.assert_close(found, expected)
    assert [t is None for t in arrived[0]] == [used == "c", used == "h"]


def test_backward_twice_through_one_graph(leaves, problem):
    results = kernels(*leaves)
    first = torch.autograd.grad(results, leaves, problem.cotangents, retain_graph=True)
    second = torch.autograd.grad(results, leaves, problem.cotangents)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(results, leaves, problem.cotangents)


def test_gradients_accumulate(leaves, problem):
    for _ in range(2):
        torch.autograd.backward(kernels(*leaves), problem.cotangents)
    once = torch.autograd.grad(kernels(*leaves), leaves, problem.cotangents)
    for t, gradient in zip(leaves, once):
        torch.testing.assert_close(t.grad, 2 * gradient)


def test_the_two_bias_gradients_do_not_share_memory(leaves, problem):
    torch.autograd.backward(kernels(*leaves), problem.cotangents)
    b_ih, b_hh = leaves[5:]
    before = b_hh.grad.clone()
    b_ih.grad.zero_()
    assert torch.equal(b_hh.grad, before)


@pytest.mark.parametrize("index", [0, 1], ids=["h", "c"])
def test_results_changed_in_place_raise_or_do_not_matter(index, leaves, problem):
    expected = torch.autograd.grad(kernels(*leaves), leaves, problem.cotangents)
    results = kernels(*leaves)
    with torch.no_grad():
        results[index].zero_()
    try:
        found = torch.autograd.grad(results, leaves, problem.cotangents)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(map(torch.equal, found, expected))


def test_saved_tensor_hooks(leaves, problem):
    packed = []

    def pack(t):
        packed.append(t)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index].clone()):
        results = kernels(*leaves)
        assert len(packed) == len(NAMES) - 2 + 2  # neither bias, but c and gates
        found = torch.autograd.grad(results, leaves, problem.cotangents)
    expected = torch.autograd.grad(kernels(*leaves), leaves, problem.cotangents)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, leaves, problem):
    torch.autograd.backward(checkpoint(kernels, *leaves, use_reentrant=reentrant), problem.cotangents)
    expected = torch.autograd.grad(kernels(*leaves), leaves, problem.cotangents)
    assert all(torch.equal(t.grad, gradient) for t, gradient in zip(leaves, expected))


def test_several_steps_equal_torchs(problem):
    x, h, c, *weights = problem.inputs
    weights = [t.clone().requires_grad_() for t in weights]

    def gradients(cell):
        states = h, c
        for step in range(4):
            states = cell(x + step, *states, *weights)
        return torch.autograd.grad(states, weights, problem.cotangents)

    for found, expected in zip(gradients(kernels), gradients(torchs)):
        torch.testing.assert_close(found, expected)


# ---- torch.func and forward mode -----------------------------------------------------------------------------------


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: _loss(f(x)))(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda x: _loss([torch.func.grad(lambda x: _loss(f(x)))(x)]))(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: _loss(f(x)))(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, 2 * x))),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: _loss(f(x))))(torch.stack((x, 2 * x))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(transform, problem):
    x, *others = problem.inputs
    found = TRANSFORMS[transform](lambda x: kernels(x, *others), x)
    expected = TRANSFORMS[transform](lambda x: reference.lstm_cell(x, *others), x)  # torch's cell knows no vmap
    torch.testing.assert_close(found, expected)


def test_forward_mode_equals_torchs(problem):
    def tangents(cell):
        with torch.autograd.forward_ad.dual_level():
            x, *others = problem.inputs
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return [torch.autograd.forward_ad.unpack_dual(t).tangent for t in cell(dual, *others)]

    torch.testing.assert_close(tangents(kernels), tangents(torchs))


def test_batched_gradients_equal_torchs(leaves, problem):
    batch = [torch.stack((t, 2 * t, -t)) for t in problem.cotangents]
    found = torch.autograd.grad(kernels(*leaves), leaves, batch, is_grads_batched=True)
    expected = torch.autograd.grad(torchs(*leaves), leaves, batch, is_grads_batched=True)
    torch.testing.assert_close(found, expected)


def test_functional_call(problem, device):
    cell = LSTMCell(3, 2, dtype=torch.float64, device=device, backend="triton")
    x, h, c, *weights = problem.inputs
    parameters = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights))

    def loss(parameters):
        return _loss(torch.func.functional_call(cell, parameters, (x, (h, c))))

    found = torch.func.grad(loss)(parameters)
    tensors = [t.requires_grad_() for t in weights]
    expected = torch.autograd.grad(_loss(torchs(x, h, c, *tensors)), tensors)
    torch.testing.assert_close(list(found.values()), list(expected))


# ---- inference, autocast, subclasses -------------------------------------------------------------------------------


def test_inference_builds_no_graph_and_keeps_no_gates(leaves, monkeypatch, count_launches):
    saved = []
    forward = operators.lstm_cell.launch

    def launch(inputs, options, save):
        saved.append(save)
        return forward(inputs, options, save)

    monkeypatch.setattr(operators.lstm_cell, "launch", launch)
    trained = kernels(*leaves)
    with torch.no_grad():
        no_grad = kernels(*leaves)
    with torch.inference_mode():
        inference = kernels(*leaves)
    frozen = kernels(*(t.detach() for t in leaves))
    assert saved == [True, False, False, False]
    for results in (no_grad, inference, frozen):
        assert all(t.grad_fn is None and not t.requires_grad for t in results)
        assert all(map(torch.equal, results, trained))
    assert inference[0].is_inference()
    assert count_launches() == {"_lstm_cell_forward_kernel": 4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    """Both states in autocast's dtype, as torch's own cell on a GPU; gradients in the parameters' dtype."""
    cell = LSTMCell(3, 5, device=device, backend="triton")
    x = torch.randn(4, 3, device=device)
    with torch.autocast(device.type, dtype):
        h, c = cell(x)
        h, c = cell(x, (h, c))
    assert h.dtype == c.dtype == dtype
    (h.float().sum() + c.float().sum()).backward()
    half = LSTMCell(3, 5, device=device, dtype=dtype, backend="triton")
    half.load_state_dict(cell.state_dict())
    expected = half(x.to(dtype), half(x.to(dtype)))
    assert all(map(torch.equal, (h, c), expected))
    (expected[0].float().sum() + expected[1].float().sum()).backward()
    for ours, theirs in zip(cell.parameters(), half.parameters()):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=0.02, atol=0.02)


def test_autocast_leaves_float64_alone(problem, device):
    with torch.autocast(device.type, torch.bfloat16):
        found = kernels(*problem.inputs)
    assert all(map(torch.equal, found, kernels(*problem.inputs)))


def test_a_tensor_subclass_anywhere_passes_through_the_dispatcher(problem):
    """A kernel takes the memory of plain tensors; a subclass must not reach it, wherever it stands."""
    from torch.testing._internal.two_tensor import TwoTensor

    for position in range(len(NAMES)):
        args = list(problem.inputs)
        args[position] = TwoTensor(args[position], args[position])
        h, c = kernels(*args)
        assert isinstance(h, TwoTensor) and isinstance(c, TwoTensor), NAMES[position]
        assert torch.equal(h.a, kernels(*problem.inputs)[0])
