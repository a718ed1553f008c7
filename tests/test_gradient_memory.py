"""Each gradient has memory of its own: a caller may scale one in place, and another must not change with it."""

import pytest
import torch
from support import segmented

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout

SEGMENTS = {
    "plain": {},
    "segments": {"lengths": torch.tensor([2]), "resets": torch.tensor([[True], [False], [True]])},
    "no steps": {"lengths": torch.tensor([0])},
}


def assert_apart(gradients, others):
    addresses = [t.untyped_storage().data_ptr() for t in gradients if t is not None]
    assert addresses and len(set(addresses)) == len(addresses)
    assert not set(addresses) & {t.untyped_storage().data_ptr() for t in others}


def check(outputs, leaves, create_graph):
    given = [torch.randn_like(t) for t in outputs]
    found = torch.autograd.grad(outputs, leaves, given, create_graph=create_graph, allow_unused=True)
    assert_apart(found, (*given, *leaves, *outputs))
    if create_graph:
        loss = sum(g.square().sum() for g in found if g is not None)
        second = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert_apart(second, leaves)


backends = pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
recorded = pytest.mark.parametrize("create_graph", [False, True])
OPTIONS = {
    "one layer": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "recompute": {"recompute": True},
    "projection": {"proj_size": 1},
}
AXES = {"backend": ["triton", "auto", "reference"], "segments": [*SEGMENTS], "options": [*OPTIONS]}


@recorded
@pytest.mark.parametrize("row", segmented.pairwise(AXES), ids=lambda row: " ".join(row.values()))
def test_of_a_layer(row, create_graph, device):
    backend, segments, options = row["backend"], row["segments"], OPTIONS[row["options"]]
    torch.manual_seed(0)
    H = 1 + options.get("proj_size", 0)
    module = LSTM(2, H, backend=backend, device=device, **options)
    x = torch.randn(3, 1, 2, device=device, requires_grad=True)
    D = module.num_layers * (2 if module.bidirectional else 1)
    hx = [torch.randn(D, 1, n, device=device, requires_grad=True) for n in (module.proj_size or H, H)]
    y, states = module(x, hx, **{name: t.to(device) for name, t in SEGMENTS[segments].items()})
    check((y, *states), (x, *hx, *module.parameters()), create_graph)


@backends
@recorded
@pytest.mark.parametrize("kind", [LSTMCell, SoftmaxReadout])
@pytest.mark.parametrize("size", [1, 3])
def test_of_a_step(size, kind, backend, create_graph, device):
    torch.manual_seed(0)
    module = kind(2, size, backend=backend, device=device)
    x = torch.randn(1, 2, device=device, requires_grad=True)
    outputs = module(x)
    check(outputs if kind is LSTMCell else (outputs,), (x, *module.parameters()), create_graph)
