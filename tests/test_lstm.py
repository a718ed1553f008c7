"""LSTM as a drop-in for torch.nn.LSTM: what it computes, forward and backward, beside torch's own."""

import warnings

import pytest
import torch
from support.lstms import assert_close, backends, flat, gradients, pair, states, trained
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

T, B, I, H = 3, 3, 2, 3
BIDIRECTIONAL, DEEP = {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}


def _padded(*shape):
    """A call with an input of this shape, and a state."""

    def call(module, normal):
        x = normal(*shape)
        hx = states(module, None if x.dim() == 2 else x.shape[0 if module.batch_first else 1], requires_grad=True)
        return x, hx, (x, *hx)

    return call


def _laid_out(layout):
    """A call with an input that is no dense [T, B, I] in memory."""

    def call(module, normal):
        x = layout(normal).detach().requires_grad_()
        return x, states(module, B), (x,)

    return call


def _packed(*lengths):
    def call(module, normal):
        n = len(lengths)
        x, hx = normal(*((n, T) if module.batch_first else (T, n)), I), states(module, n, requires_grad=True)
        return pack_padded_sequence(x, torch.tensor(lengths), module.batch_first, enforce_sorted=False), hx, (x, *hx)

    return call


def _sorted(module, normal):
    return pack_sequence([normal(n, I) for n in (3, 2, 1)]), states(module, 3), ()


def _with_states(change):
    """A call whose states are what `change` makes of two of shape [D, B, H]."""

    def call(module, normal):
        x, h, c = normal(T, B, I), *states(module, B, requires_grad=True)
        return x, change(h, c), (x, h, c)

    return call


CALLS = {
    "one layer": ({}, _padded(T, B, I)),
    "no bias": ({"bias": False}, _padded(T, B, I)),
    "layers": ({"num_layers": 3}, _padded(T, B, I)),
    "bidirectional": (BIDIRECTIONAL, _padded(T, B, I)),
    "batch first": ({"batch_first": True}, _padded(B, T, I)),
    "projection": ({"proj_size": 2}, _padded(T, B, I)),
    "deep": (DEEP | {"batch_first": True}, _padded(B, T, I)),
    "deep projection": (DEEP | {"batch_first": True, "proj_size": 1, "bias": False}, _padded(B, T, I)),
    "dropout after the last layer": (BIDIRECTIONAL | {"dropout": 0.9}, _padded(T, B, I)),
    "dropout of everything": (DEEP | {"dropout": 1.0}, _padded(T, B, I)),
    "without a batch": (DEEP, _padded(T, I)),
    "without a batch, batch first": (DEEP | {"batch_first": True}, _padded(T, I)),
    "strided": (BIDIRECTIONAL, _laid_out(lambda normal: normal(T, 2 * B, 2 * I)[:, ::2, ::2])),
    "time of a batch-first tensor": (BIDIRECTIONAL, _laid_out(lambda normal: normal(B, T, I).transpose(0, 1))),
    "expanded": (BIDIRECTIONAL, _laid_out(lambda normal: normal(T, 1, I).expand(T, B, I))),
    "packed": (DEEP, _packed(2, 3, 1)),
    "packed, batch first": (DEEP | {"batch_first": True}, _packed(3, 2, 2)),
    "packed, projection": (DEEP | {"proj_size": 2}, _packed(1, 3, 2)),
    "packed, sorted": ({}, _sorted),
    "a list of states": ({"num_layers": 2}, _with_states(lambda h, c: [h, c])),
    "unbound states": ({"num_layers": 2}, _with_states(lambda h, c: torch.stack((h, c)).unbind())),
    "states of one row": ({}, _with_states(lambda h, c: (h[:, :1].expand(1, B, H), c[:, :1].expand(1, B, H)))),
    "states of other strides": (
        {"num_layers": 2},
        _with_states(lambda h, c: (h.mT.contiguous().mT, c.transpose(0, 1).contiguous().transpose(0, 1))),
    ),
}


@backends
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_torchs(name, backend, device):
    """Everything about a PackedSequence is in the caller's order of rows but the data, whose order is torch's."""
    options, call = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dropout that does nothing
        theirs, ours = pair(I, H, **options, backend=backend, device=device)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    x, hx, leaves = call(ours, normal)
    with torch.backends.cudnn.flags(enabled=options.get("dropout") != 1):  # torch's zeros there, whatever cuDNN's are
        wanted, expected = trained(theirs, x, hx, leaves), theirs(x)
    assert_close(trained(ours, x, hx, leaves), wanted)
    result = ours(x)
    assert type(result) is type(result[1]) is tuple and type(result[0]) is type(expected[0])
    assert_close(flat(result), flat(expected))
    if isinstance(x, PackedSequence):
        for found, wanted in zip(result[0][1:], expected[0][1:]):
            assert found is wanted is None or torch.equal(found, wanted)


@backends
def test_no_rows(backend, device):
    _, ours = pair(I, H, 2, bidirectional=True, batch_first=True, backend=backend, device=device)
    x = torch.randn(0, T, I, dtype=torch.float64, device=device, requires_grad=True)
    found = flat(ours(x))
    assert [t.shape for t in found] == [(0, T, 2 * H), (4, 0, H), (4, 0, H)]
    sum(t.sum() for t in found).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


# ---- training ----------------------------------------------------------------------------------------------------------


def test_second_derivatives_through_layers_and_projections_are_torchs(device):
    theirs, ours = pair(1, 2, num_layers=2, bidirectional=True, proj_size=1, backend="triton", device=device)
    x = torch.randn(2, 2, 1, dtype=torch.float64, device=device, requires_grad=True)
    h, c = states(ours, 2, requires_grad=True)
    results = []
    for module in (theirs, ours):
        with torch.backends.cudnn.flags(enabled=False):  # it has no second derivatives
            leaves = [x, h, c, *module.parameters()]
            first = torch.autograd.grad([t.pow(2).sum() for t in flat(module(x, (h, c)))], leaves, create_graph=True)
            results.append([*first, *gradients([sum(g.pow(2).sum() for g in first)], leaves)])
    assert_close(*results)


@backends
def test_weights_can_be_frozen(backend, device):
    theirs, ours = pair(I, H, bidirectional=True, backend=backend, device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    expected = gradients(flat(theirs(x)), theirs.parameters())
    for trainable in (slice(0, None, 2), slice(1, None, 2)):
        ours.requires_grad_(False)
        some = list(ours.parameters())[trainable]
        for p in some:
            p.requires_grad_()
        results = flat(ours(x))
        assert_close(gradients(results, some), expected[trainable])
        sum(t.sum() for t in results).backward()
        assert [p.grad is not None for p in ours.parameters()] == [p.requires_grad for p in ours.parameters()]
        ours.zero_grad()
    ours.requires_grad_(False)
    assert not any(t.requires_grad for t in flat(ours(x)))


@backends
def test_parameters_are_read_on_every_call(backend, device):
    """Whether they were changed, replaced, or are computed from others."""
    theirs, ours = pair(I, H, 2, backend=backend, device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    for module in (theirs, ours):
        module(x)
        with torch.no_grad():
            module.weight_hh_l1.mul_(2)
        module.bias_ih_l0 = torch.nn.Parameter(torch.full_like(module.bias_ih_l0, 0.5))
    assert_close(trained(ours, x), trained(theirs, x))
    for module in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    expected = trained(theirs, x, None, (x,))
    assert_close(trained(ours, x, None, (x,)), expected)
    assert expected[-1].abs().sum() > 0


@backends
@pytest.mark.parametrize("num_layers", [1, 2])
def test_states_own_their_storage(num_layers, backend, device):
    """Clients clear rows of h_n and c_n in place between steps, and go backward later."""
    theirs, ours = pair(I, H, num_layers, backend=backend, device=device)
    x = torch.randn(3, B, I, dtype=torch.float64, device=device, requires_grad=True)
    done = torch.tensor([False, True, False], device=device)
    results = []
    for module, in_place in ((ours, True), (theirs, False)):
        hx, outputs = None, []
        for t in range(3):
            y, hx = module(x[t : t + 1], hx)
            outputs.append(y)
            if in_place:
                for state in hx:
                    state[:, done] = 0
            else:
                hx = tuple(state * ~done[:, None] for state in hx)
        results.append([*outputs, *hx, *gradients([*outputs, *hx], [x, *module.parameters()])])
    assert_close(*results)
    for steps in (1, 3):
        given = x[:steps].clone()
        y, (h, c), cells = ours(given, return_cell_states=True)
        assert len({t.untyped_storage().data_ptr() for t in (given, y, h, c, cells)}) == 5
