"""torch.func, forward-mode AD and batched gradients, where no kernel can serve: never silently wrong."""

import pytest
import torch
from support import segmented
from support.operations import OPERATIONS, operations
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian, vhp
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import LSTM


def _dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def _without_gradients(f, x, v):
    with torch.no_grad():
        return _dual(f, x, v)


def _difference(f, x, v, step=1e-6):
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


def _loss(f):
    return lambda t: f(t).square().sum() + f(t).pow(3).sum()


# What each gives of f at x, in the direction v or at v, and the same from calls of f and its gradient alone.
TRANSFORMS = {
    "forward mode": (_dual, _difference),
    "forward mode without gradients": (_without_gradients, _difference),
    "jvp": (lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1], _difference),
    "vjp": (
        lambda f, x, v: torch.func.vjp(_loss(f), x)[1](x.sum())[0],
        lambda f, x, v: x.sum() * jacobian(_loss(f), x),
    ),
    "vmap": (lambda f, x, v: torch.func.vmap(f)(torch.stack((x, v))), lambda f, x, v: torch.stack((f(x), f(v)))),
    "vmap of grad": (
        lambda f, x, v: torch.func.vmap(torch.func.grad(_loss(f)))(torch.stack((x, v))),
        lambda f, x, v: torch.stack([jacobian(_loss(f), t) for t in (x, v)]),
    ),
    "grad of grad": (
        lambda f, x, v: torch.func.grad(lambda t: (torch.func.grad(_loss(f))(t) * v).sum())(x),
        lambda f, x, v: vhp(_loss(f), x, v)[1],
    ),
    "hessian": (lambda f, x, v: torch.func.hessian(_loss(f))(x), lambda f, x, v: hessian(_loss(f), x)),
    "jacrev": (lambda f, x, v: torch.func.jacrev(f)(x), lambda f, x, v: jacobian(f, x)),
    "jacfwd": (lambda f, x, v: torch.func.jacfwd(f)(x), lambda f, x, v: jacobian(f, x)),
    "batched gradients": (lambda f, x, v: jacobian(f, x, vectorize=True), lambda f, x, v: jacobian(f, x)),
    "batched tangents": (
        lambda f, x, v: jacobian(f, x, vectorize=True, strategy="forward-mode"),
        lambda f, x, v: jacobian(f, x),
    ),
}


def _assert_transformed_alike(transform, ours, plain, x, v):
    transformed, expected = TRANSFORMS[transform]
    torch.testing.assert_close(transformed(ours, x, v), expected(plain, x, v), rtol=1e-6, atol=1e-8)


OF_OPERATORS = [(name, "triton") for name in ("cell", "readout", "GRU layer", "sLSTM layer")]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name, backend", [*OF_OPERATORS, ("cell", "auto")])
def test_of_an_operator(name, backend, transform, device):
    operation = OPERATIONS[name]
    x, *others = (t.detach() for t in operation.draw(device)[0])

    def joined(function):
        return lambda x: torch.cat([t.flatten() for t in function(x, *others)])

    _assert_transformed_alike(transform, joined(operation.by(backend)), joined(operation.plain), x, torch.randn_like(x))


@operations("cell", "readout", "layer", "GRU layer")
def test_gradients_per_sample(operation, device):
    x, *others = (t.detach() for t in operation.draw(device)[0])
    xs = torch.stack([x, torch.randn_like(x), -x])

    def gradients(function):
        return torch.func.grad(lambda others, x: sum(t.square().sum() for t in function(x, *others)))

    each = torch.func.vmap(gradients(operation.run), in_dims=(None, 0))(others, xs)
    one_by_one = zip(*(gradients(operation.plain)(others, x) for x in xs))
    torch.testing.assert_close(each, [torch.stack(found) for found in one_by_one])


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
OF_LAYERS = [name for name in TRANSFORMS if name not in ("vjp", "grad of grad", "hessian")]
AXES = {"transform": OF_LAYERS, "call": [*CALLS], "options": [*OPTIONS], "backend": ["auto", "triton"]}


@pytest.mark.parametrize("row", segmented.pairwise(AXES), ids=lambda row: " ".join(row.values()))
def test_of_any_call_of_a_layer(row, device):
    """Each backend against the reference called plainly."""
    transform, call, options, backend = row.values()
    shape, arguments = CALLS[call]
    arguments = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    given = dict(dtype=torch.float64, device=device, **OPTIONS[options])
    module, plain = (LSTM(2, 3, backend=of, **given) for of in (backend, "reference"))
    plain.load_state_dict(module.state_dict())
    x, v = torch.randn(2, *shape, dtype=torch.float64, device=device)
    _assert_transformed_alike(transform, _results(module, call, arguments), _results(plain, call, arguments), x, v)
