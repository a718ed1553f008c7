"""The fused readout, forward and every gradient, against float64 on awkward shapes in every dtype and precision."""

import pytest
import torch
from support import readouts
from support.aot import KINDS

from lstm_triton import functional, reference
from lstm_triton.kernels import config as configs
from lstm_triton.kernels import readout, readout_backward, readout_sums

# B, H, V. Logits are in tiles of 16 to 128 rows and 32 to 128 columns, and H goes by 16 to 64; 130 takes several tiles.
SMALL, ONES, SEVERAL_TILES = (3, 19, 37), (1, 1, 1), (2, 5, 130)
EDGES = [(17, 3, 5), (16, 17, 31), (15, 16, 33), (1, 65, 64), (2, 64, 65), (2, 15, 128), (1, 2, 129)]
# Enough columns, or enough rows, that a sum over them is divided among programs in every dtype; in fp32, fewer suffice.
LONG_SUMS = [(3, 5, 530), (520, 3, 5)]
LONG_SUMS_FP32 = [(2, 5, 260), (115, 3, 5)]


def _draw(shape, kind, device, **options):
    dtype, precision = KINDS[kind]
    return readouts.draw(*shape, dtype, precision=precision, device=device, **options)


def _check(shape, kind, device, **options):
    problem = _draw(shape, kind, device, **options)
    y, *_ = results = readouts.by_kernels(problem)
    readouts.assert_as_accurate_as_torch(results, problem)
    assert (y >= 0).all()
    assert ((y.double().sum(-1) - 1).abs() <= 2 * torch.finfo(y.dtype).eps).all()


@pytest.mark.compiled
@pytest.mark.parametrize(
    "shape, kind, scale",
    [
        *((SMALL, kind, 1.0) for kind in KINDS),
        *((shape, kind, scale) for shape, scale in ((ONES, 1.0), (SEVERAL_TILES, 4.0)) for kind in ("fp32", "bf16")),
    ],
)
def test_small_shapes(shape, kind, scale, device):
    """With scale 4 the softmax is steep."""
    _check(shape, kind, device, scale=scale)


@pytest.mark.parametrize("number, shape", [*enumerate(EDGES)], ids=str)
def test_tile_edges(number, shape, device):
    _check(shape, ("fp32", "bf16")[number % 2], device, bias=number % 3 > 0)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_tiles_of_a_gpu_with_few_multiprocessors(kind, device, multiprocessors):
    multiprocessors(1)
    _check((20, 9, 140), kind, device)


def test_more_rows_of_tiles_than_one_group(device, multiprocessors):
    multiprocessors(1)
    h, weight, bias = readouts.draw(130, 2, 70, device=device).inputs
    assert configs.readout_forward_config(130, 70, h.dtype, "tf32x3", 1).group * 16 < 130
    y = functional.softmax_readout(h, weight, bias, precision="tf32x3", backend="triton")
    torch.testing.assert_close(y, reference.softmax_readout(h, weight, bias))


@pytest.mark.compiled
@pytest.mark.parametrize(
    "shape, kind", [(shape, "fp32") for shape in LONG_SUMS_FP32] + [(LONG_SUMS[0], "bf16")], ids=str
)
def test_sums_divided_among_programs(shape, kind, device, count_launches):
    _check(shape, kind, device)
    assert count_launches()["_readout_sum_parts_kernel"] == 1


@pytest.mark.parametrize("processors", [1, 132])
def test_rows_longer_than_one_step(processors, device, multiprocessors, monkeypatch):
    """Statistics, dots and parts of sums that take several steps: with small steps, or V would have to be large."""
    multiprocessors(processors)
    monkeypatch.setattr(readout, "readout_rescale_config", lambda *_: configs.ReadoutRescaleConfig(1, 1, 2, 2))
    for name, size in (("_BLOCK_V", 16), ("_BLOCK", 16), ("_BLOCK_PARTS", 1)):
        monkeypatch.setattr(readout_sums, name, size)
    _check((2, 3, 300), "fp32", device)
    rising = 10.0 * torch.arange(300, device=device)
    torch.testing.assert_close(_of_logits(rising), torch.softmax(rising, -1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processors, scale", [(1, 4.0), (132, 1.0)])
@pytest.mark.parametrize("shape", [ONES, SEVERAL_TILES, (70, 40, 300), *EDGES, *LONG_SUMS], ids=str)
def test_full_product(shape, processors, scale, kind, device, multiprocessors):
    multiprocessors(processors)
    _check(shape, kind, device, scale=scale)


def _of_logits(logits):
    """The readout whose logits, [V], are the bias alone."""
    V = len(logits)
    return functional.softmax_readout(logits.new_zeros(1), logits.new_zeros(V, 1), logits, backend="triton")


LIMITS = {
    "huge": [3e38, -3e38, 2.9e38, 0.0],
    "all huge": [3e38, 3e38],
    "far below zero": [-1e30, -1e30],
    "minus infinity": [-torch.inf, 1.0, -torch.inf, 2.0],
    "a row of minus infinity": [-torch.inf],
    "infinity": [1.0, torch.inf, 2.0],
    "infinity and minus infinity": [torch.inf, -torch.inf],
    "tiles of minus infinity": [-torch.inf] * 130 + [1.0, 2.0, 3.0] + [-torch.inf] * 20,
    "NaN": [1.0, torch.nan, 2.0],
    "nothing but NaN": [torch.nan],
}


@pytest.mark.parametrize("V", [40, 150], ids=["one tile", "tiles"])
@pytest.mark.parametrize("values", LIMITS.values(), ids=LIMITS)
def test_extreme_logits_are_treated_as_by_torch(values, V, device):
    logits = torch.tensor(values * V, device=device)[:V]
    torch.testing.assert_close(_of_logits(logits), torch.softmax(logits, -1), equal_nan=True)


def test_masked_columns_get_no_gradient(device):
    clean = readouts.draw(2, 5, 150, device=device)
    problem = clean.with_tensors([t.clone() for t in clean.tensors])
    problem.inputs[2][60:140] = -torch.inf
    found = readouts.by_kernels(problem)
    for name, result, torchs in zip(readouts.RESULTS, found, readouts.by_torch(problem)):
        torch.testing.assert_close(result, torchs, msg=lambda text, name=name: f"{name}: {text}")
    assert not found[2][60:140].any() and not found[3][60:140].any()


FORWARD = {"_readout_forward_kernel": 1}
BACKWARD = {"_readout_row_dots_kernel": 1, "_readout_backward_kernel": 1}
RESCALED, IN_PARTS = FORWARD | {"_readout_rescale_kernel": 1}, BACKWARD | {"_readout_sum_parts_kernel": 1}


@pytest.mark.parametrize(
    "shape, needs, forward, backward",
    [
        ((3, 7, 37), (1, 1, 1), FORWARD, BACKWARD),
        ((3, 7, 37), (0, 1, 0), FORWARD, BACKWARD),
        ((3, 7, 130), (1, 1, 1), RESCALED, BACKWARD),
        ((2, 7, 260), (1, 1, 1), RESCALED, IN_PARTS),
        ((2, 7, 260), (1, 0, 1), RESCALED, IN_PARTS),
    ],
    ids=str,
)
def test_launches_compute_what_is_needed(shape, needs, forward, backward, device, monkeypatch, count_launches):
    problem, outputs = readouts.draw(*shape, device=device), []
    expected = [g for g, n in zip(readouts.by_kernels(problem)[1:], needs) if n]
    launch = readout_backward._backward

    def noting(grid, config, arguments):
        outputs.append(tuple(arguments[name] is not None for name in ("dh_ptr", "dweight_ptr", "dbias_ptr")))
        launch(grid, config, arguments)

    monkeypatch.setattr(readout_backward, "_backward", noting)
    count_launches()
    leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip(problem.inputs, needs)]
    y = functional.softmax_readout(*leaves, backend="triton")
    assert count_launches() == forward
    found = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], problem.cotangents)
    assert count_launches() == backward and outputs == [needs]
    torch.testing.assert_close(list(found), expected)
