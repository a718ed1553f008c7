"""torch's own kernels: all layers at once or one by one, where cuDNN's dropout would not follow the seed; and the precision
that cuDNN finds set when its forward and its backward run."""

import pytest
import torch

from lstm_triton import LSTM, functional, torch_ops
from lstm_triton.kernels.device import fp32_precision
from lstm_triton.torch_ops import cudnn_precision


class _OnGPU(torch.Tensor):
    """A CPU tensor that says it lies on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_layers_with_dropout_run_one_by_one(packed, monkeypatch):
    """With torch's own dropout between them; without any they are the layers at once."""
    lstm = LSTM(3, 4, 3, bidirectional=True)
    x, hx = torch.randn(5, 2, 3), tuple(torch.randn(2, 6, 2, 4))
    function, sizes = (torch_ops.packed_lstm, (torch.tensor([2] * 5),)) if packed else (torch_ops.lstm, ())
    x = x.flatten(0, 1) if packed else x

    def run(x):
        return function(x, *sizes, hx, lstm._flat_weights, torch_ops.options_of(lstm))

    calls, expected = [], run(x)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: calls.append(p) or x)
    lstm.dropout = 0.5
    run(x)
    assert calls == []
    for found, whole in zip(run(x.as_subclass(_OnGPU)), expected):
        torch.testing.assert_close(found.as_subclass(torch.Tensor), whole)
    assert calls == [0.5, 0.5]


class _RecordedProduct(torch.autograd.Function):
    """x, and a note of the setting in forward and backward: as cuDNN does, it reads the setting when it runs."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        seen.append(("forward", torch.backends.cudnn.rnn.fp32_precision))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(("backward", torch.backends.cudnn.rnn.fp32_precision))
        return grad.clone(), None


@pytest.fixture
def seen(monkeypatch):
    """The settings that a stand-in for cuDNN read, in the order in which it ran; a CPU is taken to have one."""
    found, torchs = [], torch._VF.lstm

    def recording(x, *rest):
        return torchs(_RecordedProduct.apply(x, found), *rest)

    monkeypatch.setattr(torch._VF, "lstm", recording)
    monkeypatch.setattr(torch_ops, "_has_cudnn", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr("lstm_triton.lstm._is_torchs", lambda module, input: False)
    before = torch.backends.cudnn.rnn.fp32_precision
    yield found
    assert torch.backends.cudnn.rnn.fp32_precision == before


RUNS = {
    "eager": lambda lstm, x: lstm(x)[0],
    "functional": lambda lstm, x: functional.lstm(x, None, list(lstm.parameters()), precision=lstm.precision)[0],
    "packed": lambda lstm, x: lstm(torch.nn.utils.rnn.pack_sequence(list(x.unbind(1))))[0].data,
    "compiled": lambda lstm, x: torch.compile(lstm, backend="aot_eager", fullgraph=True)(x)[0],
    "checkpointed": lambda lstm, x: torch.utils.checkpoint.checkpoint(lambda x: lstm(x)[0], x, use_reentrant=False),
}


@pytest.mark.parametrize("run, precision", [*((run, "ieee") for run in RUNS), ("eager", "tf32")])
def test_forward_and_backward_find_the_precision_set(run, precision, seen):
    """Whatever is set when the backward runs; and the gradients are those of no precision given."""
    lstm, x = LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    other = "tf32" if precision == "ieee" else "ieee"
    with fp32_precision(torch.backends.cudnn.rnn, other):
        expected = torch.autograd.grad(lstm(x)[0].square().sum(), [x, *lstm.parameters()])
        assert seen == [("forward", other), ("backward", other)]
        seen.clear()
        torch._dynamo.reset()
        lstm.precision = precision
        found = torch.autograd.grad(RUNS[run](lstm, x).square().sum(), [x, *lstm.parameters()])
    assert {way for way, _ in seen} == {"forward", "backward"} and {setting for _, setting in seen} == {precision}
    for gradient, wanted in zip(found, expected):
        torch.testing.assert_close(gradient, wanted)


def test_the_graph_is_kept_as_long_as_torchs(seen):
    """And what torch refuses is refused: a second backward, a second derivative, an output changed in place."""
    lstm, x = LSTM(3, 4, precision="ieee"), torch.randn(5, 2, 3, requires_grad=True)
    loss = lstm(x)[0].square().sum()
    first, again = (torch.autograd.grad(loss, x, retain_graph=keep)[0] for keep in (True, False))
    torch.testing.assert_close(first, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    (gradient,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    _, (h, c) = lstm(x)
    (h.mul_(2) + c).sum().backward()
    weight = lstm.weight_hh_l0
    y = lstm(x)[0]
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_failing_backward_leaves_the_setting(seen, monkeypatch):
    lstm, x = LSTM(3, 4, precision="ieee"), torch.randn(5, 2, 3, requires_grad=True)
    y = lstm(x)[0]

    def fail(ctx, grad):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(_RecordedProduct, "backward", staticmethod(fail))
    with pytest.raises(torch.OutOfMemoryError):
        y.sum().backward()
    assert seen == [("forward", "ieee")]  # the fixture looks at the setting


def test_under_torch_func_the_setting_must_be_the_precision(seen, monkeypatch):
    lstm, x = LSTM(3, 4, precision="ieee"), torch.randn(5, 2, 3)
    gradient = torch.func.grad(lambda x: lstm(x)[0].square().sum())
    with pytest.raises(RuntimeError, match="set torch.backends.cudnn.rnn.fp32_precision"):
        gradient(x)
    monkeypatch.setattr(torch._VF, "lstm", torch._C._VariableFunctions.lstm)  # the stand-in knows no transforms
    with cudnn_precision("ieee"):
        found = gradient(x)
    x.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(lstm(x)[0].square().sum(), x)[0])
