"""LSTM as a drop-in for torch.nn.LSTM: what it computes, forward and backward, beside torch's own."""

import copy

import pytest
import torch
from support.lstms import assert_close, backends, flat, gradients, pair, states, trained
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from lstm_triton import LSTM, LSTMCell

T, B, I, H = 3, 3, 2, 3


def _input(module, device, *, dtype=torch.float64, T=T, B=B):
    shape = (B, T, I) if module.batch_first else (T, B, I)
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)


OPTIONS = {
    "one layer": {},
    "no bias": {"bias": False},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "batch_first": {"batch_first": True},
    "projection": {"proj_size": 2},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "deep projection": {"num_layers": 2, "bidirectional": True, "batch_first": True, "proj_size": 1, "bias": False},
}


@backends
@pytest.mark.parametrize("options", OPTIONS)
def test_trains_like_torch(options, backend, device):
    theirs, ours = pair(I, H, **OPTIONS[options], backend=backend, device=device)
    x, (h, c) = _input(ours, device), states(ours, B, requires_grad=True)
    assert_close(trained(ours, x, (h, c), (x, h, c)), trained(theirs, x, (h, c), (x, h, c)))
    result = ours(x)
    assert isinstance(result, tuple) and isinstance(result[1], tuple) and len(result) == 2
    assert_close(flat(result), flat(theirs(x)))
    assert result[0].dtype == x.dtype


@backends
def test_forms_of_hx(backend, device):
    theirs, ours = pair(I, H, num_layers=2, backend=backend, device=device)
    x, (h, c) = _input(ours, device), states(ours, B)
    learned = torch.randn(2, 1, H, dtype=x.dtype, device=device, requires_grad=True)
    every_second = torch.randn(2, 2 * B, 2 * H, dtype=x.dtype, device=device)[:, ::2, ::2]
    for hx in (
        [h, c],
        torch.stack((h, c)).unbind(),
        (learned.expand(2, B, H), learned.tanh().expand(2, B, H)),
        (every_second, h.transpose(0, 1).contiguous().transpose(0, 1)),
        (h.mT.contiguous().mT, c),
    ):
        leaves = (x, learned)
        assert_close(trained(ours, x, hx, leaves), trained(theirs, x, hx, leaves))


@backends
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_without_a_batch(batch_first, backend, device):
    theirs, ours = pair(I, H, 2, bidirectional=True, batch_first=batch_first, backend=backend, device=device)
    x = torch.randn(T, I, dtype=torch.float64, device=device, requires_grad=True)
    h, c = states(ours, None, requires_grad=True)
    assert_close(trained(ours, x, (h, c), (x, h, c)), trained(theirs, x, (h, c), (x, h, c)))
    assert_close(trained(ours, x, None, (x,)), trained(theirs, x, None, (x,)))


@backends
@pytest.mark.parametrize("layout", ["strided", "time of a batch-first tensor", "expanded"])
def test_layouts_of_the_input(layout, backend, device):
    theirs, ours = pair(I, H, bidirectional=True, backend=backend, device=device)
    if layout == "strided":
        x = torch.randn(T, 2 * B, 2 * I, dtype=torch.float64, device=device)[:, ::2, ::2]
    elif layout == "expanded":
        x = torch.randn(T, 1, I, dtype=torch.float64, device=device).expand(T, B, I)
    else:
        x = torch.randn(B, T, I, dtype=torch.float64, device=device).transpose(0, 1)
    x.requires_grad_()
    assert_close(trained(ours, x, None, (x,)), trained(theirs, x, None, (x,)))


# ---- packed sequences ------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    "lengths, options", [((2, 3, 1), {}), ((3, 2, 2), {"batch_first": True}), ((1, 3, 2), {"proj_size": 2})], ids=str
)
def test_packed_sequences(lengths, options, backend, device):
    """Everything is in the caller's order of rows but the data, whose order is torch's."""
    theirs, ours = pair(I, H, 2, bidirectional=True, **options, backend=backend, device=device)
    batch_first = ours.batch_first
    x, (h, c) = _input(ours, device, B=len(lengths)), states(ours, len(lengths), requires_grad=True)
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first, enforce_sorted=False)
    assert_close(trained(ours, packed, (h, c), (x, h, c)), trained(theirs, packed, (h, c), (x, h, c)))
    found, expected = ours(packed), theirs(packed)
    assert_close(flat(found), flat(expected))
    assert type(found[0]) is PackedSequence
    for ours_, theirs_ in zip(found[0][1:], expected[0][1:]):
        assert torch.equal(ours_, theirs_)
    assert pad_packed_sequence(found[0], batch_first)[1].tolist() == list(lengths)


@backends
def test_sorted_packed_sequence_keeps_no_indices(backend, device):
    theirs, ours = pair(I, H, backend=backend, device=device)
    packed = pack_sequence([torch.randn(n, I, dtype=torch.float64, device=device) for n in (3, 2, 1)])
    found, expected = ours(packed), theirs(packed)
    assert_close(flat(found), flat(expected))
    assert found[0].sorted_indices is None and found[0].unsorted_indices is None


# ---- training ----------------------------------------------------------------------------------------------------------


@backends
def test_backward_in_evaluation_mode(backend, device):
    theirs, ours = (module.eval() for module in pair(I, H, 2, dropout=0.5, backend=backend, device=device))
    x = _input(ours, device)
    with torch.backends.cudnn.flags(enabled=False):
        expected = trained(theirs, x, None, (x,))
    assert_close(trained(ours, x, None, (x,)), expected)


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
    x = _input(ours, device).detach()
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
    theirs, ours = pair(I, H, 2, backend=backend, device=device)
    x = _input(ours, device)
    for module in (theirs, ours):
        module(x)
        with torch.no_grad():
            module.weight_hh_l1.mul_(2)
        module.bias_ih_l0 = torch.nn.Parameter(torch.full_like(module.bias_ih_l0, 0.5))
    assert_close(flat(ours(x)), flat(theirs(x)))
    others = {name: p.detach() * 3 for name, p in ours.named_parameters()}
    assert_close(*(flat(torch.func.functional_call(module, others, (x,))) for module in (ours, theirs)))
    assert_close(flat(ours(x)), flat(theirs(x)))


@backends
def test_parametrized_weights(backend, device):
    theirs, ours = pair(I, H, backend=backend, device=device)
    for module in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = _input(ours, device)
    expected = trained(theirs, x, None, (x,))
    assert_close(trained(ours, x, None, (x,)), expected)
    assert expected[-1].abs().sum() > 0


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_weights_tied_with_a_cell(backend, device):
    _, layer = pair(I, H, backend=backend, device=device)
    cell = LSTMCell(I, H, device=device, dtype=torch.float64, backend=backend, precision="ieee")
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(layer, f"{name}_l0"))
    x, (h, c) = _input(layer, device), states(layer, B)
    y, (h_n, c_n) = layer(x, (h, c))
    h, c = h[0], c[0]
    for t in range(T):
        h, c = cell(x[t], (h, c))
        assert_close(h, y[t])
    assert_close([h, c], [h_n[0], c_n[0]])
    alone = gradients([h, c], layer.parameters())
    together = gradients([h, c, h_n[0], c_n[0]], layer.parameters())
    assert len(alone) == 4 and all(not torch.equal(a, b) for a, b in zip(alone, together))
    assert_close(gradients([h, c], layer.parameters()), gradients([h_n[0], c_n[0]], layer.parameters()))


@backends
@pytest.mark.parametrize("num_layers", [1, 2])
def test_states_own_their_storage(num_layers, backend, device):
    """Clients clear rows of h_n and c_n in place between steps, and go backward later."""
    theirs, ours = pair(I, H, num_layers, backend=backend, device=device)
    x = _input(ours, device, T=3)
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
    y, (h, c) = ours(x)
    assert len({t.untyped_storage().data_ptr() for t in (x, y, h, c)}) == 4


@backends
def test_no_rows(backend, device):
    _, ours = pair(I, H, 2, bidirectional=True, batch_first=True, backend=backend, device=device)
    x = torch.randn(0, T, I, dtype=torch.float64, device=device, requires_grad=True)
    found = flat(ours(x))
    assert [t.shape for t in found] == [(0, T, 2 * H), (4, 0, H), (4, 0, H)]
    sum(t.sum() for t in found).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


@backends
def test_no_steps(backend, device):
    theirs, ours = pair(I, H, backend=backend, device=device)
    x = torch.randn(0, B, I, dtype=torch.float64, device=device)
    for module in (theirs, ours):
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            module(x)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype, backend, device):
    _, exact = pair(I, H, 2, bidirectional=True, backend="reference", device=device)
    ours = LSTM(I, H, 2, bidirectional=True, dtype=dtype, device=device, backend=backend, precision="ieee")
    ours.load_state_dict({name: p.to(dtype) for name, p in exact.state_dict().items()})
    x = _input(ours, device, dtype=dtype)
    found = flat(ours(x))
    assert all(t.dtype == dtype for t in found)
    # That it is the same function; test_lstm_segments judges the accuracy.
    for a, b in zip(found, flat(exact(x.double()))):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=16 * torch.finfo(dtype).eps)
    moved = copy.deepcopy(ours).double()
    assert flat(moved(x.double()))[0].dtype == torch.float64
