"""Every operator under autograd: derivatives of every order, partial ones, hooks, checkpoints, autocast, inference."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from support.operations import OPERATIONS, cell, operations
from torch.utils.checkpoint import checkpoint

three = operations("cell", "readout", "layer with segments")


@pytest.fixture(autouse=True)
def no_autograd_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*autograd kernel.*")
        warnings.filterwarnings("error", ".*silently incorrect.*")
        yield


# ---- derivatives of every order --------------------------------------------------------------------------------------

# One weight in both places, h = c, and x computed from h: each gradient is the total one.
depending = replace(
    cell,
    inputs=[cell.inputs[1], cell.inputs[4]],  # h and w_hh
    by=lambda backend: lambda h, w: cell.by(backend)(torch.tanh(h), h, h, w, w),
    torchs=lambda h, w: torch.lstm_cell(torch.tanh(h), (h, h), w, w),
)
NAMED = OPERATIONS | {"inputs that depend on each other": depending}


@pytest.mark.parametrize("name", NAMED)
def test_derivatives_up_to_the_third(name, device):
    """Those of torch's own operator, or of the reference, which autograd alone makes."""
    operation = NAMED[name]
    leaves, _ = operation.draw(device)

    def derivatives(function):
        results, orders = function(*leaves), []
        for _ in range(3):
            results = results if isinstance(results, tuple) else (results,)
            loss = sum((t**2).sum() + (t**3).sum() for t in results)
            results = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
            orders += results
        return orders

    expected = derivatives(operation.torchs or operation.plain)
    for ours, theirs in zip(derivatives(operation.run), expected, strict=True):
        # Some ulps of the tensor's largest element: those of high order reach the thousands.
        atol = 2**-40 * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=atol)


# ---- partial ones ----------------------------------------------------------------------------------------------------


@pytest.fixture
def backwards(monkeypatch):
    """backwards(operator): a list that gets the gradients that arrive and the names needed, at each launch of its backward."""

    def watch(operator):
        seen, launch = [], operator.launch_backward

        def launch_backward(grads, inputs, saved, names, options):
            seen.append((grads, names))
            return launch(grads, inputs, saved, names, options)

        monkeypatch.setattr(operator, "launch_backward", launch_backward)
        return seen

    return watch


@three
def test_only_what_needs_a_gradient_is_computed(operation, device, backwards):
    leaves, cotangents = operation.draw(device)
    expected = dict(zip(operation.names, torch.autograd.grad(operation.run(*leaves), leaves, cotangents)))
    seen = backwards(operation.operator)
    reverse = {name for name in operation.names if name.endswith("_reverse")}
    for asked in [{name} for name in operation.names if name not in reverse] + [set(operation.names[-2:]), reverse]:
        inputs = [t.detach().requires_grad_(name in asked) for name, t in zip(operation.names, leaves)]
        wanted = {name: t for name, t in zip(operation.names, inputs) if name in asked}
        if not wanted:
            continue
        found = torch.autograd.grad(operation.run(*inputs), list(wanted.values()), cotangents)
        assert seen.pop()[1] == asked and not seen
        for name, gradient in zip(wanted, found, strict=True):
            # Where others are left out, a kernel may sum in another order.
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-13, msg=name)


@operations("cell", "readout", "layer with segments", "GRU layer", "sLSTM layer")
def test_a_gradient_of_one_output_alone(operation, device, backwards):
    """And one of strides 0, as a sum sends back."""
    leaves, cotangents = operation.draw(device)
    outputs, seen = operation.run(*leaves), backwards(operation.operator)
    for k, output in enumerate(outputs):
        zeros = [g if k == j else torch.zeros_like(g) for j, g in enumerate(cotangents)]
        given = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        found = torch.autograd.grad(output, leaves, cotangents[k], **given)
        expected = torch.autograd.grad(outputs, leaves, zeros, **given)
        assert all(map(torch.equal, found, expected))
        if operation.names:
            assert [g is not None for g in seen[0][0]] == [j == k for j in range(len(outputs))], "None, not zeros"
        found = torch.autograd.grad(output.sum(), leaves, **given)
        assert all(map(torch.equal, found, torch.autograd.grad(output, leaves, torch.ones_like(output), **given)))
        seen.clear()


# ---- ways around a call, which change neither results nor gradients --------------------------------------------------


def _saved_as(layout):
    """A hook on saved tensors may return any tensor of the same values."""

    def around(function, *tensors):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, layout):
            return function(*tensors)

    return around


def _reversed(t):
    reverse = tuple(range(t.dim()))[::-1]
    return t.permute(reverse).contiguous().permute(reverse)


def _with_gaps(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def _autocast(function, *tensors):
    """Which leaves float64 alone."""
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        return function(*tensors)


WAYS = {
    "checkpoint": functools.partial(checkpoint, use_reentrant=False),
    "reentrant checkpoint": functools.partial(checkpoint, use_reentrant=True),
    "saved tensors of other strides": _saved_as(_reversed),
    "saved tensors with gaps": _saved_as(_with_gaps),
    "autocast": _autocast,
}


@pytest.mark.parametrize("way", WAYS)
@operations("cell", "readout", "layer with segments", "GRU cell", "zoneout layer")
def test_ways_around_a_call(way, operation, device):
    for options in ({}, {"recompute": True}) if "h0" in operation.names and "saved" in way else ({},):
        leaves, cotangents = operation.draw(device)
        outputs = WAYS[way](functools.partial(operation.run, **options), *leaves)
        torch.autograd.backward(outputs, cotangents)
        expected = operation.trained(leaves, cotangents, **options)
        torch.testing.assert_close([*outputs, *(t.grad for t in leaves)], expected)


@three
def test_backward_twice_through_one_graph(operation, device):
    leaves, cotangents = operation.draw(device)
    results = operation.run(*leaves)
    once = torch.autograd.grad(results, leaves, cotangents, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(results, leaves, cotangents), once))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(results, leaves, cotangents)


@three
def test_results_changed_in_place_raise_or_do_not_matter(operation, device):
    leaves, cotangents = operation.draw(device)
    expected = torch.autograd.grad(operation.run(*leaves), leaves, cotangents)
    for index in range(len(cotangents)):
        results = operation.run(*leaves)
        with torch.no_grad():
            results[index].zero_()
        try:
            found = torch.autograd.grad(results, leaves, cotangents)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert all(map(torch.equal, found, expected))


@three
def test_inference_builds_no_graph_and_saves_nothing(operation, device, monkeypatch):
    """Nor does training save an input that the backward does not read."""
    leaves, _ = operation.draw(device)
    saved, packed, forward = [], [], operation.operator.launch
    monkeypatch.setattr(
        operation.operator, "launch", lambda inputs, options, save: saved.append(save) or forward(inputs, options, save)
    )
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda t: t):
        trained = operation.run(*leaves)
    assert operation is not cell or len(packed) == 5 + 2, "neither bias, but c and gates"
    with torch.no_grad():
        no_grad = operation.run(*leaves)
    with torch.inference_mode():
        inference = operation.run(*leaves)
    frozen = operation.run(*(t.detach() for t in leaves))
    assert saved == [True, False, False, False] and trained[0].grad_fn is not None
    for results in (no_grad, inference, frozen):
        assert all(t.grad_fn is None and not t.requires_grad for t in results)
        assert all(map(torch.equal, results, trained))
    assert inference[0].is_inference()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@operations("cell", "layer with segments", "GRU cell", "zoneout layer")
def test_autocast_casts_before_the_kernels(operation, low, device):
    """All results are in autocast's dtype, as of torch's own cell on a GPU; gradients are in the parameters'."""
    leaves, cotangents = operation.draw(device, torch.float32)
    cotangents = [g.to(low) for g in cotangents]
    low_leaves = [t.detach().to(low).requires_grad_() for t in leaves]
    with torch.autocast(device.type, low):
        found = operation.run(*leaves)
    expected = operation.run(*low_leaves)
    assert all(t.dtype == low for t in found) and all(map(torch.equal, found, expected))
    found, expected = (
        torch.autograd.grad(of, given, cotangents) for of, given in ((found, leaves), (expected, low_leaves))
    )
    for gradient, wanted in zip(found, expected):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted.float(), rtol=0.02, atol=0.02)


@operations("cell", "readout", "layer without biases")
def test_a_tensor_subclass_anywhere_passes_through_the_dispatcher(operation, device):
    """A kernel takes the memory of plain tensors; a subclass must not reach it, wherever it stands."""
    from torch.testing._internal.two_tensor import TwoTensor

    leaves, _ = operation.draw(device)
    tensors = [t.detach() for t in leaves]
    expected = operation.run(*tensors)
    for position, t in enumerate(tensors):
        found = operation.run(*tensors[:position], TwoTensor(t, t), *tensors[position + 1 :])
        assert all(isinstance(result, TwoTensor) for result in found), position
        assert all(torch.equal(result.a, wanted) for result, wanted in zip(found, expected))
