"""The fused cell, forward and every gradient, against float64 on awkward shapes in every dtype and precision."""

import itertools

import pytest
import torch
from support import cells
from support.layouts import LAYOUTS

from lstm_triton.functional import lstm_cell

KINDS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp64": (torch.float64, "ieee"),
}
kinds = pytest.mark.parametrize("kind", KINDS)

# B, I, H. Tiles are 16, 32 or 64 rows, 4, 8 or 16 units, and 16, 32 or 64 of the inner dimension.
SMALL, ONES, NO_INPUTS = (3, 7, 19), (1, 1, 1), (2, 0, 5)
EDGES_16 = [(15, 17, 16), (16, 15, 17), (17, 16, 15)]
EDGES_64 = [(63, 65, 3), (64, 63, 5), (65, 64, 2)]
EDGES_64_OF_H = [(2, 3, 63), (2, 33, 64), (1, 2, 65)]


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


@pytest.mark.long
@pytest.mark.parametrize("scale", [0.1, 0.01])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp64"])
def test_values_near_zero(kind, scale, device):
    """States that begin at zero: a tanh with no more than absolute accuracy shows here."""
    _check((3, 7, 19), kind, device, scale=scale)


@pytest.mark.parametrize("shape, kind", list(zip(EDGES_16 + EDGES_64, itertools.cycle(["fp32", "bf16"]))), ids=str)
def test_tile_edges(shape, kind, device):
    _check(shape, kind, device)


@pytest.mark.parametrize("shape", EDGES_64_OF_H, ids=str)
def test_tile_edges_of_the_hidden_size(shape, device):
    _check(shape, "bf16", device)


@pytest.mark.long
@kinds
def test_the_tiles_of_a_gpu_with_few_multiprocessors(kind, device, multiprocessors):
    multiprocessors(1)
    _check((17, 18, 19), kind, device)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("shape", [ONES, NO_INPUTS, (33, 40, 50), *EDGES_16, *EDGES_64, *EDGES_64_OF_H], ids=str)
def test_full_product(shape, processors, scale, kind, device, multiprocessors):
    multiprocessors(processors)
    _check(shape, kind, device, scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 24, 1030), (300, 5, 20), (2, 1500, 8)], ids=str)
def test_large_shapes(shape, kind, device):
    _check(shape, kind, device)


def test_saturation_reaches_beyond_the_overflow_of_a_naive_tanh():
    assert cells.draw(3, 7, 19, scale=4.0).inputs[2].abs().max() > 45


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)], ids=["none", "b_ih", "b_hh"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_biases_may_be_missing(kind, biases, device):
    _check((3, 7, 9), kind, device, biases=biases)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_any_strides(kind, layout, device):
    dtype, precision = KINDS[kind]
    change = LAYOUTS[layout]
    dense = cells.draw(3, 7, 9, dtype, precision=precision, device=device)
    laid_out = cells.Problem(
        tuple(change(t) for t in dense.inputs), tuple(change(t) for t in dense.cotangents), precision
    )
    results = cells.by_kernels(laid_out)
    cells.assert_as_accurate_as_torch(results, laid_out)
    assert all(t.is_contiguous() for t in results)


@pytest.mark.long
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_64_bit_offsets(along, device, tmp_path):
    """Rows 2^29 elements apart, eight of them, or columns 2^25 apart, 66 of them: no such offset fits in 32 bits."""
    B, I, H = (8, 3, 2) if along == "rows" else (2, 66, 2)
    size = 2**32
    if device.type == "cuda":
        storage = torch.empty(size, dtype=torch.float16, device=device)
    else:  # a sparse file: only what is touched takes space
        storage = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.float16)
    near = cells.draw(B, I, H, torch.float16, device=device)
    first = iter(range(0, 2**20, 2**10))

    def far(t):
        strides = (2**29, 1)[: t.dim()] if along == "rows" else (1, 2**25)[-t.dim() :]
        return storage.as_strided(t.shape, strides, next(first)).copy_(t)

    inputs, cotangents = tuple(map(far, near.inputs)), tuple(map(far, near.cotangents))
    for expected, found in zip(cells.by_kernels(near), cells.by_kernels(cells.Problem(inputs, cotangents))):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["x", "h", "c"])
def test_non_finite_values_stay_in_their_row(name, value, device):
    clean = cells.draw(5, 7, 6, device=device)
    spoilt = cells.Problem(tuple(t.clone() for t in clean.inputs), clean.cotangents)
    row = 3
    spoilt.inputs[cells.INPUTS.index(name)][row, 2] = value
    others = [b for b in range(5) if b != row]
    expected = cells.by_torch(spoilt)
    for result, good, torchs, found in zip(cells.RESULTS, cells.by_kernels(clean), expected, cells.by_kernels(spoilt)):
        if result in ("h", "c", "dx", "dh", "dc"):
            assert torch.equal(found[others], good[others]), result
        assert torch.equal(found.isnan(), torchs.isnan()), result
        assert torch.equal(found.isinf(), torchs.isinf()), result


def test_a_weight_row_of_nan_stays_in_its_unit(device):
    clean = cells.draw(3, 7, 19, device=device)
    spoilt = cells.Problem(tuple(t.clone() for t in clean.inputs), clean.cotangents)
    unit = 17
    spoilt.inputs[3][19 + unit] = torch.nan  # its forget gate
    others = [j for j in range(19) if j != unit]
    for good, found in zip(cells.by_kernels(clean)[:2], cells.by_kernels(spoilt)[:2]):
        assert torch.equal(found[:, others], good[:, others])
        assert found[:, unit].isnan().all()


def test_nan_gradients_stay_in_their_row(device):
    clean = cells.draw(5, 7, 6, device=device)
    cotangents = tuple(t.clone() for t in clean.cotangents)
    cotangents[0][3] = torch.nan
    spoilt = cells.Problem(clean.inputs, cotangents)
    for good, found in list(zip(cells.by_kernels(clean), cells.by_kernels(spoilt)))[2:5]:
        assert torch.equal(found[[0, 1, 2, 4]], good[[0, 1, 2, 4]])
        assert found[3].isnan().all()


@pytest.mark.parametrize("shape", [(0, 7, 5), (3, 7, 0), (0, 0, 0)], ids=str)
def test_empty(shape, device):
    problem = cells.draw(*shape, device=device)
    for name, found, expected in zip(cells.RESULTS, cells.by_kernels(problem), cells.by_torch(problem)):
        assert found.shape == expected.shape and torch.equal(found, torch.zeros_like(expected)), name


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16"])
def test_two_runs_agree_bit_for_bit(kind, device):
    dtype, precision = KINDS[kind]
    problem = cells.draw(*SMALL, dtype, precision=precision, device=device)
    for name, first, second in zip(cells.RESULTS, cells.by_kernels(problem), cells.by_kernels(problem)):
        assert torch.equal(first, second), name


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


def test_inputs_are_left_alone(device):
    problem = cells.draw(3, 7, 9, device=device)
    before = [t.clone() for t in (*problem.inputs, *problem.cotangents)]
    cells.by_kernels(problem)
    assert all(map(torch.equal, before, (*problem.inputs, *problem.cotangents)))


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_default_precision_is_that_of_torch_matmul(setting, device):
    x, h, c, *weights = cells.draw(3, 33, 9, device=device).inputs
    forced = {p: lstm_cell(x, (h, c), *weights, precision=p, backend="triton") for p in ("ieee", "tf32")}
    assert not torch.equal(forced["ieee"][0], forced["tf32"][0])
    with cells.matmul_precision(setting):
        found = lstm_cell(x, (h, c), *weights, backend="triton")
    assert all(map(torch.equal, found, forced[setting]))
