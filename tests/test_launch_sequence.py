"""What the sequence kernels compile, and what they do not compile again: the real JIT on a driver that launches nothing."""

import contextlib
import sys

import pytest
import torch
from support import layers
from support.fake_driver import count_compiled, fake_driver
from support.process import run_checks, run_without_interpreter
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITCallable

from lstm_triton.kernels import device, interpreter, launch, layer, layer_backward
from lstm_triton.kernels.inputs import Direction, LayerGradients, LayerInputs, LayerOptions, LayerSaved, Segments
from lstm_triton.kernels.specialization import compile_for


@pytest.mark.long
def test_real_jit():
    assert "checks passed" in run_without_interpreter(__file__)


# ---- in the suite's own process ------------------------------------------------------------------------------------


class _Recorded:
    """Stands for a launcher: notes what it is asked for, and launches nothing."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = []

    def __call__(self, grid, config, arguments, **options):
        self.launches.append((grid, config, arguments | options))


@pytest.fixture
def recorded(monkeypatch, poisoned_outputs):
    """Launchers that record, planned for as on a GPU: programs may wait for one another."""

    launchers = _Recorded(layer._forward.kernel), _Recorded(layer_backward._backward.kernel)
    monkeypatch.setattr(layer, "_forward", launchers[0])
    monkeypatch.setattr(layer_backward, "_backward", launchers[1])
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    return launchers


@pytest.mark.parametrize("T", [1, 2])
def test_one_step_waits_for_nothing(T, recorded):
    """No counters to zero, and no cooperative launch, which a CUDA graph's conditional node could not hold.

    With resets, without which the kernels of the cell serve one step.
    """
    _run(T, 16, 256, resets=True)
    for launcher in recorded:
        ((grid, config, arguments),) = launcher.launches
        assert config.persistent == (T > 1) and grid[0] > 1
        waits = T > 1
        assert (arguments["stall_ptr"] is not None) == waits
        assert (arguments["counters_ptr"] is not None) == (waits and not config.in_band)
        assert arguments["launch_cooperative_grid"] == waits
        launcher.launches.clear()
    if T > 1:  # the last range of recomputed gates
        _run(33, 2, 256, recompute=True)
        steps = [(a["first_step"], a["last_step"], a["stall_ptr"] is not None) for *_, a in recorded[1].launches]
        assert steps == [(0, 32, True), (32, 33, False)]


@pytest.mark.parametrize("D", [1, 2])
def test_launches_beside_the_recurrence(D, monkeypatch, poisoned_outputs):
    """Forward one launch for W_ih and all biases and one GEMM, and what says of h that it is not there yet."""

    noted = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view and not func.overloadpacket.__name__.startswith("empty"):
                noted.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    monkeypatch.setattr(launch.Launcher, "__call__", lambda self, *_, **__: noted.append(self.kernel.fn.__name__))
    monkeypatch.setattr("lstm_triton.kernels.layer.torch", torch)  # outputs are not poisoned, which would be noted
    monkeypatch.setattr("lstm_triton.kernels.layout.torch", torch)
    monkeypatch.setattr("lstm_triton.kernels.input_weights.torch", torch)
    inputs, options = _problem(4, 2, 256, D)
    layer.lstm_layer_forward(inputs, options)
    noted.clear()
    with Noting():
        layer.lstm_layer_forward(inputs, options)
    assert noted == ["_lstm_input_weights_kernel", "addmm", "fill_", "_lstm_sequence_forward_kernel"]


def test_a_launch_that_is_refused_says_what_to_do(recorded, monkeypatch):
    """By a driver that has fewer multiprocessors for this process than the GPU has."""

    def refusing(message):
        def refuse(*args, **options):
            raise RuntimeError(message)

        return refuse

    for message, told in (
        ("[CUDA]: too many blocks in cooperative launch", r"\d+ programs .* LSTM_TRITON_FREE_MULTIPROCESSORS"),
        ("[CUDA]: operation not supported", r"\d+ programs .* launch none so: .* backend='triton-stepwise'"),
        ("[CUDA]: out of memory", "out of memory"),
    ):
        monkeypatch.setattr(type(recorded[0]), "__call__", refusing(message))
        with pytest.raises(RuntimeError, match=told):
            _run(2, 16, 256)


def test_multiprocessors_are_left_free(recorded, monkeypatch):
    """Of an H100's 132: 32 programs in 4 groups fit, but not beside others."""

    grids = []
    for free in (0, 4, 5, 131, 1000):
        monkeypatch.setattr(device, "FREE_MULTIPROCESSORS", free)
        recorded[0].launches.clear()
        _run(2, 128, 512, training=False)
        grids.append([(grid[0], config.persistent) for grid, config, _ in recorded[0].launches])
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


# ---- in a process without the interpreter --------------------------------------------------------------------------


def _problem(
    T,
    B,
    H,
    D=1,
    dtype=torch.bfloat16,
    *,
    resets=False,
    reset_state=None,
    lengths=False,
    batch_major=False,
    layer_of_two=0,
    recompute=False,
    dropped=False,
):
    """The inputs and options of one layer. layer_of_two: whose states are the one or the other half of all."""
    rows = slice(layer_of_two * D, (layer_of_two + 1) * D)

    def every_step(*rest, dtype=dtype):
        return (
            torch.zeros(B, T, *rest, dtype=dtype).transpose(0, 1)
            if batch_major
            else torch.zeros(T, B, *rest, dtype=dtype)
        )

    reset_h = reset_c = None
    if reset_state == "stored":
        reset_h, reset_c = (torch.zeros(T, 2 * D, B, H, dtype=dtype)[:, rows] for _ in "hc")
    elif reset_state == "shared":
        reset_h, reset_c = (torch.zeros(2 * D, 1, H, dtype=dtype)[rows].expand(T, D, B, H) for _ in "hc")
    flags, ends = (
        every_step(dtype=torch.bool) if resets else None,
        torch.zeros(B, dtype=torch.int64) if lengths else None,
    )
    sizes = (4 * H, 4), (4 * H, H), (4 * H,), (4 * H,)
    directions = [Direction(*(torch.zeros(size, dtype=dtype) for size in sizes)) for _ in range(D)]
    states = [torch.zeros(2 * D, B, H, dtype=dtype)[rows] for _ in "hc"]
    seed = torch.zeros(2, dtype=torch.int64)[layer_of_two:][:1] if dropped else None
    segments = Segments(flags, reset_h, reset_c, ends)
    options = LayerOptions("tf32", 0.01 * B if dropped else 0.0, recompute=recompute)
    return LayerInputs.of(every_step(4), states, directions, segments, seed), options


def _run(*sizes, training=True, cells=False, **case):
    """One layer forward and, in training, backward."""
    inputs, options = _problem(*sizes, **case)
    forward = layer.lstm_layer_forward(inputs, options, save=training)
    if training:
        every_c = torch.zeros_like(forward.y) if cells else None
        grads = LayerGradients(torch.zeros_like(forward.y), inputs.h0, inputs.c0, every_c)
        saved = LayerSaved(forward.y if forward.h is None else forward.h, forward.c, forward.gates)
        needs = {"x", "h0", "w_ih"} | ({"reset_c"} if inputs.reset_c is not None else set())
        layer_backward.lstm_layer_backward(grads, inputs, saved, needs, options)


@contextlib.contextmanager
def _kernels_compiled(really=False):
    """A function that counts the kernels compiled, or to be compiled, since the start of this context: forward, backward."""

    launchers = layer._forward, layer_backward._backward
    for launcher in launchers:
        launcher._compiled.clear()
    with fake_driver(compiling=really):
        yield lambda: tuple(count_compiled(launcher.kernel) for launcher in launchers)


# Together: every feature in training and inference, one and two directions, sizes odd and even, each with programs that wait
# for one another (H above 128) and with one that is alone.
CASES = {
    "plain, waiting": dict(H=144),
    "plain, odd": dict(H=19, D=2),
    "plain, inference": dict(H=151, training=False),
    "one unit": dict(H=1, D=2, resets=True, reset_state="stored", lengths=True),
    "resets": dict(H=32, resets=True),
    "resets, inference": dict(H=20, D=2, resets=True, training=False),
    "stored reset states": dict(H=19, resets=True, reset_state="stored"),
    "shared reset states, waiting": dict(H=131, D=2, resets=True, reset_state="shared"),
    "lengths": dict(H=19, D=2, lengths=True, cells=True),
    "everything": dict(H=32, D=2, resets=True, reset_state="stored", lengths=True, cells=True),
    "everything, inference": dict(H=19, resets=True, reset_state="shared", lengths=True, training=False),
    "dropout, waiting": dict(H=144, D=2, dropped=True),
    "dropout, everything": dict(H=19, resets=True, reset_state="shared", lengths=True, dropped=True),
    "dropout, inference": dict(H=20, dropped=True, training=False),
    "recompute": dict(H=20, recompute=True),
    "float32": dict(H=20, dtype=torch.float32, resets=True, reset_state="stored"),
}


def check_sizes_and_layouts_do_not_recompile():
    for name, case in CASES.items():
        with _kernels_compiled() as compiled:
            _run(2, 2, **case)
            assert compiled() == (1, case.get("training", True)), "those launched are those that the search asked about"
            _run(1, 2, **case)  # nothing waits in a launch of one step, which is another kernel
            first = compiled()
            for T, B in ((7, 1), (1, 2), (7, 15), (1, 16)):  # more rows may take another tile
                for batch_major, k in ((False, 1), (not case.get("recompute"), 0)):
                    _run(T, B, **case, batch_major=batch_major, layer_of_two=k)
                    assert compiled() == first, (name, T, B, batch_major, k)


def check_what_is_compiled_ahead_is_what_is_launched():
    """The same code: the types, hints and options assumed are those of a launch. What the device cannot hold is none."""
    from support.aot_sequence import Case, choose

    every = ("resets", "lengths", "cells", "reset_gradients", "random", "dropout")
    together = dict(resets=True, lengths=True, cells=True, reset_state="stored", dropped=True)
    for H, D, features, arguments in ((768, 1, (), {}), (19, 2, every, together)):
        for way, launcher in (("forward", layer._forward), ("backward", layer_backward._backward)):
            case = Case(way, H, 16, D, torch.bfloat16, "ieee", (*features, "training"))
            config, ahead, _ = choose(case, 90)
            with _kernels_compiled(really=True):
                _run(2, 16, H, D, **arguments)
                assert ahead.ptx in {kernel.asm["ptx"] for kernel in launcher._compiled.values()}, (way, H, features)
            with fake_driver(90) as driver:
                driver.figures = driver.figures._replace(shared_memory=0)
                assert compile_for(case.problem, config) is None


def check_a_call_that_is_planned_before_compiles_nothing_more():
    """With backend="triton-persistent" `layers.plans` asks the search for both ways before the forward runs."""
    for options in ({}, dict(resets=True, reset_state="stored", cells=True)):
        problem = layers.draw(3, 3, 5, 19, **options)
        with _kernels_compiled() as compiled:
            layers.by_kernels(problem, "triton-persistent")
            assert compiled() == (1, 1), options


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


def check_one_launch_per_step_compiles_nothing_more():
    """Between launches c is kept in float32: the first, the last and other steps, and a single one, have their own kernels."""

    for dtype, each in ((torch.bfloat16, 4), (torch.float64, 1)):
        case = dict(H=2048 if dtype == torch.bfloat16 else 19, dtype=dtype, resets=True, lengths=True)
        with _kernels_compiled() as compiled:
            _run(7, 2, **case)
            assert compiled() == (max(each - 1, 1),) * 2, "those launched are those that the search asked about"
            _run(1, 2, **case)
            assert compiled() == (each, each)
            for T in (1, 2, 3, 8):
                for B in (1, 2, 15, 16):
                    _run(T, B, **case)
            assert compiled() == (each, each)
            for launcher in (layer._forward, layer_backward._backward):
                assert len(launcher._compiled) == each, "sizes and steps are not looked up"


if __name__ == "__main__":
    run_checks(globals())
