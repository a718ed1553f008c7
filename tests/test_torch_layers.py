"""torch's own kernels, all layers at once or one by one, where cuDNN's dropout would not follow the seed."""

import pytest
import torch

from lstm_triton import torch_ops


class _OnGPU(torch.Tensor):
    """A CPU tensor that says it lies on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def _arguments(packed):
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(3, 4, 3, bidirectional=True)
    hx = torch.randn(6, 2, 4), torch.randn(6, 2, 4)
    x, sizes = torch.randn(5, 2, 3), [2] * 5
    function = torch_ops.packed_lstm if packed else torch_ops.lstm
    x, first = (x.flatten(0, 1), (torch.tensor(sizes),)) if packed else (x, ())
    return lambda x, dropout: function(x, *first, hx, lstm._flat_weights, True, 3, dropout, True, True), x


@pytest.mark.parametrize("packed", [False, True])
def test_layers_one_by_one_are_the_layers_at_once(packed, monkeypatch):
    run, x = _arguments(packed)
    expected = run(x, 0.0)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: x)
    for found, whole in zip(run(x.as_subclass(_OnGPU), 0.5), expected):
        torch.testing.assert_close(found.as_subclass(torch.Tensor), whole)


@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_dropout_is_torchs_own(packed, monkeypatch):
    run, x = _arguments(packed)
    calls = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: calls.append(p) or x)
    run(x, 0.5)
    assert calls == []
    run(x.as_subclass(_OnGPU), 0.5)
    assert calls == [0.5, 0.5]
