"""A layer's outputs, states and every gradient against more than float64, on awkward shapes in every dtype and precision."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from support import layers
from support.aot import KINDS

from lstm_triton import functional
from lstm_triton.kernels import layer as sequence_layer
from lstm_triton.kernels import layer_backward

kinds = pytest.mark.parametrize("kind", KINDS)
directions = pytest.mark.parametrize("D", [1, 2])

# T, B, I, H. Tiles are 16, 32 or 64 rows, 8 to 128 units, and 16 to 256 of the inner dimension.
SMALL, ONES = (7, 3, 5, 19), (1, 1, 1, 1)
SMALL_IN = [(kind, 1 + n % 2) for n, kind in enumerate(KINDS)]  # each kind in one direction or in two
EDGES_OF_B = [(2, B, 3, 5) for B in (15, 16, 17, 63, 64, 65)]
EDGES_OF_H = [(2, 3, 5, H) for H in (15, 16, 17, 31, 33, 63, 64, 65)]
LARGE = [(3, 2, 7, 128), (2, 3, 130, 129), (2, 35, 3, 150)]


def _check(shape, kind, device, D=1, backend="triton", **options):
    dtype, precision = KINDS[kind]
    problem = layers.draw(*shape, D, dtype, precision=precision, device=device, **options)
    layers.assert_as_accurate_as_torch(layers.by_kernels(problem, backend), problem)


@pytest.mark.compiled
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "shape, kind, D",
    [*((SMALL, *kind_and_D) for kind_and_D in SMALL_IN), (ONES, "fp32", 2), (ONES, "bf16", 1)],
)
def test_small_shapes(shape, kind, D, scale, device):
    _check(shape, kind, device, D, scale=scale)


@pytest.mark.parametrize("shape, kind", list(zip(EDGES_OF_B, itertools.cycle(["fp32", "bf16"]))), ids=str)
def test_tile_edges_of_the_batch(shape, kind, device):
    _check(shape, kind, device)


@pytest.mark.parametrize("shape, kind", list(zip(EDGES_OF_H, itertools.cycle(["tf32", "bf16"]))), ids=str)
def test_tile_edges_of_the_hidden_size(shape, kind, device):
    _check(shape, kind, device, D=2 if shape[3] % 2 else 1)


@pytest.mark.compiled
@pytest.mark.long
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_layers(shape, device):
    _check(shape, "bf16", device)


@pytest.mark.slow
@kinds
@directions
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("backend", ["triton", "triton-stepwise"])
@pytest.mark.parametrize("shape", [SMALL, ONES, *EDGES_OF_B, *EDGES_OF_H, *LARGE], ids=str)
def test_full_product(shape, backend, scale, D, kind, device):
    _check(shape, kind, device, D, backend, scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tf32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 1030), (200, 3, 4, 9)], ids=str)
def test_wide_and_long(shape, kind, device):
    _check(shape, kind, device)


@directions
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_without_biases(kind, D, device):
    _check((4, 3, 5, 9), kind, device, D, bias=False)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp64"])
def test_batch_major_input(kind, device):
    """The outputs follow the memory order of the input: no copy where a module is batch-first."""
    dtype, precision = KINDS[kind]
    problem = layers.draw(5, 4, 3, 7, 2, dtype, precision=precision, device=device, batch_major=True, cells=True)
    results = layers.by_kernels(problem)
    layers.assert_as_accurate_as_torch(results, problem)
    named = dict(zip(problem.names, results))
    for name in ("y", "c", "dx"):
        assert named[name].transpose(0, 1).is_contiguous(), name


def test_no_initial_state_is_zeros(device):
    problem = layers.draw(4, 3, 5, 9, 2, device=device)
    zeros = torch.zeros_like(problem.hx[0])
    y, (h_n, c_n) = functional.lstm(problem.x, None, problem.weights, precision="ieee", backend="triton")
    found = layers.by_kernels(replace(problem, hx=(zeros, zeros)))
    assert all(map(torch.equal, (y, h_n, c_n), found))


def test_outputs_only_without_gradients(device):
    problem = layers.draw(4, 3, 5, 9, 2, cells=True, device=device)
    with torch.no_grad():
        y, (h_n, c_n), c = functional.lstm(
            problem.x, problem.hx, problem.weights, return_cell_states=True, precision="ieee", backend="triton"
        )
    assert all(map(torch.equal, (y, h_n, c_n, c), layers.by_kernels(problem)))


# ---- one launch or many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tf32", "bf16"])
@pytest.mark.parametrize("H", [5, 16, 19])
def test_one_launch_where_a_program_holds_all_units(kind, H, device, count_launches):
    dtype, precision = KINDS[kind]
    problem = layers.draw(5, 3, 4, H, 2, dtype, precision=precision, device=device)
    layers.by_kernels(problem, "triton-stepwise")
    assert count_launches() == {"_lstm_sequence_forward_kernel": 5, "_lstm_sequence_backward_kernel": 5}
    results = layers.by_kernels(problem, "triton-persistent")
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1, "_lstm_sequence_backward_kernel": 1}
    layers.assert_as_accurate_as_torch(results, problem)


@pytest.mark.compiled
@pytest.mark.parametrize("kind, H", [("fp32", 3), ("tf32x3", 8)])
def test_one_launch_in_full_float32_where_a_program_holds_all_units(kind, H, device, count_launches):
    """Elsewhere several programs exchange h, and hold W_hh in registers."""
    dtype, precision = KINDS[kind]
    problem = layers.draw(4, 3, 4, H, 1, dtype, precision=precision, device=device)
    results = layers.by_kernels(problem, "triton-persistent")
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1, "_lstm_sequence_backward_kernel": 1}
    layers.assert_as_accurate_as_torch(results, problem)


def _without_results(dtype, T, B, H, backend, monkeypatch):
    """A layer that is planned as on a GPU and launches nothing: the error of its backend, or None."""
    from lstm_triton.kernels import interpreter, launch

    monkeypatch.setattr(launch.Launcher, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    problem = layers.draw(T, B, 1, H, 1, dtype)
    try:
        functional.lstm(problem.x, problem.hx, [w.requires_grad_() for w in problem.weights], backend=backend)
    except RuntimeError as error:
        return str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sizes are for an H100")
def test_one_launch_is_asked_for_in_both_ways(monkeypatch):
    """The backward has four times the inner dimension, and does not fit where the forward does."""
    persistent = (torch.bfloat16, 2, 192, 1536, "triton-persistent", monkeypatch)
    assert "H = 1536, B = 192, 1 direction(s)" in (error := _without_results(*persistent))
    assert error.endswith("in the backward")
    with torch.no_grad():
        assert _without_results(*persistent) is None
    assert _without_results(torch.bfloat16, 1, 192, 1536, *persistent[4:]) is None, "one step is one launch"
    assert _without_results(torch.bfloat16, 2, 64, 512, *persistent[4:]) is None
    assert _without_results(*persistent[:4], "triton", monkeypatch) is None
    assert _without_results(torch.float64, 2, 1, 512, *persistent[4:]).endswith("in the forward")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there its programs can wait")
def test_the_interpreter_cannot_wait(count_launches):
    problem = layers.draw(3, 2, 4, 96, 1, torch.float32, precision="tf32")
    with pytest.raises(RuntimeError, match="one would have to wait for another in the backward"):
        layers.by_kernels(problem, "triton-persistent")
    with torch.no_grad():
        functional.lstm(problem.x, problem.hx, problem.weights, backend="triton-persistent", precision="tf32")
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1}


@directions
def test_a_sequence_equals_its_parts_with_the_state_carried(D, device):
    """Forward for one direction; the reverse one carries its state the other way."""
    problem = layers.draw(7, 3, 5, 9, D, torch.float64, device=device)
    leaves = [t.detach().requires_grad_() for t in problem.inputs]
    x, h0, c0, *weights = leaves
    n = len(weights) // D

    def run(x, h, c, d):
        y, state = functional.lstm(x, (h, c), weights[d * n : (d + 1) * n], backend="triton")
        return y, *state

    ys, states = [], []
    for d in range(D):

        def flip(t, d=d):
            return t.flip(0) if d else t

        first, h, c = run(flip(x)[:3], h0[d : d + 1], c0[d : d + 1], d)
        second, h, c = run(flip(x)[3:], h, c, d)
        ys.append(flip(torch.cat([first, second])))
        states.append((h, c))
    outputs = [torch.cat(ys, 2), *(torch.cat(s) for s in zip(*states))]
    found = [*outputs, *torch.autograd.grad(outputs, leaves, problem.cotangents)]
    layers.assert_close(found, layers.by_kernels(problem), problem, ulps=32)


# ---- what must not spread --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h0", "reset_h"])
@pytest.mark.parametrize("kind", ["tf32", "bf16"])
def test_an_infinite_state_only_saturates_gates(kind, name, device):
    """Also where rows are padded for one launch, and infinity times the padding's zeros would be NaN."""
    dtype, precision = KINDS[kind]
    problem = layers.draw(
        4, 5, 3, 6, 2, dtype, precision=precision, device=device, cells=True, resets=True, reset_state="stored"
    )
    tensors = [t.clone() for t in (*problem.inputs, *problem.cotangents)]
    tensors[1 if name == "h0" else 3 + len(problem.weights)][..., 2] = torch.inf
    problem = problem.with_tensors(tensors)
    in_one, by_steps = (layers.by_kernels(problem, backend) for backend in ("triton", "triton-stepwise"))
    for result, found, expected in list(zip(problem.names, in_one, by_steps))[:4]:
        assert expected.isfinite().all(), result
        torch.testing.assert_close(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_cells_beyond_the_overflow_of_a_naive_tanh(kind, device):
    """With i = f = g = 1 the cells grow by one a step: beyond 45, exp(-2c) and exp(2c) leave float32 on either side."""
    dtype, precision = KINDS[kind]
    problem = layers.draw(50, 2, 3, 5, dtype=dtype, precision=precision, device=device)
    problem.weights[1][:15] = 0
    problem.weights[2][:15] = 30
    problem.weights[2][10:12] = -30.0  # and two of the units downwards
    results = layers.by_kernels(problem)
    layers.assert_as_accurate_as_torch(results, problem)
    c_n = results[2]
    assert c_n.max() > 45 and c_n.min() < -45


@pytest.mark.parametrize("options", [{}, dict(resets=True, reset_state="stored", lengths=True, cells=True)])
def test_offsets_of_64_bits_give_the_same(options, device, monkeypatch):
    """Those within one step take them where a step's tensors have 2**31 elements or more, too many for a test."""
    problem = layers.draw(3, 17, 4, 19, 2, batch_major=True, precision="tf32", device=device, **options)
    expected = layers.by_kernels(problem)
    assert all(layer.index_type(problem.x) == tl.int32 for layer in (sequence_layer, layer_backward))
    for layer in (sequence_layer, layer_backward):
        monkeypatch.setattr(layer, "index_type", lambda *tensors: tl.int64)
    assert all(map(torch.equal, layers.by_kernels(problem), expected))


def test_64_bits_are_taken_where_a_step_is_so_large():
    narrow = torch.empty(1).expand(2, 3, 5)
    assert sequence_layer.index_type(narrow, None) == tl.int32
    # The last element is 2 strides + 4 from the first.
    for stride, wanted in ((2**30 - 3, tl.int32), (2**30 - 2, tl.int64)):
        step = torch.empty(0, device="meta").as_strided((2, 3, 5), (1, stride, 1))
        assert sequence_layer.index_type(narrow, step) == wanted


def test_drawn_weights_have_the_scale_of_torchs():
    """So that the comparisons above are of typical layers."""
    weights = layers.draw(1, 1, 40, 50).weights
    assert weights[0].shape == (200, 40)
    assert weights[1].std().item() == pytest.approx(1 / math.sqrt(50), rel=0.05)
