"""From a call to its launch: how many, how large, what is allocated, what recompiles, and that no wrong kernel is reused.

Checks of the real JIT run in one process of their own, without the interpreter and on a driver that launches nothing.
"""

import contextlib
import inspect
import itertools

import pytest
import torch
import triton
import triton.language as tl
from support.fake_driver import count_compiled, fake_driver
from support.process import run_checks, run_without_interpreter

from lstm_triton.kernels.inputs import CellGradients, CellInputs, CellSaved

FORWARD, BACKWARD = "_lstm_cell_forward_kernel", "_lstm_cell_backward_kernel"


@pytest.mark.long
def test_real_jit():
    assert "checks passed" in run_without_interpreter(__file__)


# ---- in the suite's own process ------------------------------------------------------------------------------------


def test_one_launch_each_way(device, count_launches):
    from support import cells

    cells.by_kernels(cells.draw(3, 7, 9, device=device))
    assert count_launches() == {FORWARD: 1, BACKWARD: 1}


@pytest.fixture
def without_kernels(monkeypatch, poisoned_outputs):
    """Launches are recorded as (kernel, grid), not executed, and outputs are not poisoned."""
    from lstm_triton.kernels import cell, cell_backward, launch

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
    from support import cells

    from lstm_triton.kernels.cell_backward import lstm_cell_backward

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


def test_enough_programs_for_every_multiprocessor(device, without_kernels):
    from support import cells

    from lstm_triton.kernels.cell import lstm_cell_forward

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        lstm_cell_forward(CellInputs(*cells.draw(16, 8, 1024, dtype, device=device).inputs))
        _, grid = without_kernels[-1]
        assert grid[0] * grid[1] * grid[2] >= 132, grid


def test_outputs_own_dense_storage(device, without_kernels):
    from support import cells

    from lstm_triton.kernels.cell import lstm_cell_forward

    inputs = CellInputs(*cells.draw(3, 7, 9, device=device).inputs)
    outputs = lstm_cell_forward(inputs, save=True)
    given = [t for t in inputs if t is not None]
    storages = {t.untyped_storage().data_ptr() for t in (*given, *outputs)}
    assert len(storages) == len(given) + 3
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in outputs)
    assert lstm_cell_forward(inputs).gates is None, "no gates unless asked for"


class _StandIn:
    """For a compiled kernel: called as such, it notes its arguments; subscripted and called, it is compiled first."""

    __name__, arg_names = "_some_kernel", ()

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append(options) or self


def test_a_first_launch_is_not_captured(monkeypatch):
    """A kernel that is kept is launched while a CUDA graph is captured, one that must be compiled is an error."""
    from lstm_triton.kernels import config, launch

    kernel, capturing = _StandIn(), False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(launch, "_launch_again", lambda compiled, grid, values: compiled[grid](*values))
    launcher = launch.Launcher(kernel)
    launcher._n_pointers = 1
    launcher._specialized, launcher._unspecialized = (lambda values: values[1:]), (lambda values: ())

    def call(n):
        device = torch.device("cuda", 0)
        launcher._launch(device, (1, 1, 1), config.LaunchConfig(1, 1), (torch.empty(4), n), {})

    call(1)
    capturing = True
    call(1)
    assert len(kernel.calls) == 2 and kernel.calls[1] == {}
    with pytest.raises(RuntimeError, match="^_some_kernel is launched .* for the first time"):
        call(2)
    assert len(kernel.calls) == 2


def test_the_suite_poisons_every_output():
    """conftest sees torch.empty and its kin in the kernels' modules, and no method of tensors."""
    from conftest import KERNEL_MODULES

    for module in KERNEL_MODULES:
        assert ".new_empty" not in inspect.getsource(module), module.__name__


# ---- in a process without the interpreter --------------------------------------------------------------------------


def _forward(B, I, H, dtype=torch.bfloat16, save_gates=True, biases=True):
    from lstm_triton.kernels.cell import lstm_cell_forward

    t = [
        torch.empty(shape, dtype=dtype)
        for shape in ((B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    ]
    return lstm_cell_forward(CellInputs(*(t if biases else t[:5])), save=save_gates)


def _backward(B, I, H, dtype=torch.bfloat16):
    from lstm_triton.kernels.cell_backward import lstm_cell_backward

    shapes = ((B, H), (B, H), (B, H), (B, H, 4), (B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    dh, dc, c, gates, *inputs = (torch.empty(shape, dtype=dtype) for shape in shapes)
    return lstm_cell_backward(CellGradients(dh, dc), CellInputs(*inputs), CellSaved(c, gates), CellInputs._fields)


@contextlib.contextmanager
def _fresh_cell_launchers():
    from lstm_triton.kernels import cell, cell_backward

    for launcher in (cell._forward, cell_backward._backward):
        launcher._compiled.clear()
    with fake_driver(compiling=False) as driver:
        yield driver


def check_sizes_recompile_only_by_divisibility():
    from lstm_triton.kernels.cell import _lstm_cell_forward_kernel as forward
    from lstm_triton.kernels.cell_backward import _lstm_cell_backward_kernel as backward

    for kernel, call in ((forward, _forward), (backward, _backward)):
        with _fresh_cell_launchers() as driver:

            def compiled(*shapes, call=call, kernel=kernel):
                for shape in shapes:
                    call(*shape)
                return count_compiled(kernel)

            assert compiled((7, 20, 36)) == 1
            assert compiled((1, 20, 36), (2, 20, 36), (15, 20, 36), (16, 20, 36)) == 1, "the batch size recompiles"
            assert compiled((7, 33, 36), (7, 20, 50), (7, 2, 2), (5, 999, 77)) == 1, "an odd size recompiles"
            assert compiled((17, 20, 36)) == 2, "the tile for larger batches"
            assert compiled((64, 20, 36), (1000, 20, 36), (1001, 50, 20)) == 2, "the batch size recompiles"
            assert compiled((7, 32, 64)) == 3, "multiples of 16"
            assert compiled((16, 64, 32), (1, 32, 160), (3, 1600, 64)) == 3, "multiples of 16 recompile"
            assert len(driver.launches) == 17 and {name for name, _ in driver.launches} == {kernel.fn.__name__}


def check_only_inference_skips_the_gates():
    from lstm_triton.kernels.cell import _lstm_cell_forward_kernel as forward

    with _fresh_cell_launchers():
        _forward(7, 20, 36)
        _forward(7, 20, 36, save_gates=False)
        assert count_compiled(forward) == 2
        _forward(8, 20, 36, save_gates=False)
        assert count_compiled(forward) == 2


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
    from lstm_triton.kernels.config import LaunchConfig
    from lstm_triton.kernels.launch import Launcher

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


def check_hooks_of_triton_see_every_launch():
    """They see launches of kept kernels too, and those of kept kernels happen without them."""
    from triton import knobs

    from lstm_triton.kernels.config import LaunchConfig
    from lstm_triton.kernels.launch import Launcher

    launcher, x, seen = Launcher(_tiny_kernel), torch.zeros(16), []

    def launch():
        launcher((1, 1, 1), LaunchConfig(4, 1), dict(x_ptr=x, y_ptr=None, n=16, stride=1, BLOCK=16))

    def enter(metadata):
        seen.append(metadata.get()["name"])

    with fake_driver(compiling=False) as driver:
        launch()
        launch()
        assert len(driver.launches) == 2 and driver.launches[0] == driver.launches[1] and not seen
        knobs.runtime.launch_enter_hook.add(enter)
        try:
            launch()
        finally:
            knobs.runtime.launch_enter_hook.remove(enter)
        launch()
        assert len(driver.launches) == 4 and seen == ["_tiny_kernel"]


def check_every_argument_has_a_name():
    from lstm_triton.kernels.config import LaunchConfig
    from lstm_triton.kernels.launch import Launcher

    arguments = dict(x_ptr=torch.empty(64), y_ptr=None, n=7, stride=2, BLOCK=32)
    with fake_driver(compiling=False):
        launcher = Launcher(_tiny_kernel)
        launcher((1, 1, 1), LaunchConfig(1, 1), arguments)
        for wrong, error in (
            ({**arguments, "m": 1}, TypeError),
            ({name: value for name, value in arguments.items() if name != "n"}, TypeError),
            ({"m" if name == "n" else name: value for name, value in arguments.items()}, KeyError),
        ):
            with pytest.raises(error):
                launcher((1, 1, 1), LaunchConfig(1, 1), wrong)


def check_kept_kernels_are_bounded():
    from lstm_triton.kernels import launch
    from lstm_triton.kernels.config import LaunchConfig

    x = torch.empty(64)
    launch._MAX_KEPT = 8
    with fake_driver(compiling=False):
        launcher = launch.Launcher(_tiny_kernel)
        for n in range(100):
            launcher((1, 1, 1), LaunchConfig(1, 1), dict(x_ptr=x, y_ptr=None, n=n, stride=2, BLOCK=32))
        assert len(launcher._compiled) == 1, "one for each value of an integer that is not specialised"
        for stride in range(2, 100):
            launcher((1, 1, 1), LaunchConfig(1, 1), dict(x_ptr=x, y_ptr=None, n=7, stride=stride, BLOCK=32))
            assert len(launcher._compiled) <= 8
        assert count_compiled(_tiny_kernel) == 2


if __name__ == "__main__":
    run_checks(globals())
