"""Each gradient has memory of its own: a caller may scale one in place, and another must not change with it."""

import pytest
import torch
from support import segmented
from support.lstms import states
from torch.utils._pytree import tree_leaves

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


MODULES = {
    "one layer": (LSTM, {}),
    "deep": (LSTM, {"num_layers": 2, "bidirectional": True}),
    "recompute": (LSTM, {"recompute": True}),
    "projection": (LSTM, {"proj_size": 1}),
    "cell": (LSTMCell, {}),
    "readout": (SoftmaxReadout, {}),
}
AXES = {"backend": ["triton", "auto", "reference"], "module": [*MODULES], "units": [1, 3], "segments": [*SEGMENTS]}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("row", segmented.pairwise(AXES), ids=lambda row: " ".join(map(str, row.values())))
def test_each_gradient_has_memory_of_its_own(row, create_graph, device):
    kind, options = MODULES[row["module"]]
    torch.manual_seed(0)
    H = row["units"] + options.get("proj_size", 0)
    module = kind(2, H, backend=row["backend"], device=device, **options)
    x = torch.randn(3, 1, 2, device=device, requires_grad=True)
    leaves, segments = [x, *module.parameters()], {}
    if kind is LSTM:
        segments = {name: t.to(device) for name, t in SEGMENTS[row["segments"]].items()}
        hx = [t.requires_grad_() for t in states(module, 1)]
        leaves, outputs = [*leaves, *hx], tree_leaves(module(x, hx, **segments))
    else:
        outputs = tree_leaves(module(x[0] if kind is LSTMCell else x))
    given = [torch.randn_like(t) for t in outputs]
    found = torch.autograd.grad(outputs, leaves, given, create_graph=create_graph, allow_unused=True)
    assert_apart(found, (*given, *leaves, *outputs))
    if create_graph:
        loss = sum(g.square().sum() for g in found if g is not None)
        assert_apart(torch.autograd.grad(loss, leaves, allow_unused=True), leaves)
