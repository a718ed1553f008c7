"""A layer under autograd: derivatives by differences and of second order, partial ones, held bytes, autocast."""

import threading
import weakref
from dataclasses import replace

import pytest
import torch
from support import layers

from lstm_triton import LSTM, functional
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


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.float16),
        ({}, torch.float32),
        (dict(batch_major=True), torch.float32),
        (dict(recompute=True), torch.float16),
        (SEGMENTS, torch.float32),
        (dict(create_graph=True), torch.float32),
        (dict(create_graph=True), torch.float16),
    ],
    ids=["plain, fp16", "plain", "batch first", "recompute, fp16", "segments", "second", "second, fp16"],
)
def test_a_backward_under_autocast_is_that_of_the_forward(options, dtype, device):
    """Which ran outside: the products of the backward stay in its dtype."""
    options = dict(options)
    recompute, create_graph = options.pop("recompute", False), options.pop("create_graph", False)
    layer, leaves = function_of(layers.draw(4, 2, 3, 4, 2, dtype, device=device, **options), recompute=recompute)
    results = []
    for enabled in (False, True):
        outputs = layer(*leaves)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
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
