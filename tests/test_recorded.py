"""torch.jit.trace, torch.export and torch.compile of every kind of module: what was recorded holds for other sizes."""

import warnings

import pytest
import torch
from support import segmented
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

from lstm_triton import GRU, LSTM, LSTMCell, Recurrent, SoftmaxReadout
from lstm_triton.cells import catalogue

pytestmark = pytest.mark.long

I, H = 3, 5
# T, B; the others unlike each other and all that is fixed, or a compiler takes them for equal.
RECORDED, OTHERS = (4, 2), [(7, 6), (8, 9)]
STACKED = {"num_layers": 2, "bidirectional": True, "batch_first": True}
MODULES = {
    "one layer": lambda **on: LSTM(I, H, precision="ieee", **on),
    "stacked": lambda **on: LSTM(I, H, precision="ieee", **STACKED, **on),
    "projected": lambda **on: LSTM(I, H, precision="ieee", proj_size=2, bidirectional=True, **on),
    "recompute": lambda **on: LSTM(I, H, precision="ieee", recompute=True, **on),
    "cell": lambda **on: LSTMCell(I, H, **on),
    "readout": lambda **on: SoftmaxReadout(I, H, **on),
    "GRU": lambda **on: GRU(I, H, precision="ieee", **on),
    "sLSTM": lambda **on: Recurrent(catalogue.slstm, I, H, **on),
    "peephole": lambda **on: Recurrent(catalogue.peephole_lstm, I, H, **on),
}


def _packed(lstm, x, lengths, is_sorted=True):
    return pack_padded_sequence(x, lengths, batch_first=lstm.batch_first, enforce_sorted=is_sorted)


# The names of the inputs, and the call.
CALLS = {
    "padded": ("x", lambda m, x: m(x)),
    "unbatched": ("row", lambda m, x: m(x)),
    "step": ("step", lambda m, x: m(x)),
    "packed": ("x sizes", lambda m, x, n: m(_packed(m, x, n))),
    "packed resets": (
        "x sizes resets",
        lambda m, x, n, r: m(_packed(m, x, n, is_sorted=False), resets=r, return_cell_states=True),
    ),
    "lengths": ("x lengths", lambda m, x, n: m(x, lengths=n)),
    "resets": (
        "x resets h c",
        lambda m, x, r, h, c: m(x, (h, c), resets=r, reset_state=(h, c), return_cell_states=True),
    ),
}


def _flat(results):
    if isinstance(results, PackedSequence):
        return (results.data,)
    return tuple(t for r in results for t in _flat(r)) if isinstance(results, tuple) else (results,)


class Called(torch.nn.Module):
    """A call of a module, from tensors to tensors."""

    def __init__(self, name, call, backend, device):
        super().__init__()
        self.module = MODULES[name](backend=backend, device=device).double()
        self.names, self.call = CALLS[call][0].split(), CALLS[call][1]
        self.device, self.batch_first = device, getattr(self.module, "batch_first", False)

    def forward(self, *inputs):
        return _flat(self.call(self.module, *inputs))

    def inputs(self, T, B):
        options = {"dtype": torch.float64, "device": self.device}
        rows = getattr(self.module, "num_layers", 1) * (2 if getattr(self.module, "bidirectional", False) else 1)
        R = getattr(self.module, "proj_size", 0) or H
        shapes = {"row": (T, I), "step": (B, I), "h": (rows, B, R), "c": (rows, B, H)}
        drawn = {name: torch.randn(shape, **options) for name, shape in shapes.items()}
        x, resets = torch.randn(T, B, I, **options), torch.rand(T, B, device=self.device) < 0.4
        drawn |= {n: t.transpose(0, 1) if self.batch_first else t for n, t in (("x", x), ("resets", resets))}
        drawn["sizes"] = torch.arange(T, T - B, -1).clamp(min=1)
        drawn["lengths"] = drawn["sizes"].to(self.device)
        return [drawn[name] for name in self.names]

    def dynamic(self):
        """The dimensions of the inputs that are steps and batch rows."""
        steps, rows = torch.export.Dim("steps", min=2, max=64), torch.export.Dim("rows", min=2, max=64)
        time_major = {0: rows, 1: steps} if self.batch_first else {0: steps, 1: rows}
        one = {"row": {0: steps}, "step": {0: rows}, "lengths": {0: rows}, "h": {1: rows}, "c": {1: rows}}
        return tuple(one.get(name, time_major) for name in self.names)


def _results(called, parameters, inputs):
    """And the gradients of the inputs and the parameters."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    found = called(*inputs)
    leaves = [*(t for t in inputs if t.requires_grad), *parameters]
    loss = sum((t * torch.linspace(0, 1, t.numel(), dtype=t.dtype, device=t.device).view_as(t)).sum() for t in found)
    return [*found, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def _assert_alike(recorded, called, theirs=None):
    parameters = list(called.parameters())
    for T, B in OTHERS:
        inputs = called.inputs(T, B)
        assert_close(_results(recorded, theirs or parameters, inputs), _results(called, parameters, inputs))


@pytest.fixture(autouse=True)
def quiet():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns much
        yield
    torch._dynamo.reset()


BACKENDS = ["auto", "triton", "reference"]
OTHER_KINDS = [("padded", "readout"), ("padded", "GRU"), ("padded", "sLSTM"), ("step", "cell")]


def every_pair(*calls):
    """Of calls, options of LSTM and backends; and the other modules by the kernels."""
    axes = {"calls": calls, "options": ["one layer", "stacked", "projected"], "backend": BACKENDS}
    rows = [tuple(row.values()) for row in segmented.pairwise(axes)]
    rows += [(*kind, "triton") for kind in OTHER_KINDS]
    return pytest.mark.parametrize("call, name, backend", rows)


@every_pair("padded", "packed", "packed resets", "lengths", "resets", "unbatched")
def test_a_trace(call, name, backend, device):
    called = Called(name, call, backend, device)
    # Whether it was made in training or not. torch's check of a trace warns at most; the test compares.
    with torch.set_grad_enabled(backend != "reference"):
        traced = torch.jit.trace(called, tuple(called.inputs(*RECORDED)), check_trace=False)
    _assert_alike(traced, called)


@pytest.mark.parametrize("name, backend", [("stacked", "triton"), ("stacked", "auto"), ("projected", "reference")])
def test_a_trace_can_be_differentiated_twice(name, backend, device):
    """Where torch's own kernels are not what was traced."""
    called = Called(name, "lengths", backend, device)
    traced = torch.jit.trace(called, tuple(called.inputs(*RECORDED)), check_trace=False)
    x, lengths = called.inputs(3, 3)
    x.requires_grad_()
    results = []
    for candidate in (traced, called):
        loss = sum(t.pow(2).sum() for t in candidate(x, lengths))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append((first, *torch.autograd.grad(first.pow(2).sum(), list(called.parameters()))))
    assert_close(*results)


@every_pair("padded", "lengths", "resets")
def test_an_exported_program(call, name, backend, device):
    """It has the parameters under their names, and one operator for each layer."""
    called = Called(name, call, backend, device).eval()
    example = tuple(called.inputs(6, 7))
    program = torch.export.export(called, example, dynamic_shapes=(called.dynamic(),))
    nodes = [str(node.target) for node in program.graph.nodes]
    if backend == "triton":
        operator = {"cell": "lstm_cell", "readout": "softmax_readout"}.get(name, "lstm_layer")
        assert nodes.count(f"lstm_triton.{operator}.default") == getattr(called.module, "num_layers", 1)
    exported = program.module()
    theirs = dict(exported.named_parameters())
    assert list(theirs) == [name for name, _ in called.named_parameters()]
    _assert_alike(exported, called, list(theirs.values()))


@pytest.mark.parametrize(
    "call, name, backend, compiler",
    [
        ("padded", "stacked", "auto", "aot_eager"),
        ("padded", "stacked", "triton", "aot_eager"),
        ("padded", "projected", "auto", "aot_eager"),
        ("padded", "projected", "triton", "aot_eager"),
        ("resets", "one layer", "triton", "inductor"),
        ("padded", "recompute", "triton", "inductor"),
        ("step", "cell", "triton", "inductor"),
        ("padded", "readout", "triton", "inductor"),
        *(("padded", name, "triton", "aot_eager") for name in ("GRU", "sLSTM", "peephole")),
    ],
)
def test_one_compiled_graph(call, name, backend, compiler, device):
    called = Called(name, call, backend, device)
    torch._dynamo.utils.counters.clear()
    _assert_alike(torch.compile(called, backend=compiler, fullgraph=True, dynamic=True), called)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
