"""What holds for the kernels of the cell, of the readout and of a layer alike, whatever they compute."""

import itertools

import pytest
import torch
from support import cells, layers, readouts
from support.aot import KINDS
from support.layouts import LAYOUTS, expanded_columns

from lstm_triton.kernels.device import fp32_precision

THREE_KINDS = ("fp32", "tf32", "bf16")
SEGMENTS = dict(resets=True, reset_state="stored", lengths=True, cells=True)


def _draw(of, shape, kind="fp32", **options):
    dtype, precision = KINDS[kind]
    options = {"D": 2, **options} if of is layers else options
    return of.draw(*shape, dtype=dtype, precision=precision, **options)


def _cases(**shapes):
    """Each of the three with its shape."""
    of = {"cells": cells, "readouts": readouts, "layers": layers}
    cases = [pytest.param(of[name], shape, id=f"{name}, {shape}") for name in of for shape in shapes.get(name, ())]
    return pytest.mark.parametrize("of, shape", cases)


@pytest.mark.long
@_cases(cells=[(3, 7, 9)], readouts=[(3, 7, 40)], layers=[(4, 3, 5, 9)])
@pytest.mark.parametrize("layout, kind", list(zip(LAYOUTS, itertools.cycle(["fp32", "bf16"]))))
def test_any_strides(of, shape, layout, kind, device):
    change = LAYOUTS[layout]
    dense = _draw(of, shape, kind, device=device, **(SEGMENTS if of is layers else {}))
    tensors = [change(t) for t in dense.tensors]
    if of is readouts and layout == "expanded":  # with all its rows equal, dh would be 0
        tensors[1] = expanded_columns(dense.inputs[1])
    laid_out = dense.with_tensors(tensors)
    results = of.by_kernels(laid_out)
    of.assert_as_accurate_as_torch(results, laid_out)
    assert of is layers or all(t.is_contiguous() for t in results)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "of, shape, kind",  # as the tests of each compile them
    [
        *((of, shape, kind) for of, shape in ((cells, (3, 7, 19)), (layers, (7, 3, 5, 19))) for kind in THREE_KINDS),
        *((readouts, shape, "fp32") for shape in ((2, 5, 260), (115, 3, 5))),
        (readouts, (3, 19, 37), "tf32"),
        (readouts, (3, 5, 530), "bf16"),
    ],
)
def test_two_runs_agree_bit_for_bit(of, shape, kind, device, executed):
    """Whatever the order in which programs, warps and lanes take turns."""
    directions = {"D": 2 if kind == "tf32" else 1} if of is layers else {}
    problem = _draw(of, shape, kind, device=device, **directions)
    results = of.by_kernels(problem)
    if executed is not None:
        executed.seed += 1
    for name, first, second in zip(problem.names, results, of.by_kernels(problem), strict=True):
        assert torch.equal(first, second), name


@_cases(cells=[(3, 7, 9)], readouts=[(3, 7, 70)], layers=[(4, 3, 5, 9)])
def test_inputs_are_left_alone(of, shape, device):
    problem = _draw(of, shape, device=device, **(SEGMENTS if of is layers else {}))
    tensors = problem.tensors if of is not layers else (*problem.tensors, problem.resets, problem.lengths)
    before = [t.clone() for t in tensors]
    of.by_kernels(problem)
    assert all(map(torch.equal, before, tensors))


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


@_cases(cells=[(0, 7, 5), (3, 7, 0), (0, 0, 0)], readouts=[(0, 7, 5), (0, 7, 200), (3, 0, 5), (3, 7, 0)])
def test_empty(of, shape, device):
    problem = _draw(of, shape, device=device)
    for name, found, expected in zip(problem.names, of.by_kernels(problem), of.by_torch(problem), strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


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
