"""The operators for compilers, and what is not a plain call of compiled modules. Those of each kind: test_recorded."""

import re

import pytest
import torch
from support.operations import cell, operations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout, dispatch
from lstm_triton.kernels.inputs import LayerInputs, LayerOptions, Segments, split_weights

pytestmark = pytest.mark.long

T, B, I, H = 3, 2, 2, 3


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("some", [False, True], ids=["all gradients", "some gradients"])
@operations("cell", "readout", "layer without biases", "layer with segments", "sLSTM layer", "zoneout layer")
def test_operators_pass_opcheck(operation, some, device, monkeypatch):
    """Forward, with and without what the backward takes, and backward, also where not all gradients arrive."""
    calls = {}
    for name in ("launch", "launch_backward"):
        launch = getattr(operation.operator, name)
        monkeypatch.setattr(
            operation.operator, name, lambda *args, n=name, f=launch: calls.setdefault(n, args) and f(*args)
        )
    leaves, cotangents = operation.draw(device, torch.float32 if operation.names else torch.float64)
    for t in leaves[:: 2 if some else len(leaves)]:
        t.requires_grad_(not some)
    torch.autograd.grad(operation.run(*leaves), [t for t in leaves if t.requires_grad], cotangents)
    (inputs, options, _), (grads, _, saved, names, _) = calls["launch"], calls["launch_backward"]
    full = operation is cell and not some  # which takes seconds
    checks = {} if full else {"test_utils": "test_faketensor"}
    for save in (False, True) if checks else (True,):
        given = [t if t is None else t.detach().requires_grad_(save and t.requires_grad) for t in inputs]
        torch.library.opcheck(operation.operator.operator, (*given, *options, save), **checks)
    inputs = [t if t is None else t.detach() for t in inputs]
    needs = [name in names for name in operation.operator.names]
    for arrived in (grads, (None, *grads[1:]))[: len(cotangents) if checks else 1]:
        arguments = (*arrived, *inputs, *saved, *options, needs)
        torch.library.opcheck(operation.operator.backward_operator, arguments, **checks)


def test_an_operator_that_saved_nothing_refuses_a_backward(device):
    leaves, _ = cell.draw(device)
    results = [torch.ops.lstm_triton.lstm_cell(*leaves, None, None, "lstm", save) for save in (True, False)]
    assert not results[0][2].requires_grad, "the saved gates"
    with pytest.raises(RuntimeError, match="save=False"):
        results[1][0].sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fake_results_have_the_memory_order_of_real_ones(dropout, recompute, device):
    """What a compiler plans with: batch-major as x, or time-major where the gates are rebuilt."""
    x = torch.randn(B, T, I, device=device).transpose(0, 1)
    h0, c0, resets = *torch.randn(2, 2, B, H, device=device), torch.rand(T, B, device=device) < 0.5
    segments = Segments(resets, *torch.randn(2, T, 2, B, H, device=device), torch.tensor([T, 1], device=device))
    weights = [torch.randn(shape, device=device) for _ in range(2) for shape in ((4 * H, I), (4 * H, H))]
    (directions,) = split_weights(weights, 1, 2)
    seed = torch.tensor([1], device=device) if dropout else None
    inputs = LayerInputs.of(x, (h0, c0), directions, segments, seed)
    options = LayerOptions("ieee", dropout, recompute=recompute, stepwise=True)
    forward = (*inputs, *options, True)
    y, _, _, c, gates, h = torch.ops.lstm_triton.lstm_layer(*forward)
    saved = (h if dropout else y, c, None if recompute else gates)
    needs = [t is not None and t.is_floating_point() for t in inputs]
    backward = (torch.randn_like(y), None, None, None, *inputs, *saved, *options, needs)
    torch.library.opcheck(torch.ops.lstm_triton.lstm_layer, forward, test_utils="test_faketensor")
    torch.library.opcheck(torch.ops.lstm_triton.lstm_layer_backward, backward, test_utils="test_faketensor")


# ---- modules ---------------------------------------------------------------------------------------------------------


@operations("cell")
def test_a_transform_inside_of_what_is_compiled(operation, device):
    arguments, _ = operation.draw(device)
    loss = lambda *tensors: sum(t.square().sum() for t in operation.run(*tensors))  # noqa: E731
    of_all = torch.func.grad(loss, tuple(range(len(arguments))))
    found = torch.compile(of_all, backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(found, of_all(*arguments))


def _lstm(backend, device, **options):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, **options}
    return LSTM(I, H, **options, device=device, backend=backend, precision="ieee")


@pytest.mark.parametrize("kind", [LSTMCell, SoftmaxReadout])
def test_inference_and_autocast_in_one_graph(kind, device):
    module, x = kind(I, H, device=device, backend="triton"), torch.randn(B, I, device=device)

    def step(x, low):
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return tree_leaves(module(x))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for low in (False, True):
        with torch.set_grad_enabled(low):
            found, expected = compiled(x, low), step(x, low)
        assert all(map(torch.equal, found, expected)) and found[0].requires_grad == low
        assert [t.dtype for t in found] == [t.dtype for t in expected]


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiled_dropout(backend, device):
    """Dropped in training, by the compiler's random numbers, and not in evaluation mode."""
    lstm = _lstm(backend, device, dropout=0.5, bidirectional=False)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    x = torch.randn(B, T, I, device=device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = compiled(x)[0]
        runs.append((y, *torch.autograd.grad(y.sum(), lstm.parameters())))
    assert all(map(torch.equal, runs[0], runs[1])) and not any(map(torch.equal, runs[0], runs[2]))
    lstm.eval()
    torch.testing.assert_close(compiled(x)[0], lstm(x)[0])


@pytest.mark.parametrize("kind, backend", [(LSTM, "auto"), (LSTM, "triton"), (LSTMCell, "triton")])
def test_second_derivatives_are_right_or_refused(kind, backend, device):
    module = kind(I, H, device=device, backend=backend)
    x = torch.randn(*(() if kind is LSTMCell else (T,)), B, I, device=device, requires_grad=True)

    def second(module):
        y = module(x)[0]
        (gradient,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), x)[0]

    refused = "does not currently support double backward|a compiled LSTM has no second derivatives"
    for compiler in ("eager", "aot_eager"):
        try:
            found = second(torch.compile(module, backend=compiler, fullgraph=True))
        except RuntimeError as error:
            assert re.search(refused, str(error)) and (compiler, backend) != ("eager", "triton"), error
        else:
            torch.testing.assert_close(found, second(module))


class _Watching(TorchDispatchMode):
    """Forbids what would make a GPU's host wait: reading a value, or moving tensors to another device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)}
        assert devices <= {"meta"}, f"{function} on {devices}"
        return result


@pytest.mark.parametrize("options", [{}, {"proj_size": 1}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_segments_read_no_values(options, recompute, monkeypatch):
    """On a device whose tensors have no data every read of a value is an error. Lengths are not looked at, as on a GPU."""
    monkeypatch.setattr(dispatch, "layer_backend", lambda *args: "triton")

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    lstm = _lstm("triton", "meta", recompute=recompute, **options)
    R = lstm.proj_size or H
    leaves = [empty(B, T, I), empty(4, B, R), empty(4, B, H), empty(T, 4, B, R), empty(T, 4, B, H)]
    segments = {"resets": empty(B, T, dtype=torch.bool), "lengths": empty(B, dtype=torch.int64)}
    segments["reset_state"] = tuple(leaves[3:])
    leaves += lstm.parameters()
    with _Watching():
        results = tree_leaves(lstm(leaves[0], tuple(leaves[1:3]), return_cell_states=True, **segments))
        found = torch.autograd.grad([t.sum() for t in results], leaves)
    assert [t.shape for t in results] == [(B, T, 2 * R), (4, B, R), (4, B, H), (B, T, 2 * H)]
    assert [g.shape for g in found] == [t.shape for t in leaves]


def test_distributed_data_parallel(tmp_path, device):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        lstm = _lstm("triton", device)
        parallel = torch.nn.parallel.DistributedDataParallel(lstm)
        x = torch.randn(B, T, I, device=device)
        losses = [sum(t.square().sum() for t in tree_leaves(module(x))) for module in (lstm, parallel)]
        expected = torch.autograd.grad(losses[0], list(lstm.parameters()))
        losses[1].backward()
        torch.testing.assert_close(tuple(p.grad for p in lstm.parameters()), expected)
    finally:
        # Before the group: DistributedDataParallel would end it with the GIL held, for which a thread that it joins may wait.
        parallel = losses = None
        torch.distributed.destroy_process_group()
