"""LSTM under torch.compile, torch.export, fake tensors and DistributedDataParallel: the same values as in eager mode."""

import pytest
import torch
from support.lstms import flat, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from lstm_triton import LSTM, dispatch
from lstm_triton.kernels.inputs import LayerInputs, LayerOptions, Segments, split_weights

pytestmark = pytest.mark.long

T, B, I, H = 3, 2, 2, 3
both = pytest.mark.parametrize("backend", ["auto", "triton"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _lstm(backend, device, **options):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, **options}
    return LSTM(I, H, **options, device=device, backend=backend, precision="ieee")


def _input(device, T=T, B=B):
    return torch.randn(B, T, I, device=device, requires_grad=True)


def _segments(device, T=T, B=B):
    resets = torch.rand(B, T, device=device) < 0.4
    resets[0, 1] = True
    lengths = torch.arange(T, T - B, -1, device=device).clamp(min=1)
    return {"resets": resets, "lengths": lengths, "return_cell_states": True}


def _assert_trains_alike(compiled, eager, x, *args, **options):
    results = []
    for module in (compiled, eager):
        found = flat(module(x, *args, **options))
        results.append([*found, *gradients(found, [x, *eager.parameters()])])
    torch.testing.assert_close(*results)


@both
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_training_in_one_graph(compiler, backend, device):
    lstm = _lstm(backend, device)
    compiled = torch.compile(lstm, backend=compiler, fullgraph=True)
    _assert_trains_alike(compiled, lstm, _input(device))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_segments_in_one_graph(compiler, device):
    lstm = _lstm("triton", device, num_layers=1)
    compiled = torch.compile(lstm, backend=compiler, fullgraph=True)
    hx = torch.randn(2, 2, B, H, device=device)
    reset_state = torch.randn(2, 2, 1, H, device=device, requires_grad=True)
    _assert_trains_alike(
        compiled, lstm, _input(device), tuple(hx), reset_state=reset_state.unbind(), **_segments(device)
    )


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
    backward = (torch.randn_like(y), None, None, None, *inputs, *saved, needs, *options)
    torch.library.opcheck(torch.ops.lstm_triton.lstm_layer, forward, test_utils="test_faketensor")
    torch.library.opcheck(torch.ops.lstm_triton.lstm_layer_backward, backward, test_utils="test_faketensor")


def test_recomputing_in_one_graph(device):
    lstm = _lstm("triton", device, num_layers=1)
    lstm.recompute = True
    _assert_trains_alike(torch.compile(lstm, backend="inductor", fullgraph=True), lstm, _input(device))


@both
def test_projection_in_one_graph(backend, device):
    lstm = _lstm(backend, device, num_layers=1, proj_size=1)
    _assert_trains_alike(torch.compile(lstm, backend="aot_eager", fullgraph=True), lstm, _input(device))


@both
def test_lengths_and_batches_are_dynamic(backend, device):
    torch._dynamo.utils.counters.clear()
    lstm = _lstm(backend, device, bidirectional=False)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for sizes in ((5, 7), (4, 8)):  # unlike each other and all that is fixed, or they are taken for equal
            x = _input(device, *sizes)
            torch.testing.assert_close(flat(compiled(x)), flat(lstm(x)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@both
def test_compiled_dropout(backend, device):
    """Dropped in training, by the compiler's random numbers, and not in evaluation mode."""
    lstm = _lstm(backend, device, dropout=0.5, bidirectional=False)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    x = _input(device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = compiled(x)[0]
        runs.append((y, *torch.autograd.grad(y.sum(), lstm.parameters())))
    assert all(map(torch.equal, runs[0], runs[1])) and not any(map(torch.equal, runs[0], runs[2]))
    lstm.eval()
    torch.testing.assert_close(compiled(x)[0], lstm(x)[0])


@both
def test_second_derivatives_are_right_or_refused(backend, device):
    lstm, x = _lstm(backend, device, num_layers=1), _input(device)

    def second(lstm):
        (gradient,) = torch.autograd.grad(lstm(x)[0].pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), x)[0]

    for compiler in ("eager", "aot_eager"):
        compiled = torch.compile(lstm, backend=compiler, fullgraph=True)
        try:
            found = second(compiled)
        except RuntimeError:
            continue
        torch.testing.assert_close(found, second(lstm))


@both
def test_export(backend, device):
    lstm = _lstm(backend, device)
    batch, steps = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("steps", min=2, max=64)
    program = torch.export.export(lstm, (_input(device, 4, 3).detach(),), dynamic_shapes=({0: batch, 1: steps},))
    exported = program.module()
    x = _input(device, 6, 5)
    found, expected = flat(exported(x)), flat(lstm(x))
    torch.testing.assert_close(found, expected)
    # The program has the parameters under their names, and is differentiable.
    ours, theirs = dict(lstm.named_parameters()), dict(exported.named_parameters())
    assert list(ours) == list(theirs)
    torch.testing.assert_close(gradients(found, theirs.values()), gradients(expected, ours.values()))


class _Watching(TorchDispatchMode):
    """Forbids what would make a GPU's host wait: reading a value, or moving tensors to another device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {
            t.device.type for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, torch.Tensor)
        }
        assert devices <= {"meta"}, f"{function} on {devices}"
        return result


@pytest.fixture
def no_values(monkeypatch):
    """A device whose tensors have no data: every read of a value is an error, and lengths are not looked at, as on a GPU."""
    monkeypatch.setattr(dispatch, "layer_backend", lambda *args: "triton")
    return torch.device("meta")


@pytest.mark.parametrize("options", [{}, {"proj_size": 1}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_segments_read_no_values(options, recompute, no_values):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=no_values, requires_grad=dtype.is_floating_point)

    lstm = _lstm("triton", no_values, **options)
    lstm.recompute = recompute
    R = lstm.proj_size or H
    leaves = [empty(B, T, I), empty(4, B, R), empty(4, B, H), empty(T, 4, B, R), empty(T, 4, B, H)]
    segments = {
        "resets": empty(B, T, dtype=torch.bool),
        "reset_state": tuple(leaves[3:]),
        "lengths": empty(B, dtype=torch.int64),
    }
    leaves += lstm.parameters()
    with _Watching():
        results = flat(lstm(leaves[0], tuple(leaves[1:3]), return_cell_states=True, **segments))
        found = torch.autograd.grad([t.sum() for t in results], leaves)
    assert [t.shape for t in results] == [(B, T, 2 * R), (4, B, R), (4, B, H), (B, T, 2 * H)]
    assert [g.shape for g in found] == [t.shape for t in leaves]


def test_distributed_data_parallel(tmp_path, device):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        lstm = _lstm("triton", device)
        parallel = torch.nn.parallel.DistributedDataParallel(lstm)
        x = _input(device)
        expected = gradients(flat(lstm(x)), lstm.parameters())
        results = flat(parallel(x))
        generator = torch.Generator().manual_seed(0)
        torch.autograd.backward(
            results, [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in results]
        )
        torch.testing.assert_close([p.grad for p in lstm.parameters()], expected)
    finally:
        torch.distributed.destroy_process_group()
