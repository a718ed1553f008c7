"""A layer's outputs, states and every gradient against more than float64, on awkward shapes in every dtype and precision."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from support import layers
from support.aot import KINDS

from lstm_triton import functional
from lstm_triton.kernels import layer as sequence_layer
from lstm_triton.kernels import layer_backward

# T, B, I, H. Tiles are 16, 32 or 64 rows, 8 to 128 units, and 16 to 256 of the inner dimension.
SMALL, ONES = (7, 3, 5, 19), (1, 1, 1, 1)
EDGES = [(2, B, 3, 5) for B in (15, 16, 17, 63, 64, 65)] + [(2, 3, 5, H) for H in (15, 16, 17, 31, 33, 63, 64, 65)]
LARGE = [(3, 2, 7, 128), (2, 3, 130, 129), (2, 35, 3, 150)]
SEGMENTS = {
    "plain": {},
    "resets": dict(resets=True),
    "resets to one state": dict(resets=True, reset_state="shared"),
    "lengths": dict(lengths=True),
    "everything": dict(resets=True, reset_state="stored", lengths=True, cells=True),
}
SMALL_IN = [(kind, 1 + n % 2) for n, kind in enumerate(KINDS)]  # each kind in one direction or in two


def _draw(shape, kind, device, D=1, **options):
    dtype, precision = KINDS[kind]
    return layers.draw(*shape, D, dtype, precision=precision, device=device, **options)


def _check(shape, kind, device, D=1, backend="triton", **options):
    problem = _draw(shape, kind, device, D, **options)
    layers.assert_as_accurate_as_torch(layers.by_kernels(problem, backend), problem)


@pytest.mark.compiled
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "shape, kind, D",
    [*((SMALL, *kind_and_D) for kind_and_D in SMALL_IN), (ONES, "fp32", 2), (ONES, "bf16", 1)],
)
def test_small_shapes(shape, kind, D, scale, device):
    _check(shape, kind, device, D, scale=scale)


@pytest.mark.parametrize("number, shape", [*enumerate(EDGES)], ids=str)
def test_tile_edges(number, shape, device):
    _check(shape, ("tf32", "bf16", "fp32")[number % 3], device, D=1 + number % 2)


@pytest.mark.compiled
@pytest.mark.long
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_layers(shape, device):
    _check(shape, "bf16", device)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D, scale", [(1, 4.0), (2, 1.0)])
@pytest.mark.parametrize("backend", ["triton", "triton-stepwise"])
@pytest.mark.parametrize(
    "shape, segments",
    [
        *((shape, "plain") for shape in (ONES, *EDGES, *LARGE)),
        *((shape, segments) for shape in (SMALL, (9, 18, 3, 33)) for segments in SEGMENTS),
    ],
    ids=str,
)
def test_full_product(shape, segments, backend, D, scale, kind, device):
    _check(shape, kind, device, D, backend, scale=scale, **SEGMENTS[segments])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tf32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 1030), (200, 3, 4, 9)], ids=str)
def test_wide_and_long(shape, kind, device):
    _check(shape, kind, device)


def test_outputs_follow_the_memory_order_of_the_input(device):
    """No copy where a module is batch-first. test_compiled_waiting judges the values."""
    problem = _draw((5, 4, 3, 7), "fp32", device, D=2, batch_major=True, cells=True)
    named = dict(zip(problem.names, layers.by_kernels(problem)))
    for name in ("y", "c", "dx"):
        assert named[name].transpose(0, 1).is_contiguous(), name


# ---- one launch or many ----------------------------------------------------------------------------------------------


full_float32 = pytest.mark.compiled  # elsewhere several programs exchange h, and hold W_hh in registers


@pytest.mark.parametrize(
    "kind, H",
    [
        ("tf32", 19),
        ("bf16", 16),
        pytest.param("fp32", 3, marks=full_float32),
        pytest.param("tf32x3", 8, marks=full_float32),
    ],
)
def test_one_launch_where_a_program_holds_all_units(kind, H, device, count_launches):
    problem = _draw((4, 3, 4, H), kind, device)
    results = layers.by_kernels(problem, "triton-persistent")
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1, "_lstm_sequence_backward_kernel": 1}
    layers.assert_as_accurate_as_torch(results, problem)


def _without_results(dtype, T, B, H, backend, monkeypatch):
    """A layer that is planned as on a GPU and launches nothing: the error of its backend, or None."""
    from lstm_triton.kernels import interpreter, launch

    monkeypatch.setattr(launch.Launcher, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    weights = [torch.zeros(4 * H, n, dtype=dtype, requires_grad=True) for n in (1, H)]
    try:
        functional.lstm(torch.zeros(T, B, 1, dtype=dtype), None, weights, backend=backend)
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


# ---- what must not spread --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, name", [("tf32", "h0"), ("bf16", "reset_h")])
def test_an_infinite_state_only_saturates_gates(kind, name, device):
    """Also where rows are padded for one launch, and infinity times the padding's zeros would be NaN."""
    problem = _draw((4, 5, 3, 6), kind, device, D=2, cells=True, resets=True, reset_state="stored")
    tensors = [t.clone() for t in (*problem.inputs, *problem.cotangents)]
    tensors[1 if name == "h0" else 3 + len(problem.weights)][..., 2] = torch.inf
    problem = problem.with_tensors(tensors)
    in_one, by_steps = (layers.by_kernels(problem, backend) for backend in ("triton", "triton-stepwise"))
    for result, found, expected in list(zip(problem.names, in_one, by_steps))[:4]:
        assert expected.isfinite().all(), result
        torch.testing.assert_close(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("value, batch_major, recompute", [(torch.nan, False, False), (torch.inf, True, True)])
def test_nothing_past_the_end_of_a_row_matters(value, batch_major, recompute, device):
    """Neither input, nor reset state, nor gradient of an output; nor, to a product, the state of a row without steps."""
    problem = layers.draw(6, 4, 3, 5, 2, device=device, batch_major=batch_major, **SEGMENTS["everything"])
    problem = replace(problem, reset_state=tuple(s.expand(6, 2, 4, 5).contiguous() for s in problem.reset_state))
    past = (torch.arange(6, device=device)[:, None] >= problem.lengths)[..., None]
    empty = (problem.lengths == 0)[:, None]
    spoilt = [problem.x.clone().masked_fill_(past, value), *(torch.where(empty, value, s) for s in problem.hx)]
    spoilt += [*problem.weights, *(torch.where(past[:, None], value, s) for s in problem.reset_state)]
    spoilt += [torch.where(past, value, g) if g.shape[0] == 6 else g for g in problem.cotangents]
    spoilt = problem.with_tensors(spoilt)
    expected = layers.by_kernels(problem, recompute=recompute)
    found = layers.by_kernels(spoilt, recompute=recompute)
    for name, result, wanted in zip(problem.names, found, expected, strict=True):
        if name in ("h_n", "c_n"):  # a row without steps ends where it begins
            result, wanted = (torch.where(empty, 0, t) for t in (result, wanted))
        assert torch.equal(result, wanted), name
    assert not torch.where(past, found[problem.names.index("dx")], 0).any()


def test_offsets_of_64_bits_give_the_same(device, monkeypatch):
    """Those within one step take them where a step's tensors have 2**31 elements or more, too many for a test."""
    problem = _draw((3, 17, 4, 19), "tf32", device, D=2, batch_major=True, **SEGMENTS["everything"])
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
