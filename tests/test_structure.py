"""The shape of the code, which reviews alone would not hold: short paths, names for what travels together, no circles."""

import pytest
import torch
from support import structure
from support.structure import trace

from lstm_triton import LSTM

OURS = tuple(structure.FOLDERS)
# Public signatures follow PyTorch's.
PUBLIC = {"lstm_triton/layers.py:lstm"}


@pytest.fixture
def layer(device):
    """A layer and its input, run once: imports are no part of a call."""
    module, x = LSTM(4, 5, backend="triton", device=device), torch.randn(3, 2, 4, device=device)
    module(x)[0].sum().backward()
    return module, x


def test_a_layer_reaches_its_kernel_in_few_frames(layer):
    module, x = layer
    for training in (True, False):
        with torch.set_grad_enabled(training):
            found = trace(lambda: module(x))
        assert (found.chain[0], found.chain[-1]) == (("lstm.py", "forward"), ("launch.py", "__call__"))
        assert len(found.chain) <= 8 and len(found.files) <= 6, found.chain


def test_so_does_its_backward(layer, device):
    if device.type != "cpu":
        pytest.skip("on a GPU the backward runs in a thread of autograd's, which is not traced")
    module, x = layer
    loss = module(x)[0].sum()
    found = trace(lambda: torch.autograd.grad(loss, list(module.parameters())))
    assert (found.chain[0], found.chain[-1]) == (("autograd.py", "backward"), ("launch.py", "__call__"))
    assert len(found.chain) <= 7 and len(found.files) <= 6, found.chain


def test_arguments_that_belong_together_travel_together():
    found = structure.wide_functions(8, "lstm_triton", "kernels", "bench")
    assert set(found) == PUBLIC, found


def test_what_travels_has_names():
    """No look-up by position past the first few, as in a flat list of arguments."""
    assert not structure.flat_indices("lstm_triton", "kernels")


def test_nothing_is_imported_in_a_circle():
    graph = structure.imports(*OURS)
    assert {"lstm_triton.lstm", "lstm_triton.kernels.layer"} <= set(graph)
    assert not structure.circles(graph)


def test_kernels_know_nothing_of_what_calls_them():
    for module, imported in structure.imports(*OURS).items():
        if module.startswith("lstm_triton.kernels"):
            assert all(name.startswith("lstm_triton.kernels") for name in imported), module


def test_the_library_knows_nothing_of_its_clients():
    """The command line and the demo alone import the benchmark."""
    clients = "lstm_triton.bench", "lstm_triton.demo"
    for module, imported in structure.imports(*OURS).items():
        if not module.startswith((*clients, "lstm_triton.cli")):
            assert not any(name.startswith(clients) for name in imported), module


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": set()}
    assert structure.circles(graph) == [{"b", "c"}, {"d"}]


def test_ruff_formats_nearly_all_of_it():
    """But the signatures of a few kernels, whose arguments stand in groups."""
    skips, offs = structure.hand_formatted("lstm_triton", "kernels", "bench", "tests", "examples", "docs")
    assert skips < 10 and offs == 0
