"""Autocast: how often a parameter is cast, for how long the casts are held, and devices that know no autocast."""

import gc

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout, casting, functional

LOW = torch.bfloat16


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture
def casts(monkeypatch):
    """References to the casts of parameters made from here on."""
    made = []
    cast = casting.cast

    def noting(t, dtype):
        found = cast(t, dtype)
        if isinstance(t, torch.nn.Parameter) and found is not t and not any(r() is found for r in made):
            made.append(torch.utils.weak.TensorWeakRef(found))
        return found

    monkeypatch.setattr(casting, "cast", noting)
    return made


@pytest.fixture
def cell(device):
    return LSTMCell(3, 5, device=device, backend="triton")


def steps(cell, n=4):
    """The states after n steps under one autocast."""
    device = cell.weight_ih.device
    x, states = torch.ones(2, 3, device=device), None
    with torch.autocast(device.type, LOW):
        for _ in range(n):
            states = cell(x, states)
    return states


def gradients(states, parameters):
    return torch.autograd.grad(sum(t.float().square().sum() for t in states), list(parameters))


def alive(casts):
    return sum(reference() is not None for reference in casts)


def test_steps_share_one_cast_of_each_parameter(cell, casts):
    states = steps(cell)
    assert len(casts) == alive(casts) == 4
    found = gradients(states, cell.parameters())
    low = LSTMCell(3, 5, device=cell.weight_ih.device, dtype=LOW, backend="triton")
    low.load_state_dict(cell.state_dict())
    x, states = torch.ones(2, 3, device=cell.weight_ih.device, dtype=LOW), None
    for _ in range(4):
        states = low(x, states)
    for ours, expected in zip(found, gradients(states, low.parameters())):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected.float(), rtol=0.02, atol=0.02)


def test_casts_end_with_the_outermost_autocast(cell, casts):
    device = cell.weight_ih.device
    with torch.autocast(device.type, LOW):
        for _ in range(2):
            states = steps(cell)  # an autocast within the autocast
            del states
        gc.collect()
        assert len(casts) == alive(casts) == 4
    gc.collect()
    assert alive(casts) == 0
    states = steps(cell)
    assert len(casts) == 8 and alive(casts) == 4  # the graph holds them, as that of torch's own casts does
    sum(t.float().sum() for t in states).backward()
    del states
    gc.collect()
    assert alive(casts) == 0


def test_two_graphs_that_share_a_cast_have_a_backward_each(cell):
    with torch.autocast(cell.weight_ih.device.type, LOW):
        first, second = steps(cell), steps(cell)
    assert all(map(torch.equal, gradients(first, cell.parameters()), gradients(second, cell.parameters())))


def replace_values(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)


def replace_memory(module):
    for p in module.parameters():
        p.data = 2 * p.data


def write_through_data(module):
    for p in module.parameters():
        p.data.mul_(2)


def called(module):
    x = torch.ones(3, 2, 3, device=next(module.parameters()).device)
    with torch.autocast(x.device.type, LOW):
        out = module(x[0] if isinstance(module, LSTMCell) else x)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("kind", [LSTMCell, LSTM, SoftmaxReadout])
@pytest.mark.parametrize("change", [replace_values, replace_memory, write_through_data])
def test_a_changed_parameter_is_cast_again(change, kind, device):
    torch.manual_seed(0)
    module = kind(3, 5, device=device, backend="triton")
    graph = called(module)  # holds the casts
    change(module)
    found = called(module)
    assert not torch.equal(found, graph)
    with torch.no_grad():  # where no cast is kept
        assert torch.equal(found, called(module))
    del graph


def test_a_step_inside_the_autocast_is_seen(cell):
    """Where torch keeps the cast of the value before."""
    with torch.autocast(cell.weight_ih.device.type, LOW):
        before = steps(cell)
        replace_values(cell)
        after = steps(cell)
    assert not torch.equal(before[0], after[0]) and torch.equal(after[0], steps(cell)[0])


def test_another_dtype_is_another_cast(cell):
    before = steps(cell)
    with torch.autocast(cell.weight_ih.device.type, torch.float16):
        h, _ = cell(torch.ones(2, 3, device=cell.weight_ih.device))
    assert h.dtype == torch.float16 and before[0].dtype == LOW


def test_where_no_cast_is_reused(cell):
    """Without gradients or torch's cache, under a dispatch mode or a transform, of frozen parameters."""
    x = torch.ones(2, 3, device=cell.weight_ih.device)

    def loss(parameters):
        with torch.autocast(x.device.type, LOW):
            return torch.func.functional_call(cell, parameters, (x,))[0].float().sum()

    casting._held.clear()
    with torch.no_grad():
        steps(cell)
    with torch.autocast(x.device.type, LOW, cache_enabled=False):
        cell(x)
    with Watching():
        steps(cell)
    torch.func.grad(loss)({name: p.detach() for name, p in cell.named_parameters()})
    steps(cell.requires_grad_(False))
    assert not casting._held


@pytest.mark.parametrize("module", [SoftmaxReadout, LSTM])
def test_calls_of_other_modules_share_casts(module, device, casts):
    module = module(3, 5, device=device, backend="triton")
    x = torch.ones(2, 2, 3, device=device)
    with torch.autocast(device.type, LOW):
        outputs = [module(x) for _ in range(3)]
    assert outputs and len(casts) == alive(casts) == len(list(module.parameters()))


def test_a_device_without_autocast():
    """The meta device knows none, and raises when asked."""
    x, h, c = (torch.empty(2, n, device="meta") for n in (3, 5, 5))
    w_ih, w_hh = torch.empty(20, 3, device="meta"), torch.empty(20, 5, device="meta")
    assert functional.lstm_cell(x, (h, c), w_ih, w_hh, backend="reference")[0].shape == (2, 5)
    assert functional.softmax_readout(h, w_hh, backend="reference").shape == (2, 20)
    with torch.autocast("cpu", LOW):
        assert functional.lstm_cell(x, (h, c), w_ih, w_hh, backend="reference")[0].dtype == torch.float32


@pytest.mark.parametrize(
    "backend, dtype", [("triton", torch.float32), ("reference", LOW), ("reference", torch.float64)]
)
def test_layers_compute_in_the_dtype_of_the_autocast(backend, dtype, device):
    """In every form of a call; bfloat16 and float64 stay what they are, and gradients have the parameters' dtype."""
    options = dict(num_layers=2, device=device, precision="ieee")
    lstm = LSTM(3, 4, dtype=dtype, backend=backend, **options)
    exact = LSTM(3, 4, dtype=torch.float64, backend="reference", **options)
    exact.load_state_dict(lstm.state_dict())
    x, hx = torch.randn(2, 2, 3, device=device), torch.randn(2, 2, 2, 4, device=device)
    expected = torch.float64 if dtype == torch.float64 else LOW
    for packed in (False, True):
        results = []
        for module, kind in ((lstm, dtype), (exact, torch.float64)):
            given = x.to(dtype).to(kind)
            given = pack_padded_sequence(given, [2, 1]) if packed else given
            with torch.autocast(device.type, LOW):
                found = module(given, tuple(hx.to(dtype).to(kind)), return_cell_states=packed)
            results.append([t for t in tree_leaves(found) if t is not None and t.is_floating_point()])
        assert {t.dtype for t in results[0]} == {expected}
        found = torch.autograd.grad(sum(t.double().square().sum() for t in results[0]), list(lstm.parameters()))
        assert all(g.dtype == dtype and g.isfinite().all() and g.any() for g in found)
        for result, truth in zip(*results, strict=True):
            torch.testing.assert_close(result.double(), truth, rtol=0, atol=16 * torch.finfo(expected).eps)


DEEP_PROJECTION = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
CALLS = [("step", {}), ("readout", {})]
CALLS += [(call, o) for call in ("padded", "unbatched", "packed") for o in ({}, {"proj_size": 2}, DEEP_PROJECTION)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call, options", CALLS, ids=str)
def test_by_default_a_cpu_gives_what_torch_gives(call, options, dtype):
    torch.manual_seed(0)
    kinds = {"step": (LSTMCell, torch.nn.LSTMCell), "readout": (SoftmaxReadout, torch.nn.Linear)}
    ours, torchs = (kind(3, 4, **options) for kind in kinds.get(call, (LSTM, torch.nn.LSTM)))
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3)
    x = {"padded": x, "packed": pack_padded_sequence(x, [5, 3])}.get(call, x[:, 0])
    found = []
    for module in (ours, torchs):
        with torch.autocast("cpu", dtype):
            if dtype == torch.float16 and call in ("padded", "unbatched") and not options:  # torch's fails on most CPUs
                assert {t.dtype for t in tree_leaves(ours(x))} == {dtype}
                return
            results = module(x)
            results = results.softmax(-1) if module is torchs and call == "readout" else results
        results = [t for t in tree_leaves(results) if t is not None and t.is_floating_point()]
        loss = sum(t.float().square().sum() for t in results)
        found.append([*results, *torch.autograd.grad(loss, list(module.parameters()))])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


class Outputs(torch.nn.Module):
    """The outputs of a layer, of padded data where there are no batch sizes, as tensors: what tracers and compilers take."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, data, *batch_sizes):
        y, states = self.layer(PackedSequence(data, *batch_sizes) if batch_sizes else data)
        return y.data if batch_sizes else y, *states


def traced(layer, inputs):
    return torch.jit.trace(layer, inputs, check_trace=False)(*inputs)


def compiled(layer, inputs):
    return torch.compile(layer, backend="eager")(*inputs)


@pytest.mark.parametrize(("packed", "options"), [(True, {}), (False, {"proj_size": 2})], ids=str)
def test_dtypes_on_a_cpu_do_not_depend_on_who_records_the_call(packed, options):
    """Those of torch, but for a backend that is asked for: the dtype of the autocast, as on a GPU."""
    x = pack_padded_sequence(torch.randn(5, 2, 3), [5, 3])
    inputs = (x.data, x.batch_sizes) if packed else (torch.randn(5, 2, 3),)
    ours, precise, forced = (
        Outputs(LSTM(3, 4, **options, **more)) for more in ({}, {"precision": "ieee"}, {"backend": "reference"})
    )
    with torch.autocast("cpu", LOW):
        expected = [t.dtype for t in Outputs(torch.nn.LSTM(3, 4, **options))(*inputs)]
        found = [precise(*inputs), traced(ours, inputs), traced(precise, inputs), compiled(ours, inputs)]
        assert [[t.dtype for t in outputs] for outputs in found] == [expected] * len(found)
        for outputs in (forced(*inputs), traced(forced, inputs)):
            assert {t.dtype for t in outputs} == {LOW}
