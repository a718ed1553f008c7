"""From a call to its launch: how many, how large, what is allocated, what recompiles, and that no wrong kernel is reused.

Checks of the real JIT run in one process of their own, without the interpreter and on a driver that launches nothing.
"""

import contextlib
import inspect
import itertools
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from support.fake_driver import count_compiled, fake_driver
from support.process import run_checks, run_without_interpreter
from triton import knobs

from lstm_triton.kernels import cell, cell_backward, launch, readout, readout_backward, readout_sums
from lstm_triton.kernels.cell import lstm_cell_forward
from lstm_triton.kernels.cell_backward import lstm_cell_backward
from lstm_triton.kernels.config import LaunchConfig
from lstm_triton.kernels.inputs import (
    CellGradients,
    CellInputs,
    CellSaved,
    ReadoutGradients,
    ReadoutInputs,
    ReadoutOptions,
    ReadoutSaved,
)
from lstm_triton.kernels.launch import Launcher

FORWARD, BACKWARD = "_lstm_cell_forward_kernel", "_lstm_cell_backward_kernel"


@pytest.mark.long
def test_real_jit():
    assert "checks passed" in run_without_interpreter(__file__)


# ---- in the suite's own process ------------------------------------------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch, poisoned_outputs):
    """Launches are recorded as (kernel, grid), not executed, and outputs are not poisoned."""
    launches = []

    def record(self, grid, *_, **__):
        launches.append((self.kernel.fn.__name__, grid))

    monkeypatch.setattr(launch.Launcher, "__call__", record)
    for module in (cell, cell_backward):
        monkeypatch.setattr(module, "torch", torch)
    return launches


@pytest.mark.parametrize("training", [False, True])
def test_nothing_but_allocations_and_the_launch(training, device, without_kernels):
    """No copy, cast or fill: each would be a launch of its own on a GPU."""
    from lstm_triton import LSTMCell

    cell = LSTMCell(7, 9, device=device, backend="triton").requires_grad_(training)
    x, h, c, dh, dc = (torch.randn(3, n, device=device) for n in (7, 9, 9, 9, 9))
    cell(x, (h, c))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results = cell(x, (h, c))
        if training:
            torch.autograd.grad(results, list(cell.parameters()), (dh, dc))
    operators = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert operators <= {"aten::empty", "aten::new_empty", "aten::detach", "aten::view_as", "aten::alias"}, operators
    expected = [FORWARD, FORWARD, BACKWARD] if training else [FORWARD, FORWARD]
    assert [name for name, _ in without_kernels] == expected


def _backward_grid(needs, device, without_kernels):
    from support.problems import cells

    x, h, c, w_ih, w_hh, *biases = cells.draw(40, 50, 70, device=device).inputs
    without_kernels.clear()
    saved = CellSaved(c, torch.empty(40, 70, 4, device=device))
    inputs = CellInputs(x, h, c, w_ih, w_hh, *biases)
    grads = lstm_cell_backward(CellGradients(h, c), inputs, saved, needs)
    assert list(grads) == list(needs), "what is not needed is not allocated"
    return without_kernels[0][1][0] if without_kernels else 0


def test_what_is_not_needed_is_not_launched(device, without_kernels):
    def programs(*wanted):
        return _backward_grid(wanted, device, without_kernels)

    alone = {name: programs(name) for name in CellInputs._fields if name != "seed"}
    assert all(alone.values()) and programs() == 0
    assert programs("c", "b_ih", "b_hh") == alone["c"] == alone["b_ih"] == alone["b_hh"], "these share their programs"
    for wanted in itertools.combinations(CellInputs._fields[:5], 3):
        assert programs(*wanted) == sum(alone[name] for name in wanted), wanted


def test_outputs_own_dense_storage(device, without_kernels):
    from support.problems import cells

    inputs = CellInputs(*cells.draw(3, 7, 9, device=device).inputs)
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


# ---- in a process without the interpreter --------------------------------------------------------------------------


def _cell(B, I, H):
    """A step forward and backward."""
    shapes = ((B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    inputs = CellInputs(*(torch.empty(shape, dtype=torch.bfloat16) for shape in shapes))
    h, c, gates = lstm_cell_forward(inputs, save=True)
    lstm_cell_backward(CellGradients(h, c), inputs, CellSaved(c, gates), CellInputs._fields)


def _readout(B, H, V):
    h, weight, bias = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((B, H), (V, H), (V,)))
    inputs, options = ReadoutInputs(h, weight, bias), ReadoutOptions(None, h.dtype)
    (y,) = readout.softmax_readout_forward(inputs, options)
    readout_backward.softmax_readout_backward(ReadoutGradients(y), inputs, ReadoutSaved(y), inputs._fields, options)


def check_sizes_recompile_only_by_divisibility():
    """Calls with sizes of one group compile kernels once, and those of another again, this many in all of each kernel."""
    cell_kernels = (cell._forward.kernel, cell_backward._backward.kernel)
    readout_kernels = (readout._forward, readout._rescale, readout_backward._backward, readout_sums._dots)
    readout_kernels = (*(launcher.kernel for launcher in readout_kernels), readout_sums._sum_parts.kernel)
    for call, kernels, groups in (
        (
            _cell,
            cell_kernels,
            [
                ([(7, 20, 36), (1, 20, 36), (16, 20, 36), (7, 33, 36), (7, 2, 2), (5, 999, 77)], (1, 1)),
                ([(17, 20, 36), (64, 20, 36), (1001, 50, 20)], (2, 2)),  # the tile for larger batches
                ([(7, 32, 64), (16, 64, 32), (1, 32, 160), (3, 1600, 64)], (3, 3)),  # multiples of 16
            ],
        ),
        (
            _readout,
            readout_kernels,
            [
                ([(8, 64, 1024), (1, 64, 1024), (16, 64, 1024), (8, 1600, 1024), (8, 64, 4096)], (1,) * 5),
                # Sums of parts of dh alone, as here, are of one size, which is not specialised.
                ([(8, 33, 1025), (8, 77, 1025), (8, 2, 1025), (8, 33, 999), (3, 33, 4001)], (2, 2, 2, 2, 1)),
            ],
        ),
    ):
        with fake_driver(compiling=False) as driver:
            for shapes, expected in groups:
                for shape in shapes:
                    call(*shape)
                    assert tuple(map(count_compiled, kernels)) == expected, shape
            assert {name for name, _ in driver.launches} == {kernel.fn.__name__ for kernel in kernels}


def check_small_batches_fill_the_gpu():
    """One row of a large vocabulary, and the cell at B = 16."""
    with fake_driver(sm_count=132, compiling=False) as driver:
        _readout(1, 64, 128 * 1024)
        grids = {launch.kernel: launch.grid[0] for launch in driver.launches}
        assert grids["_readout_forward_kernel"] == 1024 and grids["_readout_row_dots_kernel"] == 128, grids
        assert grids["_readout_rescale_kernel"] >= 132 and grids["_readout_backward_kernel"] >= 3 * 132, grids
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            shapes = ((16, 8), (16, 1024), (16, 1024), (4096, 8), (4096, 1024))
            lstm_cell_forward(CellInputs(*(torch.empty(shape, dtype=dtype) for shape in shapes)))
            assert driver.launches[-1].grid[0] >= 132, dtype


@triton.jit(do_not_specialize=["n"])
def _tiny_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < n)
    if y_ptr is not None:
        x += tl.load(y_ptr + i, mask=i < n)
    tl.store(x_ptr + i * stride, x, mask=i < n)


class _Watched(dict):
    """A launcher's kept kernels, noting which was found last."""

    found = None

    def get(self, key):
        self.found = super().get(key)
        return self.found


def check_a_kept_kernel_is_the_one_triton_would_choose():
    storage = {dtype: torch.empty(256, dtype=dtype) for dtype in (torch.float32, torch.float16)}
    pointers = [(t.dtype, offset) for t in storage.values() for offset in (0, 8, 1)]
    calls = itertools.product(
        pointers,
        [None, *pointers],
        (1, 16, 17, 2**31),
        (1, 16, 3),
        (32, 64),
        (LaunchConfig(1, 1), LaunchConfig(2, 1), LaunchConfig(1, 2)),
    )
    calls = [call for k, call in enumerate(calls) if k % 127 == 0]
    kept = 0
    with fake_driver(compiling=False) as driver:
        launcher = Launcher(_tiny_kernel)
        launcher._compiled = _Watched()
        for repeat in range(2):
            for x, y, n, stride, block, config in calls:
                tensors = [None if p is None else storage[p[0]][p[1] :] for p in (x, y)]
                launcher._compiled.found = None
                x_ptr, y_ptr = tensors
                launcher((1, 1, 1), config, dict(BLOCK=block, stride=stride, n=n, y_ptr=y_ptr, x_ptr=x_ptr))
                expected = _tiny_kernel.warmup(*tensors, n, stride, block, grid=(1,), **config.options)
                found = launcher._compiled.found
                assert found is None or found is expected, (x, y, n, stride, block, config)
                assert (found is not None) >= (repeat == 1), "an equal call looks nothing up twice"
                kept += found is not None
        assert kept > len(calls) / 8, "too few calls took the short way to show anything"
        assert len(driver.launches) == 2 * len(calls)


def _launch_tiny(launcher, **changed):
    arguments = dict(x_ptr=torch.empty(64), y_ptr=None, n=7, stride=2, BLOCK=32) | changed
    launcher((1, 1, 1), LaunchConfig(1, 1), {name: value for name, value in arguments.items() if value != "left out"})


def check_hooks_of_triton_see_every_launch():
    """They see launches of kept kernels too, and those of kept kernels happen without them."""
    launcher, seen, hook = Launcher(_tiny_kernel), [], knobs.runtime.launch_enter_hook

    def enter(metadata):
        seen.append(metadata.get()["name"])

    with fake_driver(compiling=False) as driver:
        for n, hooked in enumerate((False, False, True, False)):
            with contextlib.ExitStack() as stack:
                if hooked:
                    hook.add(enter)
                    stack.callback(hook.remove, enter)
                _launch_tiny(launcher)
            assert len(driver.launches) == n + 1 and driver.launches[n] == driver.launches[0]
            assert seen == ["_tiny_kernel"] * (n >= 2)


def check_a_first_launch_is_not_captured():
    """A kernel that is kept is launched while a CUDA graph is captured, one that must be compiled is an error."""
    launcher, gpu, values = Launcher(_tiny_kernel), torch.device("cuda", 0), (torch.empty(64), None, 7)
    with fake_driver(compiling=False) as driver, mock.patch("torch.cuda.is_current_stream_capturing") as capturing:
        for capturing.return_value in (False, True):
            launcher._launch(gpu, (1, 1, 1), LaunchConfig(1, 1), (*values, 2, 32), {})
        with pytest.raises(RuntimeError, match="^_tiny_kernel is launched .* for the first time"):
            launcher._launch(gpu, (1, 1, 1), LaunchConfig(1, 1), (*values, 3, 32), {})
        assert len(driver.launches) == 2


def check_every_argument_has_a_name():
    with fake_driver(compiling=False):
        for wrong, error in (
            (dict(m=1), TypeError),
            (dict(n="left out"), TypeError),
            (dict(n="left out", m=1), KeyError),
        ):
            with pytest.raises(error):
                _launch_tiny(Launcher(_tiny_kernel), **wrong)


def check_kept_kernels_are_bounded():
    launch._MAX_KEPT = 8
    with fake_driver(compiling=False):
        launcher = Launcher(_tiny_kernel)
        for n in range(100):
            _launch_tiny(launcher, n=n)
        assert len(launcher._compiled) == 1, "one for each value of an integer that is not specialised"
        for stride in range(2, 100):
            _launch_tiny(launcher, stride=stride)
            assert len(launcher._compiled) <= 8
        assert count_compiled(_tiny_kernel) == 2


if __name__ == "__main__":
    run_checks(globals())
