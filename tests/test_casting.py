"""Autocast: how often a parameter is cast, for how long the casts are held, and devices that know no autocast."""

import contextlib

import pytest
import torch
from support.lstms import flat
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


# Each is called with ones; of an LSTM and a cell the first output counts.
KINDS = {LSTMCell: (2,), LSTM: (3, 2), SoftmaxReadout: (2,)}
kinds = pytest.mark.parametrize("kind", KINDS)


def module_of(kind, device):
    torch.manual_seed(0)
    return kind(3, 5, device=device, backend="triton")


def output_of(module, dtype=LOW):
    """Of a call under an autocast of its own."""
    weight = next(module.parameters())
    with torch.autocast(weight.device.type, dtype):
        return tree_leaves(module(torch.ones(*KINDS[type(module)], 3, device=weight.device, dtype=weight.dtype)))[0]


def gradients(output, module):
    return torch.autograd.grad(output.float().square().sum(), list(module.parameters()), retain_graph=True)


def alive(casts):
    return sum(reference() is not None for reference in casts)


@kinds
def test_calls_share_one_cast_of_each_parameter(kind, device, casts):
    module, low = module_of(kind, device), module_of(kind, device).to(LOW)
    with torch.autocast(device.type, LOW):
        outputs = [output_of(module) for _ in range(3)]
    assert len(casts) == alive(casts) == len(list(module.parameters()))
    first, again, joined = (gradients(y, module) for y in (*outputs[:2], torch.cat(outputs)))
    assert all(map(torch.equal, first, again)), "two graphs that share a cast have a backward each"
    for one, three, expected in zip(first, joined, gradients(output_of(low), low), strict=True):
        assert one.dtype == three.dtype == torch.float32
        torch.testing.assert_close(one, expected.float(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(three, 3 * expected.float(), rtol=0.02, atol=0.02)


@kinds
def test_casts_end_with_the_outermost_autocast(kind, device, casts):
    module = module_of(kind, device)
    n = len(list(module.parameters()))
    with torch.autocast(device.type, LOW):
        for _ in range(2):
            output_of(module)  # an autocast within the autocast
        assert len(casts) == alive(casts) == n
    assert alive(casts) == 0
    output = output_of(module)
    assert len(casts) == 2 * n and alive(casts) == n  # the graph holds them, as that of torch's own casts does
    output.float().sum().backward()
    del output
    assert alive(casts) == 0


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


@kinds
@pytest.mark.parametrize("change", [replace_values, replace_memory, write_through_data])
def test_a_changed_parameter_is_cast_again(change, kind, device):
    """After the autocast, while a graph holds the casts, and inside of it, where torch keeps the cast of the value before."""
    for inside in (False,) if change is write_through_data else (False, True):  # which leaves no trace on the parameter
        module = module_of(kind, device)
        with torch.autocast(device.type, LOW) if inside else contextlib.nullcontext():
            before = output_of(module)
            change(module)
            found = output_of(module)
        assert not torch.equal(found, before)
        with torch.no_grad():  # where no cast is kept
            assert torch.equal(found, output_of(module))


def test_where_no_cast_is_reused(device):
    """For another dtype; without gradients or torch's cache, under a dispatch mode or a transform, of frozen parameters."""
    cell = module_of(LSTMCell, device)
    with torch.autocast(device.type, LOW):
        assert [output_of(cell, dtype).dtype for dtype in (LOW, torch.float16)] == [LOW, torch.float16]
    casting._held.clear()
    with torch.no_grad():
        output_of(cell)
    with torch.autocast(device.type, LOW, cache_enabled=False):
        cell(torch.ones(2, 3, device=device))
    with Watching():
        output_of(cell)

    def loss(parameters):
        with torch.autocast(device.type, LOW):
            return torch.func.functional_call(cell, parameters, (torch.ones(2, 3, device=device),))[0].float().sum()

    torch.func.grad(loss)({name: p.detach() for name, p in cell.named_parameters()})
    output_of(cell.requires_grad_(False))
    assert not casting._held


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
    expected = torch.float64 if dtype == torch.float64 else LOW
    options = dict(num_layers=2, device=device, precision="ieee", backend=backend)
    module, plain = (LSTM(3, 4, dtype=of, **options) for of in (dtype, expected))
    plain.load_state_dict(module.state_dict())
    x, hx = torch.randn(2, 2, 3, device=device), torch.randn(2, 2, 2, 4, device=device)
    for packed in (False, True):
        found = []
        for m, of in ((module, dtype), (plain, expected)):
            given = pack_padded_sequence(x.to(of), [2, 1]) if packed else x.to(of)
            with torch.autocast(device.type, LOW, enabled=m is module):
                results = flat(m(given, tuple(hx.to(of)), return_cell_states=packed))
            gradients = torch.autograd.grad(sum(t.double().square().sum() for t in results), list(m.parameters()))
            assert {t.dtype for t in results} == {expected} and {g.dtype for g in gradients} == {of}
            found.append((results, [g.double() for g in gradients]))
        assert all(map(torch.equal, found[0][0], found[1][0]))
        torch.testing.assert_close(found[0][1], found[1][1], rtol=0.02, atol=0.02)


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


@pytest.mark.parametrize(("packed", "options"), [(True, {}), (False, {"proj_size": 2})], ids=str)
def test_dtypes_on_a_cpu_do_not_depend_on_who_records_the_call(packed, options):
    """Those of torch, but for a backend that is asked for: the dtype of the autocast, as on a GPU."""
    x = torch.randn(5, 2, 3)
    packed = pack_padded_sequence(x, [5, 3]) if packed else None
    inputs = (x,) if packed is None else (packed.data, packed.batch_sizes)

    def outputs(layer):
        def call(x, *sizes):
            y, states = layer(PackedSequence(x, *sizes) if sizes else x)
            return (y.data if sizes else y), *states

        return call

    def dtypes(call):
        return [t.dtype for t in call(*inputs)]

    theirs = torch.nn.LSTM(3, 4, **options)
    ours, precise, forced = (
        outputs(LSTM(3, 4, **options, **more).requires_grad_(False))  # a trace of a function takes constants
        for more in ({}, {"precision": "ieee"}, {"backend": "reference"})
    )
    with torch.autocast("cpu", LOW):
        traced, traced_precise, traced_forced = (
            torch.jit.trace(call, inputs, check_trace=False) for call in (ours, precise, forced)
        )
        for call in (precise, traced, traced_precise, torch.compile(ours, backend="eager")):
            assert dtypes(call) == dtypes(outputs(theirs))
        for call in (forced, traced_forced):
            assert set(dtypes(call)) == {LOW}
