"""The kernels of cell and readout, forward and every gradient, against float64 on awkward shapes in every dtype and precision;
and what holds for those of a layer as well, whatever they compute."""

import itertools

import pytest
import torch
from support import layers
from support.aot import KINDS
from support.layouts import LAYOUTS
from support.problems import cells, readouts

from lstm_triton.kernels.device import fp32_precision

NAMES = {"cells": cells, "readouts": readouts, "layers": layers}
SEGMENTS = dict(resets=True, reset_state="stored", lengths=True, cells=True)


def _draw(of, shape, kind="fp32", **options):
    dtype, precision = KINDS[kind]
    options = {"D": 2, **options} if of is layers else options
    return of.draw(*shape, dtype=dtype, precision=precision, **options)


def _cases(**shapes):
    """Each of the three with its shape."""
    cases = [pytest.param(NAMES[name], shape, id=f"{name}, {shape}") for name in shapes for shape in shapes[name]]
    return pytest.mark.parametrize("of, shape", cases)


# ---- accuracy of a step ----------------------------------------------------------------------------------------------

# Of the cell B, I, H: tiles are 16, 32 or 64 rows, 4, 8 or 16 units, and 16, 32 or 64 of the inner dimension. Of the readout
# B, H, V: logits are in tiles of 16 to 128 rows and 32 to 128 columns, and H goes by 16 to 64; 130 takes several tiles.
SMALL = {"cells": (3, 7, 19), "readouts": (3, 19, 37)}
OTHERS = {"cells": [(1, 1, 1), (2, 0, 5)], "readouts": [(1, 1, 1), (2, 5, 130)]}
EDGES = {
    "cells": [(15, 17, 16), (16, 15, 17), (17, 16, 15), (63, 65, 3), (64, 63, 5), (65, 64, 2)]
    + [(2, 3, 63), (2, 33, 64), (1, 2, 65)],
    "readouts": [(17, 3, 5), (16, 17, 31), (15, 16, 33), (1, 65, 64), (2, 64, 65), (2, 15, 128), (1, 2, 129)],
}
# Enough columns, or enough rows, that a sum over them is divided among programs; in 16 bits it takes more.
LONG_SUMS = [((2, 5, 260), "fp32"), ((115, 3, 5), "fp32"), ((3, 5, 530), "bf16")]
MEDIUM = {"cells": [(33, 40, 50)], "readouts": [(70, 40, 300), (520, 3, 5), (3, 5, 530)]}
LARGE = [(2, 24, 1030), (300, 5, 20), (2, 1500, 8)]


def _check(of, shape, kind, device, **options):
    """With scale 4 gates are saturated and the softmax is steep."""
    problem = _draw(of, shape, kind, device=device, **options)
    y, *_ = results = of.by_kernels(problem)
    of.assert_as_accurate_as_torch(results, problem)
    if of is readouts and shape[2]:
        assert (y >= 0).all()
        assert ((y.double().sum(-1) - 1).abs() <= 2 * torch.finfo(y.dtype).eps).all()


@pytest.mark.compiled
@pytest.mark.parametrize(
    "name, shape, kind, scale",
    [
        *(("cells", SMALL["cells"], kind, scale) for kind in KINDS for scale in (1.0, 4.0)),
        *(("readouts", SMALL["readouts"], kind, 1.0) for kind in KINDS),
        *(
            (name, shape, kind, 1.0 if shape == (1, 1, 1) else 4.0)
            for name in OTHERS
            for shape in OTHERS[name]
            for kind in ("fp32", "bf16")
        ),
        *(("readouts", *case, 1.0) for case in LONG_SUMS),
    ],
)
def test_small_steps(name, shape, kind, scale, device, count_launches):
    _check(NAMES[name], shape, kind, device, scale=scale)
    assert ("_readout_sum_parts_kernel" in count_launches()) == ((shape, kind) in LONG_SUMS)


@pytest.mark.parametrize(
    "name, shape, kind, options",
    [
        *((name, shape, "fp32", {}) for name in EDGES for shape in EDGES[name][::2]),
        *((name, shape, "bf16", {}) for name in EDGES for shape in EDGES[name][1::2]),
        *(("cells", (3, 7, 9), "bf16", {"biases": both}) for both in ((False, False), (True, False), (False, True))),
        *(("readouts", shape, kind, {"bias": False}) for shape, kind in (((17, 3, 5), "fp32"), ((1, 65, 64), "bf16"))),
        *(("cells", shape, "fp32", {}) for shape in ((0, 7, 5), (3, 7, 0), (0, 0, 0))),
        *(("readouts", shape, "fp32", {}) for shape in ((0, 7, 5), (0, 7, 200), (3, 0, 5), (3, 7, 0))),
    ],
    ids=str,
)
def test_edges_of_tiles_and_empty_steps(name, shape, kind, options, device):
    _check(NAMES[name], shape, kind, device, **options)


@pytest.mark.parametrize(
    "name, shape, kind, processors, scale",
    [
        *(pytest.param("cells", (17, 18, 19), kind, 1, 1.0, marks=pytest.mark.long) for kind in KINDS),
        *(("readouts", (20, 9, 140), kind, 1, 1.0) for kind in ("fp32", "bf16")),
        ("readouts", (130, 2, 70), "tf32x3", 1, 1.0),  # more rows of tiles than one group
        *(
            pytest.param(name, shape, kind, *of_gpu, marks=pytest.mark.slow)
            for name, gpus in (("cells", [(1, 4.0), (132, 1.0), (132, 0.01)]), ("readouts", [(1, 4.0), (132, 1.0)]))
            for shape in (*OTHERS[name], *EDGES[name], *MEDIUM[name])
            for kind in KINDS
            for of_gpu in gpus
        ),
        *(
            pytest.param("cells", shape, kind, 132, 1.0, marks=pytest.mark.slow)
            for shape in LARGE
            for kind in ("fp32", "tf32", "bf16")
        ),
    ],
    ids=str,
)
def test_tiles_of_other_gpus(name, shape, kind, processors, scale, device, multiprocessors):
    multiprocessors(processors)
    _check(NAMES[name], shape, kind, device, scale=scale)


@pytest.mark.parametrize(
    "name, shape, options",
    [
        *(("cells", shape, {}) for shape in ((1, 1, 1), (3, 7, 5), (2, 0, 3), (0, 3, 2))),
        *(("cells", (3, 7, 5), {"biases": biases}) for biases in ((True, False), (False, False))),
        *(("readouts", (3, 7, 5), {"bias": bias}) for bias in (True, False)),
        *(("layers", (4, 3, 5, 2), options) for options in ({"bias": False}, SEGMENTS)),
    ],
    ids=str,
)
def test_the_truth_is_torchs(name, shape, options):
    """The equations of the reference and of its backward, in float64 and in more."""
    of = NAMES[name]
    for dtype in (torch.float32, torch.float64):
        problem = of.draw(*shape, dtype=dtype, **options)
        wide = problem.with_tensors([None if t is None else t.double() for t in problem.tensors])
        for result, true, torchs in zip(problem.names, of.truth(problem), of.by_torch(wide), strict=True):
            assert (true is None) == (torchs is None), result
            if true is not None:
                rounded = true if isinstance(true, torch.Tensor) else true.rounded()
                torch.testing.assert_close(rounded, torchs, rtol=1e-12, atol=1e-13, msg=result)
                assert dtype == torch.float32 or true.dtype.itemsize > 8, "long doubles"


# ---- what holds for all three ----------------------------------------------------------------------------------------


@pytest.mark.long
@_cases(cells=[(3, 7, 9)], readouts=[(3, 7, 40)], layers=[(4, 3, 5, 9)])
@pytest.mark.parametrize("layout, kind", list(zip(LAYOUTS, itertools.cycle(["fp32", "bf16"]))))
def test_any_strides(of, shape, layout, kind, device):
    """Of inputs, which are left alone."""
    dense = _draw(of, shape, kind, device=device, **(SEGMENTS if of is layers else {}))
    tensors = [LAYOUTS[layout][k % 2](t) for k, t in enumerate(dense.tensors)]
    laid_out = dense.with_tensors(tensors)
    given = [*tensors, laid_out.resets, laid_out.lengths] if of is layers else tensors
    before = [t.clone() for t in given]
    results = of.by_kernels(laid_out)
    assert all(map(torch.equal, before, given))
    of.assert_as_accurate_as_torch(results, laid_out)
    assert of is layers or all(t.is_contiguous() for t in results)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "name, shape, kind",  # as the tests of each compile them
    [
        *(("cells", (3, 7, 19), kind) for kind in ("fp32", "tf32", "bf16")),
        *(("layers", (7, 3, 5, 19), kind) for kind in ("fp32", "tf32", "bf16")),
        *(("readouts", *case) for case in LONG_SUMS),
        ("readouts", (3, 19, 37), "tf32"),
    ],
)
def test_two_runs_agree_bit_for_bit(name, shape, kind, device, executed):
    """Whatever the order in which programs, warps and lanes take turns."""
    of = NAMES[name]
    directions = {"D": 2 if kind == "tf32" else 1} if of is layers else {}
    problem = _draw(of, shape, kind, device=device, **directions)
    results = of.by_kernels(problem)
    if executed is not None:
        executed.seed += 1
    for result, first, second in zip(problem.names, results, of.by_kernels(problem), strict=True):
        assert torch.equal(first, second), result


@pytest.mark.compiled
@pytest.mark.parametrize("needed", ["dx dw_hh", "dh dw_ih", "dx dh dw_ih"])
def test_gradients_are_the_same_without_the_others(needed, device):
    """Those of the readout are in test_readout."""
    problem = cells.draw(*SMALL["cells"], device=device)
    some, every = cells.by_kernels(problem, needed.split()), cells.by_kernels(problem)
    for name, found, expected in zip(problem.names, some, every, strict=True):
        is_needed = name in ("h", "c", *needed.split())
        assert torch.equal(found, expected) if is_needed else found is None, name


@_cases(cells=[(3, 33, 9)], readouts=[(3, 33, 9)], layers=[(3, 3, 33, 9)])
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_default_precision_is_torchs(of, shape, setting, device):
    """That of matrix products, and for layers that of recurrent ones."""
    results = {p: of.by_kernels(of.draw(*shape, precision=p, device=device)) for p in ("ieee", "tf32")}
    assert not torch.equal(results["ieee"][0], results["tf32"][0])
    where = torch.backends.cudnn.rnn if of is layers else torch.backends.cuda.matmul
    with fp32_precision(where, setting):
        found = of.by_kernels(of.draw(*shape, precision=None, device=device))
    assert all(map(torch.equal, found, results[setting]))


OF_ROWS = ("h", "c", "y", "h_n", "c_n", "dx", "dh", "dc", "dh0", "dc0")


@_cases(cells=[(5, 7, 6)], readouts=[(5, 7, 20), (5, 7, 130)], layers=[(4, 5, 3, 6)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(of, shape, value, device):
    """In an input or in a gradient; within the row, NaN and infinity are where torch's are."""
    clean = _draw(of, shape, device=device)
    good, n = of.by_kernels(clean), len(clean.inputs)
    others = torch.tensor([0, 1, 2, 4], device=device)
    for k, t in enumerate(clean.tensors):
        if 5 not in t.shape[:-1] or (k >= n and value is not torch.nan):  # a weight
            continue
        spoilt = t.clone()
        spoilt.select(-2, 3)[..., 2] = value
        problem = clean.with_tensors([spoilt if j == k else other for j, other in enumerate(clean.tensors)])
        found, expected = of.by_kernels(problem), of.by_torch(problem)
        for name, result, wanted, torchs in zip(clean.names, found, good, expected, strict=True):
            if name in OF_ROWS:
                assert torch.equal(result.index_select(-2, others), wanted.index_select(-2, others)), (k, name)
            assert torch.equal(result.isnan(), torchs.isnan()), (k, name)
            assert torch.equal(result.isinf(), torchs.isinf()), (k, name)


def test_a_weight_row_of_nan_stays_in_its_unit(device):
    clean = cells.draw(3, 7, 19, device=device)
    spoilt = clean.with_tensors([t.clone() for t in clean.tensors])
    unit = 17
    spoilt.inputs[3][19 + unit] = torch.nan  # its forget gate
    others = [j for j in range(19) if j != unit]
    for good, found in zip(cells.by_kernels(clean)[:2], cells.by_kernels(spoilt)[:2]):
        assert torch.equal(found[:, others], good[:, others])
        assert found[:, unit].isnan().all()


FAR = 2**32  # elements: where offsets no longer fit in 32 bits


@pytest.mark.long
@_cases(cells=[(8, 3, 2), (2, 66, 2)], readouts=[(4, 3, 4), (4, 66, 4)])
def test_64_bit_offsets(of, shape, device, tmp_path):
    """Rows 2^29 elements apart, so that the last begins beyond 2^31; or, of 66 columns, these 2^25 apart."""
    if device.type == "cuda":
        storage = torch.empty(FAR, dtype=torch.float16, device=device)
    else:  # a sparse file: only what is touched takes space
        storage = torch.from_file(str(tmp_path / "far"), shared=True, size=FAR, dtype=torch.float16)
    near = of.draw(*shape, torch.float16, device=device)
    first = itertools.count(0, 2**10)

    def far(t):
        strides = (2**29, 1)[: t.dim()] if 66 not in shape else (1, 2**25)[-t.dim() :]
        return storage.as_strided(t.shape, strides, next(first)).copy_(t)

    distant = near.with_tensors([far(t) for t in near.tensors])
    for expected, found in zip(of.by_kernels(near), of.by_kernels(distant), strict=True):
        torch.testing.assert_close(found, expected)
