"""Layers under torch.func, forward-mode AD and batched gradients, where no kernel can serve: never silently wrong."""

import pytest
import torch
from torch.autograd import forward_ad

from lstm_triton import LSTM

layers = pytest.mark.parametrize("bidirectional", [False, True])


@pytest.fixture
def pair(bidirectional, device):
    """A layer through the kernels, torch's with the same weights, x and a tangent of it, in float64."""
    torch.manual_seed(0)
    options = dict(bidirectional=bidirectional, dtype=torch.float64, device=device)
    ours, torchs = LSTM(2, 3, backend="triton", **options), LSTM(2, 3, backend="reference", **options)
    torchs.load_state_dict(ours.state_dict())
    x, v = torch.randn(2, 4, 2, 2, dtype=torch.float64, device=device)
    return ours.requires_grad_(False), torchs.requires_grad_(False), x, v


@layers
def test_jvp(pair):
    ours, torchs, x, v = pair
    (_, found), (_, expected) = (torch.func.jvp(lambda t, m=m: m(t)[0], (x,), (v,)) for m in (ours, torchs))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected)


@layers
def test_forward_mode(pair):
    ours, torchs, x, v = pair
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        found, expected = (forward_ad.unpack_dual(m(dual)[0]).tangent for m in (ours, torchs))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected)


@layers
def test_vmap_and_gradients_per_sample(pair):
    ours, torchs, x, v = pair
    xs = torch.stack((x, v))
    torch.testing.assert_close(torch.func.vmap(lambda t: ours(t)[0])(xs), torch.stack([torchs(t)[0] for t in xs]))

    def loss(weights, m, t):
        return torch.func.functional_call(m, weights, (t,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))
    weights = dict(ours.named_parameters())
    for name, found in each(weights, ours, xs).items():
        expected = torch.stack([torch.func.grad(loss)(weights, torchs, t)[name] for t in xs])
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


@layers
def test_jacobian(pair):
    ours, torchs, x, _ = pair
    found, expected = (torch.func.jacrev(lambda t, m=m: m(t)[0])(x) for m in (ours, torchs))
    torch.testing.assert_close(found, expected)


@layers
def test_batched_gradients(pair):
    ours, torchs, x, _ = pair
    x.requires_grad_()
    found, expected = (
        torch.autograd.functional.jacobian(lambda t, m=m: m(t)[1][0], x, vectorize=True) for m in (ours, torchs)
    )
    torch.testing.assert_close(found, expected)


class _PrecisionOfProducts(torch.overrides.TorchFunctionMode):
    """Notes torch's setting at every product."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("mm", "addmm", "addmm_", "bmm", "matmul", "__matmul__"):
            self.found.add(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision, other", [("ieee", "tf32"), ("tf32", "ieee")])
def test_products_around_the_kernels_have_their_precision(precision, other, device):
    lstm = LSTM(3, 4, proj_size=2, backend="triton", precision=precision, device=device)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = other
    try:
        with _PrecisionOfProducts() as products:
            lstm(torch.randn(4, 2, 3, device=device))[0].sum().backward()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert products.found == {precision}
