"""A layer's outputs, states and every gradient against more than float64, on awkward shapes in every dtype and precision."""

import itertools
from collections import Counter

import pytest
import torch
import triton.language as tl
from support import layers, segmented
from support.aot import KINDS
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM, explain, functional
from lstm_triton.cells import catalogue
from lstm_triton.kernels import interpreter, launch, layer_backward, search
from lstm_triton.kernels import layer as sequence_layer

# T, B, I, H. Tiles are 16, 32 or 64 rows, 8 to 128 units, and 16 to 256 of the inner dimension.
SMALL, STEP, ONES = (7, 3, 5, 19), (1, 3, 5, 19), (1, 1, 1, 1)
EDGES = [(2, B, 3, 5) for B in (15, 16, 17, 63, 64, 65)] + [(2, 3, 5, H) for H in (15, 16, 17, 31, 33, 63, 64, 65)]
LARGE = [(3, 2, 7, 128), (2, 3, 130, 129), (2, 35, 3, 150)]
SEGMENTS = {
    "plain": {},
    "resets": dict(resets=True),
    "resets to one state": dict(resets=True, reset_state="shared"),
    "lengths": dict(lengths=True),
    "everything": dict(resets=True, reset_state="stored", lengths=True, cells=True),
}
OF_SEQUENCES = "_lstm_sequence_forward_kernel", "_lstm_sequence_backward_kernel"
OF_A_STEP = "_lstm_cell_forward_kernel", "_lstm_cell_backward_kernel"


def _draw(shape, kind, device, **options):
    dtype, precision = KINDS[kind]
    return layers.draw(*shape, dtype=dtype, precision=precision, device=device, **options)


# ---- accuracy --------------------------------------------------------------------------------------------------------

compiled, slow = [pytest.mark.compiled], [pytest.mark.slow]
ALONE = dict(backend="triton-persistent")
CASES = [  # each kind in one direction or in two
    *((SMALL, kind, dict(D=1 + n % 2, scale=scale), compiled) for n, kind in enumerate(KINDS) for scale in (1.0, 4.0)),
    *((ONES, kind, dict(D=D), compiled) for kind, D in (("fp32", 2), ("bf16", 1))),
    *((shape, kind, {}, slow) for shape in ((2, 3, 8, 1030), (200, 3, 4, 9)) for kind in ("tf32", "bf16")),
    *((shape, ("tf32", "bf16", "fp32")[n % 3], dict(D=1 + n % 2), []) for n, shape in enumerate(EDGES)),
    # A program that holds all units waits for none. In full float32 most layers are several, which exchange h.
    *(((4, 3, 4, H), kind, ALONE, []) for kind, H in (("tf32", 19), ("bf16", 16))),
    *(((4, 3, 4, H), kind, ALONE, compiled) for kind, H in (("fp32", 3), ("tf32x3", 8))),
    *((STEP, *case, compiled) for case in (("fp32", {}), ("tf32", dict(D=2, cells=True)))),
    (STEP, "bf16", dict(D=2, batch_major=True), compiled),
    *((STEP, *case, []) for case in (("tf32x3", dict(bias=False)), ("fp16", dict(cells=True)))),
    (STEP, "fp64", dict(D=2, bias=False, cells=True), []),
]
SEGMENTED = itertools.product((SMALL, (9, 18, 3, 33)), SEGMENTS)
CASES += [
    (shape, kind, dict(D=D, scale=scale, backend=backend, **SEGMENTS[segments]), slow)
    for shape, segments in [*((shape, "plain") for shape in (ONES, *EDGES, *LARGE)), *SEGMENTED]
    for backend in ("triton", "triton-stepwise")
    for D, scale in ((1, 4.0), (2, 1.0))
    for kind in KINDS
]


@pytest.mark.parametrize(
    "shape, kind, options", [pytest.param(*case, marks=marks, id=" ".join(map(str, case))) for *case, marks in CASES]
)
def test_accuracy(shape, kind, options, device, count_launches):
    options = dict(options)
    backend = options.pop("backend", "triton")
    problem = _draw(shape, kind, device, **options)
    results, launched = layers.by_kernels(problem, backend), count_launches(every=True)
    layers.assert_as_accurate_as_torch(results, problem)
    if backend == "triton-persistent":
        assert [launched[kernel] for kernel in OF_SEQUENCES] == [1, 1]
    if shape == STEP:  # by the kernels of the cell, whatever is asked for, with nothing beside them
        assert launched == dict.fromkeys(OF_A_STEP, options.get("D", 1))
        assert all(map(torch.equal, layers.by_kernels(problem, "triton-stepwise"), results))


def test_outputs_follow_the_memory_order_of_the_input(device):
    """No copy where a module is batch-first. test_waiting judges the values."""
    problem = _draw((5, 4, 3, 7), "fp32", device, D=2, batch_major=True, cells=True)
    named = dict(zip(problem.names, layers.by_kernels(problem)))
    for name in ("y", "c", "dx"):
        assert named[name].transpose(0, 1).is_contiguous(), name


# ---- what cannot be one launch -----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sizes are for an H100")
def test_one_launch_is_asked_for_in_both_ways(monkeypatch):
    """The backward has four times the inner dimension, and does not fit where the forward does."""
    monkeypatch.setattr(launch.Launcher, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)

    def error(T, B, H, dtype=torch.bfloat16, backend="triton-persistent"):
        weights = [torch.zeros(4 * H, n, dtype=dtype, requires_grad=True) for n in (1, H)]
        try:
            functional.lstm(torch.zeros(T, B, 1, dtype=dtype), None, weights, backend=backend)
        except RuntimeError as error:
            return str(error)

    assert "H = 1536, B = 192, 1 direction(s)" in error(2, 192, 1536)
    assert error(2, 192, 1536).endswith("in the backward")
    assert error(2, 1, 512, torch.float64).endswith("in the forward")
    assert error(1, 192, 1536) is None, "one step is one launch"
    assert error(2, 64, 512) is error(2, 192, 1536, backend="triton") is None
    with torch.no_grad():
        assert error(2, 192, 1536) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there its programs can wait")
def test_the_interpreter_cannot_wait(count_launches):
    problem = layers.draw(3, 2, 4, 96, 1, torch.float32, precision="tf32")
    with pytest.raises(RuntimeError, match="one would have to wait for another in the backward"):
        layers.by_kernels(problem, "triton-persistent")
    with torch.no_grad():
        functional.lstm(problem.x, problem.hx, problem.weights, backend="triton-persistent", precision="tf32")
    assert count_launches() == {"_lstm_sequence_forward_kernel": 1}


# ---- a single step: the kernels of the cell, with nothing beside its results ---------------------------------------------


def test_a_step_of_another_cell(device, count_launches):
    """Several states of a unit, and both directions."""
    case = segmented.Case(T=1, B=2, H=5, bidirectional=True, cell=catalogue.slstm)
    drawn = segmented.draw(case, device)
    found = segmented.results(case, drawn, "triton")
    assert count_launches() == dict.fromkeys(OF_A_STEP, 2)
    segmented.assert_accurate(found, case, drawn)


def _operations(call):
    """How many of each operation of torch runs, views and what only calls another one apart."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = Counter(event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::"))
    views = "select slice unflatten view as_strided transpose unsqueeze expand detach alias view_as".split()
    return {name: n for name, n in names.items() if name not in (*views, "new_empty", "empty_like", "result_type")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted on a CPU")
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_step_with_carried_state_allocates_its_results_alone(batch_first, monkeypatch):
    """It asks nothing of the search either, which the capture of a CUDA graph would forbid."""
    launched = []
    monkeypatch.setattr(launch.Launcher, "__call__", lambda self, *_, **__: launched.append(self.kernel.fn.__name__))
    monkeypatch.setattr(search, "choose", None)
    for module in ("layout", "cell_backward"):
        monkeypatch.setattr(f"lstm_triton.kernels.{module}.torch", torch)  # memory that is not poisoned
    lstm = LSTM(4, 40, batch_first=batch_first, backend="triton")
    x, hx = torch.zeros(*((2, 1) if batch_first else (1, 2)), 4), (torch.zeros(1, 2, 40), torch.zeros(1, 2, 40))
    with torch.no_grad():
        lstm(x, hx)
        assert _operations(lambda: lstm(x, hx)) == {"empty": 3}, "y, h and c"
    assert launched == [OF_A_STEP[0]] * 2
    outputs = []
    assert _operations(lambda: outputs.extend(lstm(x, hx))) == {"empty": 5}, "c once more, and the gates"
    y, (h, c) = outputs
    cotangents = [torch.ones_like(t) for t in (y, h, c)]
    weights = list(lstm.parameters())
    launched.clear()
    found = _operations(lambda: torch.autograd.grad((y, h, c), weights, cotangents))
    assert found == {"empty": len(weights), "add": 1}, "y and h are one"
    assert launched == [OF_A_STEP[1]]


def test_explain_names_the_kernel_of_the_cell():
    lstm = LSTM(4, 5, num_layers=2, bidirectional=True, backend="triton-persistent")
    text = explain(lstm, torch.zeros(1, 2, 4))
    assert "; forward 4 launches of the cell's kernel for 1 step, backward 4 launches of the cell's kernel" in text
    assert "cell's" not in explain(lstm, torch.zeros(2, 2, 4))


@pytest.mark.long
def test_compiled_for_any_number_of_steps(device):
    """What was compiled for several steps never meets one step; a step alone is another graph."""
    torch._dynamo.reset()
    lstm = LSTM(3, 5, device=device, backend="triton", precision="ieee")
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (4, 1, 7):
        x = torch.randn(T, 2, 3, device=device, requires_grad=True)
        outputs = [tree_leaves(module(x)) for module in (compiled, lstm)]
        leaves = [x, *lstm.parameters()]
        found = [[*y, *torch.autograd.grad(y, leaves, [torch.ones_like(t) for t in y])] for y in outputs]
        torch.testing.assert_close(*found)
    torch._dynamo.reset()


# ---- special values and offsets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, name", [("tf32", "dh0"), ("bf16", "dreset_h")])
def test_an_infinite_state_only_saturates_gates(kind, name, device):
    """Also where rows are padded for one launch, and infinity times the padding's zeros would be NaN."""
    problem = _draw((4, 5, 3, 6), kind, device, D=2, cells=True, resets=True, reset_state="stored")
    tensors = [t.clone() for t in problem.tensors]
    tensors[problem.names.index(name) - len(problem.cotangents)][..., 2] = torch.inf
    problem = problem.with_tensors(tensors)
    in_one, by_steps = (layers.by_kernels(problem, backend) for backend in ("triton", "triton-stepwise"))
    for result, found, expected in list(zip(problem.names, in_one, by_steps))[:4]:
        assert expected.isfinite().all(), result
        torch.testing.assert_close(found, expected)


def test_offsets_of_64_bits_give_the_same(device, monkeypatch):
    """Those within one step take them where a step's tensors have 2**31 elements or more, too many for a test."""
    problem = _draw((3, 17, 4, 19), "tf32", device, D=2, batch_major=True, **SEGMENTS["everything"])
    expected = layers.by_kernels(problem)
    assert all(layer.index_type(problem.x) == tl.int32 for layer in (sequence_layer, layer_backward))
    for layer in (sequence_layer, layer_backward):
        monkeypatch.setattr(layer, "index_type", lambda *tensors: tl.int64)
    assert all(map(torch.equal, layers.by_kernels(problem), expected))


def test_64_bits_are_taken_where_a_step_is_so_large():
    narrow = torch.empty(1).expand(2, 3, 5)
    assert sequence_layer.index_type(narrow, None) == tl.int32
    # The last element is 2 strides + 4 from the first.
    for stride, wanted in ((2**30 - 3, tl.int32), (2**30 - 2, tl.int64)):
        step = torch.empty(0, device="meta").as_strided((2, 3, 5), (1, stride, 1))
        assert sequence_layer.index_type(narrow, step) == wanted
