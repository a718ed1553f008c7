"""Layers under torch.func, forward-mode AD and batched gradients, where no kernel can serve: never silently wrong."""

import pytest
import torch
from support import segmented
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import LSTM, LSTMCell


def test_gradients_per_sample(device):
    torch.manual_seed(0)
    options = dict(bidirectional=True, dtype=torch.float64, device=device)
    ours, plain = LSTM(2, 3, backend="triton", **options), LSTM(2, 3, backend="reference", **options)
    plain.load_state_dict(ours.state_dict())
    xs = torch.randn(2, 4, 2, 2, dtype=torch.float64, device=device)

    def loss(weights, m, t):
        return torch.func.functional_call(m, weights, (t,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    for name, found in each(weights, ours, xs).items():
        expected = torch.stack([torch.func.grad(loss)(weights, plain, t)[name] for t in xs])
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


def _dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def _without_gradients(f, x, v):
    with torch.no_grad():
        return _dual(f, x, v)


def _difference(f, x, v, step=1e-6):
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


def _loss_gradient(f):
    return torch.func.grad(lambda t: f(t).square().sum())


# What each gives of f at x, in the direction v or at v, and the same from calls of f and its gradient alone.
TRANSFORMS = {
    "forward mode": (_dual, _difference),
    "forward mode without gradients": (_without_gradients, _difference),
    "jvp": (lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1], _difference),
    "vmap": (lambda f, x, v: torch.func.vmap(f)(torch.stack((x, v))), lambda f, x, v: torch.stack((f(x), f(v)))),
    "vmap of grad": (
        lambda f, x, v: torch.func.vmap(_loss_gradient(f))(torch.stack((x, v))),
        lambda f, x, v: torch.stack([jacobian(lambda t: f(t).square().sum(), t) for t in (x, v)]),
    ),
    "jacrev": (lambda f, x, v: torch.func.jacrev(f)(x), lambda f, x, v: jacobian(f, x)),
    "jacfwd": (lambda f, x, v: torch.func.jacfwd(f)(x), lambda f, x, v: jacobian(f, x)),
    "batched gradients": (lambda f, x, v: jacobian(f, x, vectorize=True), lambda f, x, v: jacobian(f, x)),
    "batched tangents": (
        lambda f, x, v: jacobian(f, x, vectorize=True, strategy="forward-mode"),
        lambda f, x, v: jacobian(f, x),
    ),
}
CALLS = {
    "plain": ((3, 2, 2), {}),
    "unbatched": ((3, 2), {}),
    "packed": ((5, 2), {}),
    "segments": (
        (3, 2, 2),
        {
            "resets": torch.tensor([[False, True], [True, False], [False, False]]),
            "lengths": torch.tensor([2, 3]),
            "return_cell_states": True,
        },
    ),
}


def _results(module, call, arguments):
    def f(x):
        y, states, *cells = module(PackedSequence(x, torch.tensor([2, 2, 1])) if call == "packed" else x, **arguments)
        y = y.data if call == "packed" else y
        return torch.cat([t.flatten() for t in (y, *states, *cells)])

    return f


OPTIONS = {"one layer": {}, "deep projection": {"num_layers": 2, "bidirectional": True, "proj_size": 1}}
AXES = {"transform": [*TRANSFORMS], "call": [*CALLS], "options": [*OPTIONS], "backend": ["auto", "triton"]}


@pytest.mark.parametrize("row", segmented.pairwise(AXES), ids=lambda row: " ".join(row.values()))
def test_of_any_call(row, device):
    """Each backend against the reference called plainly."""
    torch.manual_seed(0)
    transform, call, options, backend = row.values()
    shape, arguments = CALLS[call]
    arguments = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    options = dict(OPTIONS[options], dtype=torch.float64, device=device)
    module, plain = LSTM(2, 3, backend=backend, **options), LSTM(2, 3, backend="reference", **options)
    plain.load_state_dict(module.state_dict())
    x, v = torch.randn(2, *shape, dtype=torch.float64, device=device)
    transformed, expected = TRANSFORMS[transform]
    found = transformed(_results(module, call, arguments), x, v)
    torch.testing.assert_close(found, expected(_results(plain, call, arguments), x, v), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_of_the_cell_by_default(transform, device):
    torch.manual_seed(0)
    cell = LSTMCell(2, 3, dtype=torch.float64, device=device)
    plain = LSTMCell(2, 3, backend="reference", dtype=torch.float64, device=device)
    plain.load_state_dict(cell.state_dict())
    x, v = torch.randn(2, 4, 2, dtype=torch.float64, device=device)
    transformed, expected = TRANSFORMS[transform]
    found = transformed(lambda t: torch.cat(cell(t)), x, v)
    torch.testing.assert_close(found, expected(lambda t: torch.cat(plain(t)), x, v), rtol=1e-6, atol=1e-8)


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
