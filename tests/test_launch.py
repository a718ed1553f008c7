"""From a call to its launches: how many, how large, what is allocated, and what is said of those that are refused."""

import functools
import inspect
import itertools

import pytest
import torch
from support.problems import cells

from lstm_triton import LSTM, LSTMCell, dispatch
from lstm_triton.kernels import device, interpreter
from lstm_triton.kernels.cell import lstm_cell_forward
from lstm_triton.kernels.cell_backward import lstm_cell_backward
from lstm_triton.kernels.inputs import CellGradients, CellInputs, CellSaved
from lstm_triton.kernels.launch import Launcher

FORWARD, BACKWARD = "_lstm_sequence_forward_kernel", "_lstm_sequence_backward_kernel"


@functools.lru_cache(maxsize=4)
def make_lstm(H, D, dtype=torch.bfloat16, num_layers=1, backend="triton", **options):
    return LSTM(4, H, num_layers, bidirectional=D == 2, dtype=dtype, precision="tf32", backend=backend, **options)


def run_lstm(T, B, H, D=1, features="", batch_first=False, num_layers=1, **options):
    """An LSTM forward and, in training, backward. The states of each of its layers are a part of larger tensors."""
    lstm = make_lstm(H, D, num_layers=num_layers, recompute="recompute" in features, **options)
    lstm.batch_first, lstm.dropout = batch_first, 0.01 * B * ("dropout" in features)
    training = "inference" not in features
    sizes, rows, dtype = (B, T) if batch_first else (T, B), (num_layers * D, B), lstm.weight_ih_l0.dtype
    h, c = (torch.zeros(*rows, H, dtype=dtype, requires_grad=training) for _ in "hc")
    given = {"return_cell_states": True} if "cells" in features else {}
    given |= {"resets": torch.zeros(sizes, dtype=torch.bool)} if "resets" in features else {}
    given |= {"lengths": torch.zeros(B, dtype=torch.int64)} if "lengths" in features else {}
    shapes = {"stored": (T, *rows, H), "shared": (num_layers * D, 1, H)}
    for shape in (shapes[name] for name in shapes if name in features):
        given["reset_state"] = tuple(torch.zeros(shape, dtype=dtype, requires_grad=training) for _ in "hc")
    with torch.set_grad_enabled(training):
        x = torch.zeros(*sizes, 4, dtype=dtype, requires_grad=training)
        y, states, *every_c = lstm(x, (h, c), **given)
        if training:
            results = [y, *states, *every_c]
            torch.autograd.grad(results, [x, h, c, *lstm.parameters()], [torch.zeros_like(t) for t in results])


@pytest.fixture
def recorded(monkeypatch, checked_memory):
    """Launches, as (name, grid, config, arguments): they are not made, and planned as on a GPU, where programs may wait."""
    from conftest import KERNEL_MODULES

    launches = []

    def record(self, grid, config, arguments, **options):
        with torch.profiler.record_function(name := self.kernel.fn.__name__):
            launches.append((name, grid, config, arguments | options))

    monkeypatch.setattr(Launcher, "__call__", record)
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    monkeypatch.setattr(dispatch, "_why_no_kernels", lambda *arguments: None)
    for module in KERNEL_MODULES:  # outputs are not poisoned
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", torch)
    dispatch._remembered.cache_clear()
    yield launches
    dispatch._remembered.cache_clear()


# Allocations and views launch nothing on a GPU; what these do beside that is listed.
ALLOCATIONS, VIEWS = (
    "empty new_empty empty_like empty_strided",
    "as_strided detach view_as alias view t transpose select slice",
)
FREE = {f"aten::{name}" for name in f"{ALLOCATIONS} {VIEWS} expand split flatten".split()}


def _operators(call):
    """The kernels and torch's operators of a call, in order: each would be a launch of its own on a GPU."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()

    def counts(event):
        return event is not None and event.name.startswith(("aten::", "_lstm")) and event.name not in FREE

    def is_within_another(event):
        return event is not None and (counts(event) or is_within_another(event.cpu_parent))

    return [e.name for e in profile.events() if counts(e) and not is_within_another(e.cpu_parent)]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_but_the_launch_of_a_step(training, recorded):
    module = LSTMCell(7, 9, backend="triton").requires_grad_(training)
    x, h, c, dh, dc = (torch.randn(3, n) for n in (7, 9, 9, 9, 9))

    def call():
        results = module(x, (h, c))
        if training:
            torch.autograd.grad(results, list(module.parameters()), (dh, dc))

    assert _operators(call) == ["_lstm_cell_forward_kernel", "_lstm_cell_backward_kernel"][: 1 + training]


@pytest.mark.parametrize("D", [1, 2])
def test_launches_beside_the_recurrence(D, recorded):
    """One for W_ih and all biases, one GEMM, and what says of h that it is not there yet."""
    x, *hx = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((4, 2, 4), (D, 2, 256), (D, 2, 256)))
    with torch.no_grad():
        found = _operators(lambda: make_lstm(256, D)(x, hx))
    assert found == ["_lstm_input_weights_kernel", "aten::addmm", "aten::fill_", FORWARD]


def test_what_is_not_needed_is_not_launched(recorded):
    inputs = CellInputs(*cells.draw(40, 50, 70).inputs)
    saved = CellSaved(inputs.c, torch.empty(40, 70, 4))

    def programs(*needs):
        recorded.clear()
        grads = lstm_cell_backward(CellGradients(inputs.h, inputs.c), inputs, saved, needs)
        assert list(grads) == list(needs), "what is not needed is not allocated"
        return recorded[0][1][0] if recorded else 0

    alone = {name: programs(name) for name in CellInputs._fields if name != "seed"}
    assert all(alone.values()) and programs() == 0
    assert programs("c", "b_ih", "b_hh") == alone["c"] == alone["b_ih"] == alone["b_hh"], "these share their programs"
    for wanted in itertools.combinations(CellInputs._fields[:5], 3):
        assert programs(*wanted) == sum(alone[name] for name in wanted), wanted


def test_outputs_own_dense_storage(recorded):
    inputs = CellInputs(*cells.draw(3, 7, 9).inputs)
    outputs = lstm_cell_forward(inputs, save=True)
    given = [t for t in inputs if t is not None]
    storages = {t.untyped_storage().data_ptr() for t in (*given, *outputs)}
    assert len(storages) == len(given) + 3
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in outputs)
    assert lstm_cell_forward(inputs).gates is None, "no gates unless asked for"


def test_the_suite_poisons_every_output():
    """conftest sees torch.empty and its kin in the kernels' modules, and no method of tensors."""
    from conftest import KERNEL_MODULES

    for module in KERNEL_MODULES:
        assert ".new_empty" not in inspect.getsource(module), module.__name__


@pytest.mark.parametrize("T", [1, 2])
def test_one_step_waits_for_nothing(T, recorded):
    """No counters to zero, and no cooperative launch, which a CUDA graph's conditional node could not hold.

    With resets, without which the kernels of the cell serve one step.
    """
    run_lstm(T, 16, 256, features="resets")
    found, waits = [launch for launch in recorded if launch[0] in (FORWARD, BACKWARD)], T > 1
    assert [kernel for kernel, *_ in found] == [FORWARD, BACKWARD]
    for _, grid, config, arguments in found:
        assert config.persistent == waits and grid[0] > 1
        assert (arguments["stall_ptr"] is not None) == waits
        assert (arguments["counters_ptr"] is not None) == (waits and not config.in_band)
        assert arguments["launch_cooperative_grid"] == waits


def test_the_last_range_of_recomputed_gates_is_one_step(recorded):
    run_lstm(33, 2, 256, features="recompute")
    found = [arguments for kernel, _, _, arguments in recorded if kernel == BACKWARD]
    steps = [(a["first_step"], a["last_step"], a["stall_ptr"] is not None) for a in found]
    assert steps == [(0, 32, True), (32, 33, False)]


@pytest.mark.parametrize(
    "message, told",
    [
        ("[CUDA]: too many blocks in cooperative launch", r"\d+ programs .* LSTM_TRITON_FREE_MULTIPROCESSORS"),
        ("[CUDA]: operation not supported", r"\d+ programs .* may not launch .*: .* backend='triton-stepwise'"),
        ("[CUDA]: out of memory", "out of memory"),
    ],
)
def test_a_launch_that_is_refused_says_what_to_do(message, told, recorded, monkeypatch):
    """By a driver that has fewer multiprocessors for this process than the GPU has."""
    record = Launcher.__call__

    def refuse(self, *arguments, launch_cooperative_grid=False):
        record(self, *arguments)
        if launch_cooperative_grid:
            raise RuntimeError(message)

    monkeypatch.setattr(Launcher, "__call__", refuse)
    with pytest.raises(RuntimeError, match=told):
        run_lstm(2, 16, 256)


def test_multiprocessors_are_left_free(recorded, monkeypatch):
    """Of an H100's 132: 32 programs in 4 groups fit, but not beside others."""
    grids = []
    for free in (0, 4, 5, 131, 1000):
        monkeypatch.setattr(device, "FREE_MULTIPROCESSORS", free)
        recorded.clear()
        run_lstm(2, 128, 512, features="inference")
        grids.append([(grid[0], config.persistent) for kernel, grid, config, _ in recorded if kernel == FORWARD])
    assert grids[:2] == [[(128, True)]] * 2
    for fewer, free in zip(grids[2:], (5, 131, 1000)):
        assert all(programs <= 132 - free or not persistent for programs, persistent in fewer)
    assert [persistent for _, persistent in grids[-1]] == [False, False], "one launch per step always fits"


def test_how_many_are_left_free_is_read_from_the_environment(monkeypatch):
    assert device._free_multiprocessors() == 0
    monkeypatch.setenv("LSTM_TRITON_FREE_MULTIPROCESSORS", "16")
    assert device._free_multiprocessors() == 16
    for wrong in ("-1", "half", ""):
        monkeypatch.setenv("LSTM_TRITON_FREE_MULTIPROCESSORS", wrong)
        with pytest.raises(ValueError, match="LSTM_TRITON_FREE_MULTIPROCESSORS must be a number"):
            device._free_multiprocessors()
