"""torch.jit.trace, torch.export and torch.compile of every kind of module: what is recorded holds for other sizes."""

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
RECORDED, OTHERS = (4, 2), [(6, 7), (8, 9)]
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
    "states": ("x h c", lambda m, x, h, c: m(x, (h, c))),
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


# ---- a function that was recorded, and its parameters ----------------------------------------------------------------


def _trace(called):
    # Whether it was made in training or not. torch's check of a trace warns at most; the test compares.
    with torch.set_grad_enabled(called.module.backend != "reference"):
        traced = torch.jit.trace(called, tuple(called.inputs(*RECORDED)), check_trace=False)
    return traced, called.parameters()


def _export(called):
    """It has the parameters under their names, and one operator for each layer."""
    module = called.eval().module
    program = torch.export.export(called, tuple(called.inputs(5, 4)), dynamic_shapes=(called.dynamic(),))
    nodes = [str(node.target) for node in program.graph.nodes]
    if module.backend == "triton":
        operator = {LSTMCell: "lstm_cell", SoftmaxReadout: "softmax_readout"}.get(type(module), "lstm_layer")
        assert nodes.count(f"lstm_triton.{operator}.default") == getattr(module, "num_layers", 1)
    exported = program.module()
    theirs = dict(exported.named_parameters())
    assert list(theirs) == [name for name, _ in called.named_parameters()]
    return exported, theirs.values()


def _compiled(compiler):
    return lambda called: (torch.compile(called, backend=compiler, fullgraph=True, dynamic=True), called.parameters())


RECORDERS = {"trace": _trace, "export": _export, "compile": _compiled("aot_eager"), "inductor": _compiled("inductor")}


def _results(function, parameters, inputs, twice):
    """And the gradients of the inputs and the parameters, or (twice) those of the squares of the gradients."""
    leaves = [*(t.detach().requires_grad_(t.is_floating_point()) for t in inputs), *parameters]
    found = function(*leaves[: len(inputs)])
    leaves = [t for t in leaves if t.requires_grad]
    given = dict(create_graph=twice, allow_unused=True, materialize_grads=True)
    loss = sum((t * torch.linspace(0, 1, t.numel(), dtype=t.dtype, device=t.device).view_as(t)).sum() for t in found)
    first = torch.autograd.grad(loss, leaves, **given)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, **given) if twice else ()
    return [*found, *first, *second]


@pytest.fixture(autouse=True)
def quiet():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns much
        yield
    torch._dynamo.reset()


CALLS_OF_TRACES = ["padded", "packed", "packed resets", "lengths", "resets", "unbatched"]
AXES = {"name": ["one layer", "stacked", "projected"], "backend": ["auto", "triton", "reference"]}
OF_LSTMS = segmented.pairwise({"recorder": ["trace"], "call": CALLS_OF_TRACES, **AXES})
OF_LSTMS += segmented.pairwise({"recorder": ["export"], "call": ["padded", "lengths", "resets"], **AXES})
ROWS = [tuple(row.values()) for row in OF_LSTMS]
KINDS = [("padded", "readout"), ("padded", "GRU"), ("padded", "sLSTM"), ("step", "cell")]
ROWS += [(recorder, *kind, "triton") for recorder in ("trace", "export", "compile") for kind in KINDS]
# torch.compile unrolls the reference: no graph of it holds for other numbers of steps.
ROWS += [("compile", "padded", "stacked", "auto"), ("compile", "padded", "projected", "auto")]
ROWS += [("compile", "lengths", "projected", "triton"), ("compile", "resets", "one layer", "triton")]
ROWS += [("compile", "padded", "peephole", "triton"), ("compile", "padded", "recompute", "triton")]
ROWS += [("inductor", "states", "one layer", "triton")]


@pytest.mark.parametrize("recorder, call, name, backend", ROWS)
def test_other_sizes(recorder, call, name, backend, device):
    called = Called(name, call, backend, device)
    torch._dynamo.utils.counters.clear()
    recorded, parameters = RECORDERS[recorder](called)
    # Of traces the second derivatives too, where torch's own kernels are not what was traced.
    given, twice = [*parameters], recorder == "trace" and call == "lengths"
    is_compiled = recorder not in ("trace", "export")
    for T, B in OTHERS if is_compiled else OTHERS[:1]:
        inputs = called.inputs(T, B)
        assert_close(_results(recorded, given, inputs, twice), _results(called, [*called.parameters()], inputs, twice))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == is_compiled
