"""The equations of the kernels, on values, against float64: over the whole range, with the special values."""

import inspect
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support import cells, layers

from lstm_triton import reference
from lstm_triton.kernels import equations, interpreter


@triton.jit
def _activations_kernel(x_ptr, sigmoid_ptr, tanh_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(sigmoid_ptr + i, equations.sigmoid(x))
    tl.store(tanh_ptr + i, equations.tanh(x))


@triton.jit
def _forward_kernel(in_ptr, out_ptr, SIZE: tl.constexpr):
    n = tl.arange(0, SIZE)
    z_i, z_f = tl.load(in_ptr + n), tl.load(in_ptr + SIZE + n)
    z_g, z_o = tl.load(in_ptr + 2 * SIZE + n), tl.load(in_ptr + 3 * SIZE + n)
    i, f, g, o, c, h = equations.lstm_forward(z_i, z_f, z_g, z_o, tl.load(in_ptr + 4 * SIZE + n))
    tl.store(out_ptr + n, i)
    tl.store(out_ptr + SIZE + n, f)
    tl.store(out_ptr + 2 * SIZE + n, g)
    tl.store(out_ptr + 3 * SIZE + n, o)
    tl.store(out_ptr + 4 * SIZE + n, c)
    tl.store(out_ptr + 5 * SIZE + n, h)


@triton.jit
def _backward_kernel(in_ptr, out_ptr, SIZE: tl.constexpr):
    n = tl.arange(0, SIZE)
    i, f = tl.load(in_ptr + n), tl.load(in_ptr + SIZE + n)
    g, o = tl.load(in_ptr + 2 * SIZE + n), tl.load(in_ptr + 3 * SIZE + n)
    c_prev, c = tl.load(in_ptr + 4 * SIZE + n), tl.load(in_ptr + 5 * SIZE + n)
    dh, dc = tl.load(in_ptr + 6 * SIZE + n), tl.load(in_ptr + 7 * SIZE + n)
    dz_i, dz_f, dz_g, dz_o, dc_prev = equations.lstm_backward(i, f, g, o, c_prev, c, dh, dc)
    tl.store(out_ptr + n, dz_i)
    tl.store(out_ptr + SIZE + n, dz_f)
    tl.store(out_ptr + 2 * SIZE + n, dz_g)
    tl.store(out_ptr + 3 * SIZE + n, dz_o)
    tl.store(out_ptr + 4 * SIZE + n, dc_prev)


def _activations(x):
    """sigmoid(x) and tanh(x) by the equations, for any number of values."""
    size = triton.next_power_of_2(x.numel())
    padded = torch.zeros(size, dtype=x.dtype, device=x.device)
    padded[: x.numel()] = x
    outputs = torch.full((2, size), torch.nan, dtype=x.dtype, device=x.device)
    _activations_kernel[(1,)](padded, outputs[0], outputs[1], size)
    return outputs[:, : x.numel()]


def _range(dtype, device):
    """Both signs of every magnitude, subnormals included, and densely where the functions bend."""
    info = torch.finfo(dtype)
    magnitudes = [
        torch.logspace(-307 if dtype == torch.float64 else -37, 2, 1000, dtype=torch.float64),
        torch.linspace(0, 100, 4001, dtype=torch.float64),
        torch.tensor(
            [info.tiny, info.tiny / 2, info.smallest_normal, info.max, info.max / 2, 1e5], dtype=torch.float64
        ),
    ]
    if dtype == torch.float32:
        magnitudes.append(torch.tensor([2.0**-149, 2.0**-148, 3 * 2.0**-140], dtype=torch.float64))
    x = torch.cat(magnitudes).to(dtype)
    return torch.cat((x, -x)).to(device)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@dtypes
def test_activations_over_the_whole_range(dtype, device):
    """Within 3 ulp of 1: exp and the division may be off by 2 ulp each on a GPU (ex2.approx, div.full), exp counts half."""
    x = _range(dtype, device)
    sigmoid, tanh = _activations(x)
    ulp = torch.finfo(dtype).eps
    assert sigmoid.isfinite().all() and tanh.isfinite().all()
    assert ((sigmoid.double() - torch.sigmoid(x.double())).abs() <= 3 * ulp).all()
    assert ((tanh.double() - torch.tanh(x.double())).abs() <= 3 * ulp).all()
    assert (0 <= sigmoid).all() and (sigmoid <= 1).all() and (tanh.abs() <= 1).all()


@dtypes
def test_tanh_is_odd_and_keeps_its_sign(dtype, device):
    x = _range(dtype, device)
    tanh = _activations(x)[1]
    assert torch.equal(tanh, -_activations(-x)[1])
    assert (tanh * x.sign() >= 0).all()


@dtypes
def test_tanh_keeps_its_relative_accuracy(dtype, device):
    """Down to the smallest numbers, as torch's; 8 ulp because a GPU's exp and division (ex2.approx, div.full) are off by 2."""
    x = _range(dtype, device)
    x = x[x.abs() >= torch.finfo(dtype).tiny]
    expected = torch.tanh(x.double())
    assert ((_activations(x)[1].double() - expected).abs() <= 8 * torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("count", [4, 10])
def test_the_polynomial_of_tanh_interpolates_at_chebyshev_nodes(count):
    mpmath = pytest.importorskip("mpmath")
    source = inspect.getsource(getattr(equations._tanh_near_zero, "fn", equations._tanh_near_zero))
    wide, narrow = source.split("else:")
    quoted = re.findall(r"-?\d\.\d+e[-+]\d\d", wide if count == 10 else narrow)
    with mpmath.workdps(60):
        y = [(1 + mpmath.cos(mpmath.pi * (2 * k + 1) / (2 * count))) / 8 for k in range(count)]
        values = [(mpmath.tanh(mpmath.sqrt(u)) / mpmath.sqrt(u) - 1) / u for u in y]
        p = mpmath.lu_solve(mpmath.matrix([[u**k for k in range(count)] for u in y]), mpmath.matrix(values))
    assert len(quoted) == count
    for coefficient, number in zip(sorted(map(float, p), key=abs), sorted(map(float, quoted), key=abs)):
        assert number == pytest.approx(coefficient, rel=1e-9 if count == 4 else 1e-15)


@dtypes
def test_small_sigmoids_keep_their_relative_accuracy(dtype, device):
    """A nearly closed gate is no zero: at worst as wrong as if x were off by two ulps."""
    x = torch.linspace(-80, -1, 1000, dtype=torch.float64).to(device, dtype)
    expected = torch.sigmoid(x.double())
    error = (_activations(x)[0].double() - expected).abs() / expected
    assert (error <= 2 * torch.finfo(dtype).eps * (1 + x.abs())).all()


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


def _values(n, device):
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 8.0, 40.0]).repeat(64)
    return (torch.randn(n, 256) * scale).to(device)


@dtypes
def test_forward_is_the_reference(dtype, device):
    values = _values(5, device).to(dtype)
    outputs = torch.full((6, 256), torch.nan, dtype=dtype, device=device)
    _forward_kernel[(1,)](values, outputs, 256)
    z, c_prev = values[:4].double().t(), values[4].double()[:, None]
    expected = [_reference_forward(z[n], c_prev[n]) for n in range(256)]
    expected = torch.stack(expected, dim=1)
    assert ((outputs.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * expected.abs().clamp(min=1)).all()


def _reference_forward(z, c_prev):
    """i, f, g, o, c, h of one unit whose pre-activations are its biases."""
    none = z.new_zeros(1, 1)
    gates = reference.gate_activations(*z)
    h, c = reference.lstm_cell(none, none, c_prev[None], z.new_zeros(4, 1), z.new_zeros(4, 1), z, None)
    return torch.stack([t.squeeze() for t in (*gates, c, h)])


@dtypes
def test_backward_is_the_derivative_of_forward(dtype, device):
    """From the values of the forward in float64, so that only the backward's own roundings count."""
    z, c_prev, dh, dc = (t.double() for t in _values(7, device).split((4, 1, 1, 1)))
    z.requires_grad_()
    c_prev.requires_grad_()
    i, f, g, o = z[0].sigmoid(), z[1].sigmoid(), z[2].tanh(), z[3].sigmoid()
    c = f * c_prev[0] + i * g
    h = o * c.tanh()
    expected = torch.cat(torch.autograd.grad((h, c), (z, c_prev), (dh[0], dc[0])))
    values = torch.stack((i, f, g, o, c_prev[0], c, dh[0], dc[0])).detach().to(dtype)
    outputs = torch.full((5, 256), torch.nan, dtype=dtype, device=device)
    _backward_kernel[(1,)](values, outputs, 256)
    largest = values[4:].double().abs().amax(0).clamp(min=1) * values[6:].double().abs().amax(0).clamp(min=1)
    assert ((outputs.double() - expected).abs() <= 8 * torch.finfo(dtype).eps * largest).all()


# ---- errors of a device's instructions -------------------------------------------------------------------------------

# By PTX's manual a result of ex2.approx is within 2 ulp, one of rcp.approx within 1 ulp.
SIGNS = {
    "anywhere": lambda n: np.random.uniform(-1, 1, n),
    "at the bounds": lambda n: np.random.choice([-1.0, 1.0], n),
}
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
        *((_judge_cell, *signs) for signs in zip(2 * [*SIGNS.values()], [*SIGNS.values(), UP, DOWN])),
        (_judge_layer, SIGNS["anywhere"], UP),
        (_judge_layer, SIGNS["at the bounds"], DOWN),
    ],
    ids=["anywhere", "at the bounds", "anywhere, up", "at the bounds, down", "layer, up", "layer, down"],
)
def test_the_largest_errors_of_a_device_pass_the_rule(signs_of_exponentials, signs_of_reciprocals, judge, monkeypatch):
    np.random.seed(0)
    monkeypatch.setitem(interpreter.INLINE_ASM, "ex2.approx.ftz.f32", _off_by(np.exp2, 2, signs_of_exponentials))
    monkeypatch.setitem(interpreter.INLINE_ASM, "rcp.approx.ftz.f32", _off_by(np.reciprocal, 1, signs_of_reciprocals))
    for scale in (1.0, 4.0):
        judge(scale)


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="changes the interpreter's functions")
@pytest.mark.parametrize("judge", [_judge_layer, _judge_cell])
def test_larger_errors_would_not_pass(judge, monkeypatch):
    np.random.seed(0)
    monkeypatch.setitem(interpreter.INLINE_ASM, "ex2.approx.ftz.f32", _off_by(np.exp2, 16, SIGNS["anywhere"]))
    with pytest.raises(AssertionError, match="RMS error"):
        judge(1.0)
