"""sigmoid and tanh of the kernels against float64, over the whole range; and what a device's errors in them do to results.

Cells and layers judge the equations that are made of them.
"""

import contextlib

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support import layers
from support.problems import cells

from lstm_triton.kernels import equations, interpreter


@triton.jit
def _activations_kernel(x_ptr, sigmoid_ptr, tanh_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(sigmoid_ptr + i, equations.sigmoid(x))
    tl.store(tanh_ptr + i, equations.tanh(x))


def _magnitudes(dtype):
    """Every magnitude, subnormals included, and densely where the functions bend: 2^13 numbers."""
    info = torch.finfo(dtype)
    special = [0.0, info.tiny / 2, info.tiny, info.max / 2, info.max, torch.inf]
    special += [45.0, 46.0, 88.0, 89.0, 104.0, 710.0, 746.0, 1e5, 1e30, 2.0**-149, 2.0**-148, 3 * 2.0**-140]
    smallest = -307 if dtype == torch.float64 else -37
    parts = torch.logspace(smallest, 2, 1000, dtype=torch.float64), torch.tensor(special, dtype=torch.float64)
    dense = torch.linspace(0, 100, 2**13 - sum(map(len, parts)), dtype=torch.float64)
    return torch.cat((*parts, dense)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_over_the_whole_range(dtype, device):
    """A GPU's exp and division (ex2.approx, div.full) may be off by 2 ulp each; near 1, sigmoid and tanh halve those of exp."""
    magnitudes = _magnitudes(dtype).to(device)
    x = torch.cat((magnitudes, -magnitudes))
    outputs = torch.full((2, len(x)), torch.nan, dtype=dtype, device=device)
    _activations_kernel[(1,)](x, *outputs, len(x))
    sigmoid, tanh = outputs
    ulp, wide = torch.finfo(dtype).eps, x.double()
    assert ((sigmoid.double() - torch.sigmoid(wide)).abs() <= 3 * ulp).all()
    assert ((tanh.double() - torch.tanh(wide)).abs() <= 3 * ulp).all()
    assert (0 <= sigmoid).all() and (sigmoid <= 1).all() and (tanh.abs() <= 1).all()
    assert torch.equal(tanh[: len(magnitudes)], -tanh[len(magnitudes) :]) and (tanh * x.sign() >= 0).all()
    assert (sigmoid[x == 0] == 0.5).all() and (sigmoid[x >= 45] == 1).all() and sigmoid[x == -torch.inf] == 0
    assert (tanh[x.abs() >= 45] == x.sign()[x.abs() >= 45]).all()
    # Relative accuracy: of tanh down to the smallest normal numbers, as torch's, where below 1/2 a polynomial takes no part of
    # the device's; of sigmoid as if x were off by two ulps, since a nearly closed gate is no zero.
    normal, small, closing = x.abs() >= torch.finfo(dtype).tiny, x.abs() < 0.5, (-80 <= x) & (x <= -1)
    assert ((tanh.double() / torch.tanh(wide) - 1).abs() <= ulp * torch.where(small, 1.5, 8.0))[normal].all()
    assert ((sigmoid.double() / torch.sigmoid(wide) - 1).abs() <= 2 * ulp * (1 + wide.abs()))[closing].all()
    _activations_kernel[(1,)](torch.full_like(x, torch.nan), *outputs.zero_(), len(x))
    assert outputs.isnan().all()


# By PTX's manual a result of ex2.approx is within 2 ulp, one of rcp.approx within 1 ulp.
ANYWHERE, AT_THE_BOUNDS = lambda n: np.random.uniform(-1, 1, n), lambda n: np.random.choice([-1.0, 1.0], n)
UP, DOWN = np.ones, lambda n: -np.ones(n)


def _off_by(function, ulps, signs):
    """The function of float32 numbers, with an error of sign times ulps."""

    def wrong(x):
        with np.errstate(all="ignore"):
            right = function(x.astype(np.float64))
            moved = right + signs(x.shape) * ulps * np.spacing(np.abs(right).astype(np.float32))
        return np.where(np.isfinite(moved), moved, right).astype(np.float32)

    return wrong


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="changes the interpreter's functions")
@pytest.mark.parametrize(
    "of, shape, ulps, signs_of_exponentials, signs_of_reciprocals",
    [
        (cells, (17, 20, 21), 2, ANYWHERE, UP),
        (cells, (17, 20, 21), 2, AT_THE_BOUNDS, DOWN),
        (layers, (4, 3, 5, 19), 2, ANYWHERE, DOWN),
        (layers, (4, 3, 5, 19), 2, AT_THE_BOUNDS, UP),
        (cells, (17, 20, 21), 16, ANYWHERE, UP),
    ],
)
def test_the_largest_errors_of_a_device_pass_the_rule_and_larger_ones_do_not(
    of, shape, ulps, signs_of_exponentials, signs_of_reciprocals, monkeypatch
):
    np.random.seed(0)
    exponential, reciprocal = (
        _off_by(np.exp2, ulps, signs_of_exponentials),
        _off_by(np.reciprocal, 1, signs_of_reciprocals),
    )
    monkeypatch.setitem(interpreter.INLINE_ASM, "ex2.approx.ftz.f32", exponential)
    monkeypatch.setitem(interpreter.INLINE_ASM, "rcp.approx.ftz.f32", reciprocal)
    for scale in (1.0, 4.0):
        problem = of.draw(*shape, scale=scale)
        with contextlib.nullcontext() if ulps == 2 else pytest.raises(AssertionError, match="RMS error"):
            of.assert_as_accurate_as_torch(of.by_kernels(problem), problem)
