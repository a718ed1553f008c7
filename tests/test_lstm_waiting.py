"""The host does not wait for the GPU: no value of a tensor is read, and what lies on the CPU is sent without waiting."""

import pytest
import torch
from support import segmented
from support.lstms import flat
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from lstm_triton import LSTM, dispatch, layers, operators, segments
from lstm_triton.kernels.inputs import LayerGradients, LayerInputs, LayerOptions, Segments, split_weights

I, H = 2, 3


class _NoValues(TorchDispatchMode):
    """Forbids reading a tensor's value, which waits for a GPU; but that of `allowed`, which is on the CPU, may be read."""

    def __init__(self, allowed=None):
        super().__init__()
        self.allowed = None if allowed is None else allowed.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            assert args[0].untyped_storage().data_ptr() == self.allowed, f"{name} of {args[0].shape}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
def test_launchers_read_no_values(recompute, device):
    case = segmented.Case(bidirectional=True, resets="stored", rows="lengths", recompute=recompute)
    drawn = segmented.draw(case, device)
    x, h0, c0, *weights, reset_h, reset_c = drawn.inputs
    (directions,) = split_weights(weights, 1, 2)
    given = Segments(drawn.resets, reset_h, reset_c, drawn.lengths.to(device))
    inputs = LayerInputs.of(x, (h0, c0), directions, given, layers.random_seed(torch.empty(0, device=device)))
    options = LayerOptions("ieee", 0.5, recompute=recompute)
    layer = operators.lstm_layer
    with _NoValues():
        saved = layer.save(layer.launch(inputs, options, True))
        layer.launch_backward(LayerGradients(*drawn.cotangents), inputs, saved, set(LayerInputs._fields), options)


def test_packed_sequences_read_no_values(monkeypatch):
    """The lengths come from batch_sizes, which are on the CPU; everything else has no values here."""
    monkeypatch.setattr(dispatch, "layer_backend", lambda *args: "triton")
    lstm, batch_sizes = LSTM(I, H, 2, bidirectional=True, device="meta"), torch.tensor([3, 2, 1, 1])
    data = torch.empty(7, I, device="meta")
    indices = torch.empty(3, dtype=torch.int64, device="meta")
    with _NoValues(batch_sizes):
        y, (h, c) = lstm(PackedSequence(data, batch_sizes, indices, indices))
    assert y.data.shape == (7, 2 * H) and h.shape == c.shape == (4, 3, H)


class _Sent:
    """Stands for a tensor on the CPU, and writes down how it reaches the GPU."""

    device = torch.device("cpu")
    holds: object = None

    def copy_(self, other):
        self.holds = other
        return self

    def to(self, device, **options):
        return self, device, options


def test_resets_and_lengths_reach_a_gpu_without_waiting(monkeypatch):
    """Through pinned memory of their own, from which the GPU copies when it gets there; in a capture as torch would do it."""
    given, pinned, gpu = _Sent(), _Sent(), torch.device("cuda", 0)
    monkeypatch.setattr(torch, "empty_like", lambda t, pin_memory=False: pinned if t is given and pin_memory else None)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert segments.sent(given, gpu) == (pinned, gpu, {"non_blocking": True}) and pinned.holds is given
    capturing = True
    assert segments.sent(given, gpu) == (given, gpu, {})


def test_resets_and_lengths_on_the_cpu(device):
    """Of a layer on another device they are the same as on that device, and may change as soon as the call returns."""
    lstm = LSTM(I, H, device=device, backend="triton", precision="ieee")
    x, resets, lengths = torch.randn(4, 3, I, device=device), torch.rand(4, 3) < 0.5, torch.tensor([2, 4, 0])
    expected = flat(lstm(x, resets=resets.to(device), lengths=lengths.to(device)))
    found = flat(lstm(x, resets=resets, lengths=lengths))
    resets.logical_not_()
    lengths.fill_(1)
    assert all(map(torch.equal, found, expected))
