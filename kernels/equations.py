"""The equations of the LSTM, which every kernel computes: functions of values in registers, without pointers.

Order and names of the gates are PyTorch's (i, f, g, o: input, forget, candidate, output). All functions compute in the dtype of
their arguments: float64 for float64 tensors, else float32. docs/derivation.md derives them line by line.

Forward, given the pre-activations z = x W_ih^T + h_prev W_hh^T + b:

    i = sigmoid(z_i)    f = sigmoid(z_f)    g = tanh(z_g)    o = sigmoid(z_o)
    c = f * c_prev + i * g
    h = o * tanh(c)

Backward, given dh and dc from the output and from the step after (the chain rule, applied to one line of the forward at a time,
from the last to the first):

    h = o * tanh(c)          do = dh * tanh(c)             dc += dh * o * (1 - tanh(c)^2)
    c = f * c_prev + i * g   df = dc * c_prev              dc_prev = dc * f
                             di = dc * g                   dg = dc * i
    o = sigmoid(z_o)         dz_o = do * o * (1 - o)
    g = tanh(z_g)            dz_g = dg * (1 - g^2)
    f = sigmoid(z_f)         dz_f = df * f * (1 - f)
    i = sigmoid(z_i)         dz_i = di * i * (1 - i)

Matrix products in the kernels give the rest: dx = dz W_ih, dh_prev = dz W_hh, dW_ih = dz^T x, dW_hh = dz^T h_prev, db = sum dz.
"""

import triton
import triton.language as tl


@triton.jit
def _exp(x):
    # The PTX instructions for 2^x and 1 / x in float32 are within 2 ulp and 1 ulp. tl.exp and the division add code for
    # subnormal numbers. Here these are 0: a gate of z < -87.3 is closed, an error of less than 2^-103 ulp of 1.
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _reciprocal(x):
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        # A step of Newton's method corrects r to about one rounding. Without the minimum, inf * 0 would be NaN.
        return tl.fma(tl.fma(-tl.minimum(x, 3e38), r, 1.0), r, r)


@triton.jit
def sigmoid(x):
    if x.dtype == tl.float64:
        # 1 / (1 + e) would round twice, and near s = 1 the derivative s (1 - s) magnifies the error of s.
        e = tl.exp(-tl.abs(x))
        r = e / (1.0 + e)
        return tl.where(x < 0, r, 1.0 - r)
    # For very negative x, exp(-x) overflows to inf, and 1 / inf = 0 is right.
    return _reciprocal(1.0 + _exp(-x))


@triton.jit
def tanh(x):
    # The exponent is never positive, so nothing overflows; (1 - exp(-2x)) / (1 + exp(-2x)) would be inf / inf at x = -45.
    # Near zero, 1 - 2 e / (1 + e) would lose relative accuracy. The odd polynomial a + a^3 p(a^2) keeps it: p interpolates
    # (tanh(a) / a - 1) / a^2 at the Chebyshev nodes of 0 <= a^2 <= 1/4.
    a = tl.abs(x)
    e = _exp(-2.0 * a)
    t = tl.where(a < 0.5, _tanh_near_zero(a), 1.0 - 2.0 * (e * _reciprocal(1.0 + e)))
    return tl.where(x < 0, -t, t)


@triton.jit
def _tanh_near_zero(a):
    y = a * a
    if a.dtype == tl.float64:
        p = 5.946956589774769e-05
        p = -2.2107222975864633e-04 + y * p
        p = 5.849653729022644e-04 + y * p
        p = -1.454959384380466e-03 + y * p
        p = 3.5920334653723926e-03 + y * p
        p = -8.863229270067843e-03 + y * p
        p = 2.1869488297234514e-02 + y * p
        p = -5.396825396361009e-02 + y * p
        p = 1.3333333333329825e-01 + y * p
        p = -3.333333333333333e-01 + y * p
    else:
        p = -5.338711064e-02 + y * 1.798874441e-02
        p = 1.333047649e-01 + y * p
        p = -3.333331108e-01 + y * p
    return a + a * (y * p)


@triton.jit
def expm1(x):
    # Kahan's method: the rounding error of e enters e - 1 and log(e) alike, and cancels in their quotient.
    e = tl.exp(x)
    near = (e - 1.0) * (x / tl.log(e))
    return tl.where(e == 1.0, x, tl.where(tl.abs(x) < 1.0, near, e - 1.0))


@triton.jit
def log1p(x):
    # Kahan's method, as in expm1.
    y = 1.0 + x
    near = tl.log(y) * (x / (y - 1.0))
    return tl.where(y == 1.0, x, tl.where(tl.abs(x) < 1.0, near, tl.log(y)))


@triton.jit
def d_sigmoid(s):
    """Return the derivative of sigmoid, from its value s."""
    return s * (1.0 - s)


@triton.jit
def d_tanh(t):
    """Return the derivative of tanh, from its value t."""
    return 1.0 - t * t


@triton.jit
def gate_activations(z_i, z_f, z_g, z_o):
    """Activate the gates. Returns i, f, g, o."""
    i = sigmoid(z_i)
    f = sigmoid(z_f)
    g = tanh(z_g)
    o = sigmoid(z_o)
    return i, f, g, o


@triton.jit
def lstm_forward(z_i, z_f, z_g, z_o, c_prev):
    """Compute one timestep from the pre-activations. Returns i, f, g, o, c, h."""
    i, f, g, o = gate_activations(z_i, z_f, z_g, z_o)
    c = f * c_prev + i * g
    h = o * tanh(c)
    return i, f, g, o, c, h


@triton.jit
def lstm_backward(i, f, g, o, c_prev, c, dh, dc):
    """Compute the gradients of one timestep. Returns dz_i, dz_f, dz_g, dz_o, dc_prev."""
    tanh_c = tanh(c)
    do = dh * tanh_c
    dc += dh * o * d_tanh(tanh_c)
    di = dc * g
    df = dc * c_prev
    dg = dc * i
    dz_i = di * d_sigmoid(i)
    dz_f = df * d_sigmoid(f)
    dz_g = dg * d_tanh(g)
    dz_o = do * d_sigmoid(o)
    dc_prev = dc * f
    return dz_i, dz_f, dz_g, dz_o, dc_prev
