"""What recompiles, and that no wrong kernel is reused: the real JIT on a driver that launches nothing.

In a process without the interpreter: this file is also the script that it runs.
"""

import contextlib
import functools
import itertools
import sys
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from support.fake_driver import count_compiled, fake_driver
from support.process import run_checks, run_without_interpreter
from test_launch import run_lstm
from triton import knobs
from triton.runtime.jit import JITCallable

from lstm_triton import LSTMCell, SoftmaxReadout
from lstm_triton.kernels import launch, search
from lstm_triton.kernels.config import LaunchConfig
from lstm_triton.kernels.launch import Launcher
from lstm_triton.kernels.specialization import KERNELS, compile_for


@pytest.mark.long
def test_real_jit():
    assert "checks passed" in run_without_interpreter(__file__)


def _cell(B, I, H):
    """A step forward and backward."""
    module = LSTMCell(I, H, dtype=torch.bfloat16, backend="triton")
    x, *hx = (torch.zeros(B, n, dtype=torch.bfloat16, requires_grad=True) for n in (I, H, H))
    torch.autograd.grad(module(x, hx), [x, *hx, *module.parameters()], [torch.zeros_like(hx[0])] * 2)


def _readout(B, H, V):
    module, h = SoftmaxReadout(H, V, dtype=torch.bfloat16, backend="triton"), torch.zeros(B, H, dtype=torch.bfloat16)
    y = module(h.requires_grad_())
    torch.autograd.grad(y, [h, *module.parameters()], torch.zeros_like(y))


def _compiled(prefix):
    """How many variants have been compiled of each kernel whose name begins so."""
    kernels = {launcher.kernel.fn.__name__: launcher.kernel for launcher in Launcher._all}
    return {name: n for name, kernel in kernels.items() if name.startswith(prefix) and (n := count_compiled(kernel))}


def check_sizes_recompile_only_by_divisibility():
    """Calls with sizes of one group compile kernels once, and those of another again, this many in all of each kernel."""
    for call, prefix, groups in (
        (
            _cell,
            "_lstm_cell_",
            [
                ([(7, 20, 36), (1, 20, 36), (16, 20, 36), (7, 33, 36), (7, 2, 2), (5, 999, 77)], [1, 1]),
                ([(17, 20, 36), (64, 20, 36), (1001, 50, 20)], [2, 2]),  # the tile for larger batches
                ([(7, 32, 64), (16, 64, 32), (1, 32, 160), (3, 1600, 64)], [3, 3]),  # multiples of 16
            ],
        ),
        (
            _readout,
            "_readout_",
            [
                ([(8, 64, 1024), (1, 64, 1024), (16, 64, 1024), (8, 1600, 1024), (8, 64, 4096)], [1] * 5),
                # Sums of parts of dh alone, as here, are of one size, which is not specialised.
                ([(8, 33, 1025), (8, 77, 1025), (8, 2, 1025), (8, 33, 999), (3, 33, 4001)], [1, 2, 2, 2, 2]),
            ],
        ),
    ):
        with fake_driver(compiling=False):
            for shapes, expected in groups:
                for shape in shapes:
                    call(*shape)
                    assert sorted((found := _compiled(prefix)).values()) == expected, shape
                    assert len(set(expected)) == 1 or min(found, key=found.get) == "_readout_sum_parts_kernel"


# Together: every feature in training and inference, one and two directions, sizes odd and even, each with programs that wait
# for one another (H above 128) and with one that is alone.
EVERY = "resets stored lengths cells"
BY_STEP, FLOAT64 = dict(backend="triton-stepwise"), dict(dtype=torch.float64)
CASES = [  # H, D, features, options
    (144, 1, "", {}),
    (19, 2, "", {}),
    (151, 1, "inference", {}),
    (1, 2, "resets stored lengths", {}),
    (32, 1, "resets", {}),
    (20, 2, "resets inference", {}),
    (19, 1, "resets stored", {}),
    (131, 2, "resets shared", {}),
    (19, 2, "lengths cells", {}),
    (32, 2, EVERY, {}),
    (19, 1, "resets shared lengths inference", {}),
    (144, 2, "dropout", {}),
    (19, 1, "resets shared lengths dropout", {}),
    (20, 1, "dropout inference", {}),
    (20, 1, "recompute", {}),
    (20, 1, "resets stored", dict(dtype=torch.float32)),
    (20, 1, "resets lengths", BY_STEP),
    (19, 1, "resets lengths", FLOAT64),
]


def check_sizes_and_layouts_do_not_recompile():
    """The search asks the compiler about one kernel for each kind of layer: that which is launched. With a launch for each step
    the first and the last take and leave other states than those between: c is kept in float32."""
    for H, D, features, options in CASES:
        run = functools.partial(run_lstm, H=H, D=D, features=features, num_layers=2, **options)
        with fake_driver(compiling=False):
            run(7, 2)
            asked = [KERNELS[problem.way].fn.__name__ for problem, *_ in search.remembered]
            expected = {name: asked.count(name) + 2 * (options is BY_STEP) for name in asked}
            assert _compiled("_lstm_sequence_") == expected, (H, features)
            run(1, 2)  # nothing waits in a launch of one step, which is another kernel
            first = _compiled("_lstm_sequence_")
            for T, B in ((2, 2), (7, 1), (3, 15), (1, 16)):  # more rows may take another tile
                for batch_first in (False, "recompute" not in features):
                    run(T, B, batch_first=batch_first)
                    assert _compiled("_lstm_sequence_") == first, (H, features, T, B, batch_first)
            kept = {launcher.kernel.fn.__name__: len(launcher._compiled) for launcher in Launcher._all}
            if options in (BY_STEP, FLOAT64):  # sizes and steps are not looked up
                assert {name: kept[name] for name in first} == first


def check_what_is_compiled_ahead_is_what_is_launched():
    """The problems of a call are those that the ahead-of-time tests compile, whether or not `layers.plans` asks for both ways
    beforehand. What the device cannot hold is no kernel."""
    from support.aot_sequence import SEGMENTS, Case

    for (given, features), backend in itertools.product((("", ()), (EVERY, SEGMENTS)), ("triton", "triton-persistent")):
        cases = [Case(way, 19, 16, 2, torch.bfloat16, "ieee", (*features, "training")) for way in KERNELS]
        with fake_driver(compiling=False):
            run_lstm(2, 16, 19, 2, given, backend=backend)
            assert {problem for problem, *_ in search.remembered} == {case.problem for case in cases}
    for shared_memory in (227 << 10, 0):
        with fake_driver(90) as driver:
            config = search.candidates(cases[0].problem, driver.figures)[0]
            driver.figures = driver.figures._replace(shared_memory=shared_memory)
            assert bool(compile_for(cases[0].problem, config)) == bool(shared_memory)


def check_the_key_of_a_kernel_does_not_depend_on_what_was_compiled_before():
    """Else processes would not find each other's kernels. In Triton up to 3.8 a global constant that a called function reads is
    part of the kernel's key only if that function has a key already, from another kernel."""
    functions = [f for name, m in sys.modules.items() if ".kernels." in name for f in vars(m).values()]
    functions = [f for f in functions if isinstance(f, JITCallable)]
    kernels, found = [f for f in functions if f.__name__.endswith("_kernel")], []
    for order in (kernels, kernels[::-1]):
        for function in functions:
            function.hash, function.used_global_vals = None, {}
        found.append({kernel.__name__: kernel.cache_key for kernel in order})
    assert len(found[0]) > 5 and found[0] == found[1]


def check_small_batches_fill_the_gpu():
    """One row of a large vocabulary, and the cell at B = 16."""
    with fake_driver(sm_count=132, compiling=False) as driver:
        _readout(1, 64, 128 * 1024)
        grids = {launch.kernel: launch.grid[0] for launch in driver.launches}
        assert grids["_readout_forward_kernel"] == 1024 and grids["_readout_row_dots_kernel"] == 128, grids
        assert grids["_readout_rescale_kernel"] >= 132 and grids["_readout_backward_kernel"] >= 3 * 132, grids
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            LSTMCell(8, 1024, dtype=dtype, backend="triton").requires_grad_(False)(torch.empty(16, 8, dtype=dtype))
            assert driver.launches[-1].grid[0] >= 132, dtype


@triton.jit(do_not_specialize=["n"])
def _tiny_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < n)
    if y_ptr is not None:
        x += tl.load(y_ptr + i, mask=i < n)
    tl.store(x_ptr + i * stride, x, mask=i < n)


def check_a_kept_kernel_is_the_one_triton_would_choose():
    storage = {dtype: torch.empty(256, dtype=dtype) for dtype in (torch.float32, torch.float16)}
    pointers = (torch.float32, 0), (torch.float32, 1), (torch.float16, 8)
    configs = LaunchConfig(1, 1), LaunchConfig(2, 1), LaunchConfig(1, 2)
    axes = pointers, (None, *pointers[1:]), (1, 16, 17, 2**31), (1, 16, 3), (32, 64), configs
    calls = list(itertools.product(*axes))
    kept = mock.patch.object(launch, "_launch_again", wraps=launch._launch_again)
    with fake_driver(compiling=False) as driver, kept as launch_again:
        launcher = Launcher(_tiny_kernel)
        for repeat in range(2):
            for x, y, n, stride, block, config in calls:
                x_ptr, y_ptr = (None if p is None else storage[p[0]][p[1] :] for p in (x, y))
                before = launch_again.call_count
                launcher((1, 1, 1), config, dict(BLOCK=block, stride=stride, n=n, y_ptr=y_ptr, x_ptr=x_ptr))
                is_kept = launch_again.call_count > before
                expected = _tiny_kernel.warmup(x_ptr, y_ptr, n, stride, block, grid=(1,), **config.options)
                assert not is_kept or launch_again.call_args.args[0] is expected, (x, y, n, stride, block, config)
                assert is_kept >= (repeat == 1), "an equal call looks nothing up twice"
        assert launch_again.call_count > 1.25 * len(calls), "too few calls took the short way to show anything"
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
