"""The fused cell, forward and every gradient, against float64 on awkward shapes in every dtype and precision."""

import pytest
import torch
from support import cells
from support.aot import KINDS

from lstm_triton.functional import lstm_cell

# B, I, H. Tiles are 16, 32 or 64 rows, 4, 8 or 16 units, and 16, 32 or 64 of the inner dimension.
SMALL, ONES, NO_INPUTS = (3, 7, 19), (1, 1, 1), (2, 0, 5)
EDGES = [(15, 17, 16), (16, 15, 17), (17, 16, 15), (63, 65, 3), (64, 63, 5), (65, 64, 2)]
EDGES += [(2, 3, 63), (2, 33, 64), (1, 2, 65)]
LARGE = [(2, 24, 1030), (300, 5, 20), (2, 1500, 8)]


def _check(shape, kind, device, **options):
    dtype, precision = KINDS[kind]
    problem = cells.draw(*shape, dtype, precision=precision, device=device, **options)
    cells.assert_as_accurate_as_torch(cells.by_kernels(problem), problem)


@pytest.mark.compiled
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "shape, kind",
    [*((SMALL, kind) for kind in KINDS), (ONES, "fp32"), (ONES, "bf16"), (NO_INPUTS, "fp32"), (NO_INPUTS, "bf16")],
)
def test_small_shapes(shape, kind, scale, device):
    _check(shape, kind, device, scale=scale)


@pytest.mark.parametrize("number, shape", [*enumerate(EDGES)], ids=str)
def test_tile_edges(number, shape, device):
    _check(shape, ("fp32", "bf16")[number % 2], device)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_tiles_of_a_gpu_with_few_multiprocessors(kind, device, multiprocessors):
    multiprocessors(1)
    _check((17, 18, 19), kind, device)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processors, scale", [(1, 4.0), (132, 1.0), (132, 0.01)])
@pytest.mark.parametrize("shape", [ONES, NO_INPUTS, (33, 40, 50), *EDGES], ids=str)
def test_full_product(shape, processors, scale, kind, device, multiprocessors):
    multiprocessors(processors)
    _check(shape, kind, device, scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_shapes(shape, kind, device):
    _check(shape, kind, device)


def test_saturation_reaches_beyond_the_overflow_of_a_naive_tanh():
    assert cells.draw(3, 7, 19, scale=4.0).inputs[2].abs().max() > 45


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)], ids=["none", "b_ih", "b_hh"])
def test_biases_may_be_missing(biases, device):
    _check((3, 7, 9), "bf16", device, biases=biases)


def test_a_weight_row_of_nan_stays_in_its_unit(device):
    clean = cells.draw(3, 7, 19, device=device)
    spoilt = clean.with_tensors([t.clone() for t in clean.tensors])
    unit = 17
    spoilt.inputs[3][19 + unit] = torch.nan  # its forget gate
    others = [j for j in range(19) if j != unit]
    for good, found in zip(cells.by_kernels(clean)[:2], cells.by_kernels(spoilt)[:2]):
        assert torch.equal(found[:, others], good[:, others])
        assert found[:, unit].isnan().all()


@pytest.mark.compiled
@pytest.mark.parametrize("wanted", [("x", "w_hh"), ("h", "w_ih"), ("x", "h", "w_ih")], ids=", ".join)
def test_gradients_are_the_same_without_the_others(wanted, device):
    problem = cells.draw(*SMALL, device=device)
    x, h, c, *weights = (
        t.requires_grad_(name in wanted)
        for name, t in zip(("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh"), problem.inputs)
    )
    needed = [t for t in (x, h, *weights) if t.requires_grad]
    some = torch.autograd.grad(lstm_cell(x, (h, c), *weights, backend="triton"), needed, problem.cotangents)
    every = dict(zip(cells.RESULTS[2:], cells.by_kernels(problem)[2:]))
    assert len(some) == len(wanted)
    assert all(torch.equal(found, every[f"d{name}"]) for name, found in zip(wanted, some)), list(every)
