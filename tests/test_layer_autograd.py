"""A layer under autograd: what it holds between forward and backward, backward under autocast, torch's settings."""

import threading
import weakref
from dataclasses import replace

import pytest
import torch
from support import layers, segmented
from support.operations import operations

from lstm_triton import LSTM
from lstm_triton.kernels import layer_backward
from lstm_triton.kernels.device import torch_products

SEGMENTS = dict(resets=True, reset_state="stored", lengths=True, cells=True)


@pytest.mark.parametrize("H", [5, 16])  # with rows padded in the launch, and without
def test_an_output_changed_in_place_is_reported(H, device):
    """As where cuDNN computed it: the gradient needs it as it was."""
    lstm = LSTM(2, H, bidirectional=True, backend="triton", precision="tf32", device=device)
    y = lstm(torch.randn(3, 2, 2, device=device))[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- memory ------------------------------------------------------------------------------------------------------------


def _held(problem, **options):
    """Bytes that autograd keeps besides inputs, and what the kernels give."""
    given = (t for t in (*problem.inputs, problem.resets, problem.lengths) if t is not None)
    held = {t.untyped_storage().data_ptr(): 0 for t in given}

    def pack(t):
        held.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = layers.by_kernels(problem, **options)
    return sum(held.values()), results


@pytest.mark.long
@pytest.mark.parametrize("batch_major, I, segments", [(True, 4, {}), (False, 23, SEGMENTS)], ids=["plain", "segments"])
def test_recomputing_holds_at_most_half_and_one_range_of_gates(batch_major, I, segments, device, monkeypatch):
    """Gates are rebuilt for two steps at a time here, instead of 32."""
    monkeypatch.setattr(layer_backward, "recomputed_ranges", lambda T: [(t, min(t + 2, T)) for t in range(0, T, 2)])
    rebuild, made, alive = layer_backward._rebuilt_pre_activations, [], []

    def rebuilding(*args):
        alive.append(sum(piece() is not None for piece in made))
        piece = rebuild(*args)
        made.append(weakref.ref(piece))
        return piece

    monkeypatch.setattr(layer_backward, "_rebuilt_pre_activations", rebuilding)
    problem = layers.draw(5, 3, I, 5, 2, torch.float64, batch_major=batch_major, device=device, **segments)
    (default, _), (recomputing, found) = (_held(problem, recompute=recompute) for recompute in (False, True))
    states = 5 * 3 * 2 * 5 * 8
    assert default >= 6 * states and 2 * states <= recomputing <= default / 2
    assert alive == [0, 0, 0]
    layers.assert_as_accurate_as_torch(found, problem)


CALLS = {"plain": {}, "segments": {"rows": "lengths", "resets": "zero"}, "no steps": {"rows": "lengths"}}
OPTIONS = {"one layer": {}, "deep": {"num_layers": 2, "bidirectional": True}}
OPTIONS |= {"recompute": {"recompute": True}, "projection": {"projection": True}}
AXES = {"backend": ["triton", "auto", "reference"], "options": [*OPTIONS], "H": [1, 3], "call": [*CALLS]}


def _assert_apart(function, inputs, create_graph):
    def assert_apart(gradients, others):
        addresses = [t.untyped_storage().data_ptr() for t in gradients if t is not None]
        assert addresses and len(set(addresses)) == len(addresses)
        assert not set(addresses) & {t.untyped_storage().data_ptr() for t in others}

    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    given = [torch.randn_like(t) for t in outputs]
    found = torch.autograd.grad(outputs, leaves, given, create_graph=create_graph, allow_unused=True)
    assert_apart(found, (*given, *leaves, *outputs))
    if create_graph:
        loss = sum(g.square().sum() for g in found if g is not None)
        assert_apart(torch.autograd.grad(loss, leaves, allow_unused=True), leaves)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("row", segmented.pairwise(AXES), ids=lambda row: " ".join(map(str, row.values())))
def test_each_gradient_has_memory_of_its_own(row, create_graph, device):
    """A caller may scale one in place, and another must not change with it."""
    backend, options, H, call = row.values()
    case = segmented.Case(T=3, B=1, H=H, **OPTIONS[options], **CALLS[call])
    drawn = segmented.draw(case, device)
    drawn = replace(drawn, lengths=torch.tensor([0])) if call == "no steps" else drawn
    _assert_apart(segmented.function(case, drawn, backend), drawn.inputs, create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", AXES["backend"])
@operations("cell", "readout")
def test_each_gradient_of_a_step_has_memory_of_its_own(operation, backend, create_graph, device):
    _assert_apart(operation.by(backend), operation.draw(device)[0], create_graph)


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, order, dtype",
    [
        ({"bidirectional": True}, 1, torch.float32),
        ({"recompute": True}, 1, torch.float16),
        ({"proj_size": 2}, 1, torch.float32),
        ({"bidirectional": True}, 2, torch.float32),
        ({}, 2, torch.float16),
    ],
    ids=str,
)
def test_a_backward_under_autocast_is_that_of_the_forward(options, order, dtype, device):
    """Which ran outside: the products of the backward stay in its dtype."""
    lstm, results = LSTM(3, 4, backend="triton", dtype=dtype, device=device, **options), []
    x = torch.randn(4, 2, 3, dtype=dtype, device=device, requires_grad=True)
    leaves = [x, *lstm.parameters()]
    segments = {"resets": torch.rand(4, 2, device=device) < 0.3, "lengths": torch.tensor([4, 2], device=device)}
    for enabled in (False, True):
        gradients = lstm(x, **segments)[:1]
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            for k in range(order):
                cotangents = [g.detach() for g in gradients]
                gradients = torch.autograd.grad(gradients, leaves, cotangents, create_graph=k + 1 < order)
        results.append(gradients)
    assert all(map(torch.equal, *results))


def test_threads_do_not_disturb_each_others_precision():
    """As replicas of torch.nn.DataParallel would, and the threads in which autograd serves several GPUs."""
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
