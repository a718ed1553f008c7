"""torch.compile, torch.export, fake tensors and DistributedDataParallel: the same values as in eager mode, in one graph."""

import itertools
import re

import pytest
import torch
from support.lstms import gradients
from support.operations import cell, operations
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lstm_triton import GRU, LSTM, LSTMCell, Recurrent, SoftmaxReadout, dispatch
from lstm_triton.cells import catalogue
from lstm_triton.kernels.inputs import LayerInputs, LayerOptions, Segments, split_weights

pytestmark = pytest.mark.long

T, B, I, H = 3, 2, 2, 3
both = pytest.mark.parametrize("backend", ["auto", "triton"])


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
    full = "h0" not in operation.operator.names and not some  # which takes seconds
    checks = {} if full else {"test_utils": "test_faketensor"}
    for save in (False, True):
        given = [t if t is None else t.detach().requires_grad_(save and t.requires_grad) for t in inputs]
        torch.library.opcheck(operation.operator.operator, (*given, *options, save), **checks)
    inputs = [t if t is None else t.detach() for t in inputs]
    needs = [name in names for name in operation.operator.names]
    for arrived in (grads, (None, *grads[1:]))[: len(cotangents)]:
        arguments = (*arrived, *inputs, *saved, *options, needs)
        torch.library.opcheck(operation.operator.backward_operator, arguments, **checks)


def test_the_forward_operator_is_differentiable(device):
    """What an exported program calls. Without the saved gates it refuses."""
    leaves, cotangents = cell.draw(device)
    h, c, gates = torch.ops.lstm_triton.lstm_cell(*leaves, None, None, "lstm", True)
    assert not gates.requires_grad
    found = [h, c, *torch.autograd.grad((h, c), leaves, cotangents)]
    assert all(map(torch.equal, found, cell.trained(leaves, cotangents)))
    h, _, _ = torch.ops.lstm_triton.lstm_cell(*leaves, None, None, "lstm", False)
    with pytest.raises(RuntimeError, match="save=False"):
        h.sum().backward()


@operations("cell", "readout", "layer with segments")
def test_shapes_without_data(operation, device):
    leaves, cotangents = operation.draw(device)
    expected = operation.trained(leaves, cotangents)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = operation.trained(*([mode.from_tensor(t) for t in tensors] for tensors in (leaves, cotangents)))
    for fake, t in zip(found, expected, strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (t.shape, t.dtype, t.device)


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


def _lstm(backend, device, **options):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, **options}
    return LSTM(I, H, **options, device=device, backend=backend, precision="ieee")


def _input(device, T=T, B=B):
    return torch.randn(B, T, I, device=device, requires_grad=True)


MODULES = {
    "LSTM": _lstm,
    "projection": lambda *on: _lstm(*on, num_layers=1, proj_size=1),
    "recompute": lambda backend, device: LSTM(I, H, device=device, backend=backend, recompute=True),
    "segments": lambda *on: _lstm(*on, num_layers=1),
    "LSTMCell": lambda backend, device: LSTMCell(I, H, device=device, backend=backend),
    "SoftmaxReadout": lambda backend, device: SoftmaxReadout(I, H, device=device, backend=backend),
    "GRU": lambda backend, device: GRU(I, H, device=device, backend=backend, precision="ieee"),
    "sLSTM": lambda backend, device: Recurrent(catalogue.slstm, I, H, device=device, backend=backend),
    "peephole": lambda backend, device: Recurrent(catalogue.peephole_lstm, I, H, device=device, backend=backend),
}


def _call(name, device):
    """Arguments of one of these modules, leaves first."""
    x, (h, c) = _input(device), torch.randn(2, 2, B, H, device=device, requires_grad=True)
    if name == "segments":
        resets = torch.rand(B, T, device=device) < 0.4
        resets[0, 1] = True
        lengths = torch.arange(T, T - B, -1, device=device).clamp(min=1)
        start = torch.randn(2, 2, 1, H, device=device, requires_grad=True).unbind()
        return (x, (h, c)), dict(resets=resets, lengths=lengths, reset_state=start, return_cell_states=True)
    return ((x[:, 0].detach().requires_grad_(), (h[0], c[0])) if name == "LSTMCell" else (x,)), {}


def _trained(module, args, kwargs, parameters):
    found = tree_leaves(module(*args, **kwargs))
    return [*found, *gradients(found, [args[0], *parameters])]


@pytest.mark.parametrize(
    "name, backend, compiler",
    [
        *itertools.product(["LSTM"], ["auto", "triton"], ["eager", "inductor"]),
        *itertools.product(["segments", "LSTMCell", "SoftmaxReadout"], ["triton"], ["eager", "inductor"]),
        *itertools.product(["projection"], ["auto", "triton"], ["aot_eager"]),
        *itertools.product(["GRU", "sLSTM", "peephole"], ["triton"], ["aot_eager"]),
        ("recompute", "triton", "inductor"),
    ],
)
def test_training_in_one_graph(name, backend, compiler, device):
    module, (args, kwargs) = MODULES[name](backend, device), _call(name, device)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    parameters = list(module.parameters())
    torch.testing.assert_close(*(_trained(of, args, kwargs, parameters) for of in (compiled, module)))


@pytest.mark.parametrize("name", ["LSTMCell", "SoftmaxReadout"])
def test_inference_in_one_graph(name, device):
    module, (args, _) = MODULES[name]("triton", device), _call(name, device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for given in {args, args[:1]}:
            found, expected = (tree_leaves(of(*given)) for of in (compiled, module))
            assert all(map(torch.equal, found, expected)) and not found[0].requires_grad


@pytest.mark.parametrize("name, backend", [("segments", "auto"), ("segments", "triton"), ("LSTMCell", "triton")])
def test_lengths_and_batches_are_dynamic(name, backend, device):
    torch._dynamo.utils.counters.clear()
    module = MODULES[name](backend, device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows, steps in ((7, 5), (8, 9)):  # unlike each other and all that is fixed, or they are taken for equal
            x = _input(device, steps, rows)
            x = x[:, 0] if name == "LSTMCell" else x
            torch.testing.assert_close(compiled(x), module(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_autocast_in_one_graph(device):
    cell = LSTMCell(I, H, device=device, backend="triton")

    def step(x, states):
        with torch.autocast(device.type, torch.bfloat16):
            return cell(x, states)

    args, _ = _call("LSTMCell", device)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(*args)
    assert found[0].dtype == torch.bfloat16
    assert all(map(torch.equal, found, step(*args)))


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


@pytest.mark.parametrize("name, backend", [("segments", "auto"), ("segments", "triton"), ("LSTMCell", "triton")])
def test_second_derivatives_are_right_or_refused(name, backend, device):
    module = MODULES[name](backend, device)
    x = _call(name, device)[0][0]

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


@pytest.mark.parametrize(
    "name, backend, operator",
    [
        ("LSTM", "auto", None),
        ("LSTM", "triton", "lstm_layer"),
        ("LSTMCell", "triton", "lstm_cell"),
        ("SoftmaxReadout", "triton", "softmax_readout"),
        ("GRU", "reference", None),
        ("sLSTM", "reference", None),
    ],
)
def test_export(name, backend, operator, device):
    """The program holds for other sizes, has the parameters under their names, and is differentiable."""
    module = MODULES[name](backend, device)
    dims = {0: torch.export.Dim("first", min=2, max=64), 1: torch.export.Dim("second", min=2, max=64)}
    x, longer = _input(device, 4, 5), _input(device, 6, 7)
    if name == "LSTMCell":
        dims, x, longer = {0: dims[0]}, x[:, 0], longer[:, 0]
    program = torch.export.export(module, (x.detach(),), dynamic_shapes=(dims,))
    nodes = [str(node.target) for node in program.graph.nodes]
    assert operator is None or nodes.count(f"lstm_triton.{operator}.default") == (2 if name == "LSTM" else 1)
    exported = program.module()
    found, expected = tree_leaves(exported(longer)), tree_leaves(module(longer))
    torch.testing.assert_close(found, expected)
    theirs, ours = dict(exported.named_parameters()), dict(module.named_parameters())
    assert list(ours) == list(theirs)
    torch.testing.assert_close(gradients(found, theirs.values()), gradients(expected, ours.values()))


class _Watching(TorchDispatchMode):
    """Forbids what would make a GPU's host wait: reading a value, or moving tensors to another device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)}
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
        results = tree_leaves(lstm(leaves[0], tuple(leaves[1:3]), return_cell_states=True, **segments))
        found = torch.autograd.grad([t.sum() for t in results], leaves)
    assert [t.shape for t in results] == [(B, T, 2 * R), (4, B, R), (4, B, H), (B, T, 2 * H)]
    assert [g.shape for g in found] == [t.shape for t in leaves]


def test_distributed_data_parallel(tmp_path, device):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        lstm = _lstm("triton", device)
        parallel = torch.nn.parallel.DistributedDataParallel(lstm)
        x = _input(device)
        expected = gradients(tree_leaves(lstm(x)), lstm.parameters())
        results = tree_leaves(parallel(x))
        generator = torch.Generator().manual_seed(0)
        torch.autograd.backward(
            results, [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in results]
        )
        torch.testing.assert_close([p.grad for p in lstm.parameters()], expected)
    finally:
        torch.distributed.destroy_process_group()
