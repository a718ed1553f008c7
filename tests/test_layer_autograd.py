"""A layer under autograd: derivatives by differences and of second order, partial ones, held bytes, autocast."""

import threading
import weakref
from dataclasses import replace

import pytest
import torch
from support import layers
from torch.autograd import gradcheck, gradgradcheck

from lstm_triton import LSTM, functional, operators
from lstm_triton.kernels import layer_backward

SEGMENTS = dict(resets=True, reset_state="stored", lengths=True, cells=True)


def function_of(problem, **options):
    """(function, arguments): the layer as a function of problem.inputs."""
    n = len(problem.weights)

    def layer(x, h0, c0, *rest):
        result = functional.lstm(
            x,
            (h0, c0),
            rest[:n],
            resets=problem.resets,
            reset_state=rest[n:] or None,
            lengths=problem.lengths,
            return_cell_states=problem.with_cells,
            backend="triton",
            **options,
        )
        return (result[0], *result[1], *result[2:])

    return layer, [t.detach().requires_grad_() for t in problem.inputs]


@pytest.fixture
def tiny(device):
    return layers.draw(2, 2, 2, 2, 2, torch.float64, device=device, **SEGMENTS)


@pytest.mark.long
def test_gradients_by_differences(device):
    """Of one direction; the slow test below has both, and test_sequence judges both by the tolerance rule."""
    problem = layers.draw(2, 2, 2, 2, 1, torch.float64, device=device, **SEGMENTS)
    assert gradcheck(*function_of(problem), fast_mode=True)


@pytest.mark.long
def test_some_second_derivatives_by_differences(device):
    """Of x, c0, W_hh and the h of resets; the slow test below has all, test_second_derivatives_of_segments both directions."""
    layer, leaves = function_of(layers.draw(2, 2, 2, 2, 1, torch.float64, device=device, **SEGMENTS))
    for k, leaf in enumerate(leaves):
        leaf.requires_grad_(k in (0, 2, 4, len(leaves) - 2))
    assert leaves[4].shape == (8, 2), "w_hh"
    assert gradgradcheck(layer, leaves, fast_mode=True)


@pytest.mark.slow
def test_every_derivative_by_differences(tiny):
    assert gradcheck(*function_of(tiny))
    assert gradgradcheck(*function_of(tiny))


@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives_equal_torchs(bias, device):
    problem = layers.draw(3, 2, 3, 4, 2, torch.float64, bias=bias, device=device)
    layer, leaves = function_of(problem)

    def torchs(x, h0, c0, *weights):
        return torch._VF.lstm(x, (h0, c0), weights, bias, 1, 0.0, True, True, False)

    def derivatives(layer):
        first = torch.autograd.grad(layer(*leaves), leaves, problem.cotangents, create_graph=True)
        return *first, *torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    torch.testing.assert_close(derivatives(layer), derivatives(torchs))


INPUTS = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "reset_h", "reset_c")


@pytest.mark.parametrize("asked", [*INPUTS, "x h0", "w_ih b_hh"])
def test_only_what_needs_a_gradient_is_computed(asked, device, monkeypatch):
    problem = layers.draw(3, 2, 3, 4, 1, torch.float64, device=device, resets=True, reset_state="stored")
    layer, leaves = function_of(problem)
    expected = dict(zip(INPUTS, torch.autograd.grad(layer(*leaves), leaves, problem.cotangents)))
    needs = []
    launch = operators.lstm_layer.launch_backward

    def launch_backward(grads, inputs, saved, names, options):
        needs.append(names)
        return launch(grads, inputs, saved, names, options)

    monkeypatch.setattr(operators.lstm_layer, "launch_backward", launch_backward)
    inputs = [t.detach().requires_grad_(name in asked.split()) for name, t in zip(INPUTS, leaves)]
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(layer(*inputs), wanted, problem.cotangents)
    assert all(torch.equal(g, expected[name]) for g, name in zip(found, asked.split(), strict=True))
    assert needs == [set(asked.split())]


@pytest.mark.parametrize("used", ["y", "h_n", "c_n", "c"])
def test_a_gradient_of_one_output_alone(used, device):
    problem = layers.draw(3, 2, 3, 4, 2, torch.float64, device=device, cells=True)
    layer, leaves = function_of(problem)
    index = layers.OUTPUTS.index(used)
    zeros = [g if k == index else torch.zeros_like(g) for k, g in enumerate(problem.cotangents)]
    expected = torch.autograd.grad(layer(*leaves), leaves, zeros)
    found = torch.autograd.grad(layer(*leaves)[index], leaves, problem.cotangents[index])
    assert all(map(torch.equal, found, expected))


def test_an_expanded_gradient_of_the_output(device):
    """What y.sum() sends back has strides 0."""
    layer, leaves = function_of(layers.draw(3, 2, 3, 4, 2, device=device, batch_major=True))
    y = layer(*leaves)[0]
    found = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(map(torch.equal, found, expected))


def test_results_do_not_share_memory(device):
    layer, leaves = function_of(layers.draw(1, 2, 3, 4, 1, device=device, cells=True))
    results = layer(*leaves)
    addresses = {t.untyped_storage().data_ptr() for t in (*results, *leaves)}
    assert len(addresses) == len(results) + len(leaves)


@pytest.mark.parametrize("H", [5, 16])  # with rows padded in the launch, and without
def test_an_output_changed_in_place_is_reported(H, device):
    """As where cuDNN computed it: the gradient needs it as it was."""
    layer, arguments = function_of(layers.draw(3, 2, 2, H, 2, device=device), precision="tf32")
    y = layer(*arguments)[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- memory between forward and backward -----------------------------------------------------------------------------


def _held(problem, **options):
    """Bytes that autograd keeps besides inputs, gradients that come of them, launches of the forward."""
    layer, leaves = function_of(problem, **options)
    held = {t.untyped_storage().data_ptr(): 0 for t in (*leaves, problem.resets, problem.lengths) if t is not None}

    def pack(t):
        held.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = layer(*leaves)
    return sum(held.values()), torch.autograd.grad(outputs, leaves, problem.cotangents)


@pytest.fixture
def short_ranges(monkeypatch):
    """Gates are rebuilt for two steps at a time, instead of 32."""
    monkeypatch.setattr(layer_backward, "recomputed_ranges", lambda T: [(t, min(t + 2, T)) for t in range(0, T, 2)])


@pytest.mark.long
@pytest.mark.parametrize(
    "batch_major, I, segments",
    [(False, 4, SEGMENTS), (True, 4, {}), (False, 23, {}), (True, 23, SEGMENTS)],
    ids=lambda value: (", ".join(value) or "plain") if isinstance(value, dict) else None,
)
def test_recomputing_holds_at_most_half(batch_major, I, segments, device, short_ranges):
    T = 5
    problem = layers.draw(T, 3, I, 5, 2, torch.float64, batch_major=batch_major, device=device, **segments)
    default, expected = _held(problem)
    recomputing, found = _held(problem, recompute=True)
    states = T * 3 * 2 * 5 * 8
    assert default >= 6 * states and 2 * states <= recomputing <= default / 2
    names = problem.names[len(problem.cotangents) :]
    for name, ours, wanted in zip(names, found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=64 * 2**-52 * wanted.abs().max().item(), msg=name)


@pytest.mark.parametrize("dtype, precision", [(torch.float32, "tf32"), (torch.bfloat16, "ieee")])
def test_recomputing_is_as_accurate(dtype, precision, device):
    problem = layers.draw(5, 3, 4, 19, 2, dtype, precision=precision, device=device)
    layers.assert_as_accurate_as_torch(layers.by_kernels(problem, recompute=True), problem)


def test_recomputing_holds_one_range_of_gates_at_a_time(device, monkeypatch, short_ranges):
    rebuild, made, held = layer_backward._rebuilt_pre_activations, [], []

    def rebuilding(*args):
        held.append(sum(piece() is not None for piece in made))
        piece = rebuild(*args)
        made.append(weakref.ref(piece))
        return piece

    monkeypatch.setattr(layer_backward, "_rebuilt_pre_activations", rebuilding)
    layers.by_kernels(layers.draw(5, 2, 3, 4, 2, device=device), recompute=True)
    assert held == [0, 0, 0]


def test_recomputing_is_deterministic(device, short_ranges):
    problem = layers.draw(5, 3, 4, 5, 2, device=device, **SEGMENTS)
    first, second = (layers.by_kernels(problem, recompute=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ---- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_casts_before_the_layer(device):
    problem = layers.draw(3, 2, 3, 4, 2, device=device, resets=True, reset_state="shared")
    layer, leaves = function_of(problem)
    low, low_leaves = function_of(problem.with_tensors([t.bfloat16() for t in (*problem.inputs, *problem.cotangents)]))
    with torch.autocast(device.type, torch.bfloat16):
        found = layer(*leaves)
    expected = low(*low_leaves)
    assert all(t.dtype == torch.bfloat16 for t in found) and all(map(torch.equal, found, expected))
    cotangents = [g.bfloat16() for g in problem.cotangents]
    gradients = torch.autograd.grad(found, leaves, cotangents)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, low_leaves, cotangents)):
        assert gradient.dtype == torch.float32 and torch.equal(gradient, wanted.float())


def test_autocast_leaves_float64_alone(device):
    layer, leaves = function_of(layers.draw(2, 2, 3, 4, 1, torch.float64, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        found = layer(*leaves)
    assert all(map(torch.equal, found, layer(*leaves)))


@pytest.mark.parametrize("dtype, low", [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
@pytest.mark.parametrize(
    "options",
    [{}, dict(batch_major=True), dict(recompute=True), SEGMENTS, dict(create_graph=True)],
    ids=["plain", "batch first", "recompute", "segments", "second derivatives"],
)
def test_a_backward_under_autocast_is_that_of_the_forward(options, dtype, low, device):
    """Which ran outside: the products of the backward stay in its dtype."""
    options = dict(options)
    recompute, create_graph = options.pop("recompute", False), options.pop("create_graph", False)
    layer, leaves = function_of(layers.draw(4, 2, 3, 4, 2, dtype, device=device, **options), recompute=recompute)
    results = []
    for enabled in (False, True):
        outputs = layer(*leaves)
        with torch.autocast(device.type, low, enabled=enabled):
            gradients = torch.autograd.grad(outputs, leaves, outputs, create_graph=create_graph)
            if create_graph:
                gradients += torch.autograd.grad(gradients, leaves, [g.detach() for g in gradients])
        results.append(gradients)
    assert all(map(torch.equal, *results))


def test_a_backward_through_a_projection_under_autocast_is_that_of_the_forward(device):
    lstm = LSTM(3, 4, proj_size=2, backend="triton", device=device)
    x = torch.randn(3, 2, 3, device=device)
    results = []
    for enabled in (False, True):
        y = lstm(x)[0]
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(y, list(lstm.parameters()), y))
    assert all(map(torch.equal, *results))


def test_threads_do_not_disturb_each_others_precision():
    """As replicas of torch.nn.DataParallel would, and the threads in which autograd serves several GPUs."""
    from lstm_triton.kernels.device import torch_products

    matmul = torch.backends.cuda.matmul
    before, found = matmul.fp32_precision, []

    def other():
        with torch_products(torch.float32, "ieee"):
            found.append(matmul.fp32_precision)

    thread = threading.Thread(target=other)
    with torch_products(torch.float32, "tf32"):
        thread.start()
        thread.join(0.2)
        assert matmul.fp32_precision == "tf32" and not found
        with torch_products(torch.float32, "ieee"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    thread.join()
    assert found == ["ieee"] and matmul.fp32_precision == before


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_torchs_settings_are_left_as_they_were(backend, device):
    """Also what they inherit: a value that is read and written back would follow its parent no more."""
    problem = layers.draw(3, 2, 4, 9, device=device)
    before = torch.backends.fp32_precision
    try:
        for inherited, precision in (("tf32", "ieee"), ("ieee", "tf32")):
            torch.backends.fp32_precision = inherited
            layers.by_kernels(replace(problem, precision=precision), backend)
            for value in ("ieee", "tf32"):
                torch.backends.fp32_precision = value
                assert torch.backends.cuda.matmul.fp32_precision == value
    finally:
        torch.backends.fp32_precision = before
