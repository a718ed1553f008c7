"""sigmoid and tanh of the kernels against float64, over the whole range; and what a device's errors in them do to results.

Cells and layers judge the equations that are made of them.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support import cells, layers

from lstm_triton.kernels import equations, interpreter


@triton.jit
def _activations_kernel(x_ptr, sigmoid_ptr, tanh_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(sigmoid_ptr + i, equations.sigmoid(x))
    tl.store(tanh_ptr + i, equations.tanh(x))


def _activations(x):
    """sigmoid(x) and tanh(x) by the equations, for any number of values."""
    size = triton.next_power_of_2(x.numel())
    padded = torch.zeros(size, dtype=x.dtype, device=x.device)
    padded[: x.numel()] = x
    outputs = torch.full((2, size), torch.nan, dtype=x.dtype, device=x.device)
    _activations_kernel[(1,)](padded, outputs[0], outputs[1], size)
    return outputs[:, : x.numel()]


def _magnitudes(dtype):
    """Every magnitude, subnormals included, and densely where the functions bend."""
    info = torch.finfo(dtype)
    special = [info.tiny / 2, info.tiny, info.max / 2, info.max, 1e5]
    special += [2.0**-149, 2.0**-148, 3 * 2.0**-140] if dtype == torch.float32 else []
    smallest = -307 if dtype == torch.float64 else -37
    parts = torch.logspace(smallest, 2, 1000, dtype=torch.float64), torch.linspace(0, 100, 4001, dtype=torch.float64)
    return torch.cat((*parts, torch.tensor(special, dtype=torch.float64))).to(dtype)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@dtypes
def test_activations_over_the_whole_range(dtype, device):
    """A GPU's exp and division (ex2.approx, div.full) may be off by 2 ulp each; near 1, sigmoid and tanh halve those of exp."""
    magnitudes = _magnitudes(dtype).to(device)
    x = torch.cat((magnitudes, -magnitudes))
    sigmoid, tanh = _activations(x)
    ulp, wide = torch.finfo(dtype).eps, x.double()
    assert ((sigmoid.double() - torch.sigmoid(wide)).abs() <= 3 * ulp).all()
    assert ((tanh.double() - torch.tanh(wide)).abs() <= 3 * ulp).all()
    assert (0 <= sigmoid).all() and (sigmoid <= 1).all() and (tanh.abs() <= 1).all()
    assert torch.equal(tanh[: len(magnitudes)], -tanh[len(magnitudes) :]) and (tanh * x.sign() >= 0).all()
    # Relative accuracy: of tanh down to the smallest normal numbers, as torch's, where below 1/2 a polynomial takes no part of
    # the device's; of sigmoid as if x were off by two ulps, since a nearly closed gate is no zero.
    normal, small, closing = x.abs() >= torch.finfo(dtype).tiny, x.abs() < 0.5, (-80 <= x) & (x <= -1)
    assert ((tanh.double() / torch.tanh(wide) - 1).abs() <= ulp * torch.where(small, 1.5, 8.0))[normal].all()
    assert ((sigmoid.double() / torch.sigmoid(wide) - 1).abs() <= 2 * ulp * (1 + wide.abs()))[closing].all()


@dtypes
def test_special_values(dtype, device):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype, device=device)
    sigmoid, tanh = _activations(x)
    assert sigmoid[:4].tolist() == [0.5, 0.5, 1.0, 0.0] and sigmoid[4].isnan()
    assert tanh[:4].tolist() == [0.0, 0.0, 1.0, -1.0] and tanh[4].isnan()
    beyond = torch.tensor([45.0, 46.0, 88.0, 89.0, 104.0, 710.0, 746.0, 1e30], dtype=dtype, device=device)
    sigmoid, tanh = _activations(torch.cat((beyond, -beyond)))
    assert (tanh[:8] == 1).all() and (tanh[8:] == -1).all()
    assert (sigmoid[:8] == 1).all() and (sigmoid[8:] >= 0).all()


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


def _judge_layer(scale):
    problem = layers.draw(4, 3, 5, 19, 2, torch.float32, precision="ieee", scale=scale)
    layers.assert_as_accurate_as_torch(layers.by_kernels(problem), problem)


def _judge_cell(scale):
    problem = cells.draw(17, 20, 21, torch.float32, precision="ieee", scale=scale)
    cells.assert_as_accurate_as_torch(cells.by_kernels(problem), problem)


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="changes the interpreter's functions")
@pytest.mark.parametrize(
    "judge, signs_of_exponentials, signs_of_reciprocals",
    [
        (_judge_cell, ANYWHERE, UP),
        (_judge_cell, AT_THE_BOUNDS, DOWN),
        (_judge_layer, ANYWHERE, DOWN),
        (_judge_layer, AT_THE_BOUNDS, UP),
    ],
)
def test_the_largest_errors_of_a_device_pass_the_rule(judge, signs_of_exponentials, signs_of_reciprocals, monkeypatch):
    np.random.seed(0)
    exponential = _off_by(np.exp2, 2, signs_of_exponentials)
    reciprocal = _off_by(np.reciprocal, 1, signs_of_reciprocals)
    monkeypatch.setitem(interpreter.INLINE_ASM, "ex2.approx.ftz.f32", exponential)
    monkeypatch.setitem(interpreter.INLINE_ASM, "rcp.approx.ftz.f32", reciprocal)
    for scale in (1.0, 4.0):
        judge(scale)


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="changes the interpreter's functions")
def test_larger_errors_would_not_pass(monkeypatch):
    np.random.seed(0)
    monkeypatch.setitem(interpreter.INLINE_ASM, "ex2.approx.ftz.f32", _off_by(np.exp2, 16, ANYWHERE))
    with pytest.raises(AssertionError, match="RMS error"):
        _judge_cell(1.0)
