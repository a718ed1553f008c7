"""Checks of launches in which programs wait for each other: CUDA graphs, streams, memory that holds anything, many steps.

They take sizes and backend as arguments: without a GPU they run at small sizes, step by step, which shows that they can pass.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from lstm_triton import LSTM, functional
from lstm_triton.kernels import layer, layer_backward
from lstm_triton.kernels.device import multiprocessor_count
from lstm_triton.kernels.sequence_config import Problem

from . import layers, tolerance

BF16 = torch.bfloat16


class Unserved(Exception):
    """This GPU has no room for what a check is about."""


def _waits(T, B, H, dtype, device):
    """Whether forward and backward of one direction would be one launch each, of programs that wait for each other."""
    plans = layer.training_plans(Problem("forward", B, H, 1, dtype, "tf32"), T, device)
    return all(config.waits for config in plans.values())


def _require_waiting(T, B, H, dtype, device):
    if device.type == "cuda" and not _waits(T, B, H, dtype, device):
        raise Unserved(f"H = {H}, B = {B} in {dtype} does not run in one launch here")


class _Training:
    """Outputs and all gradients of a layer, of tensors that stay where they are: call it to compute them."""

    def __init__(self, device, backend, T, B, H, dtype=BF16, seed=0):
        self.sizes, self.options = (T, B, H, H, 1, dtype), {"precision": "tf32", "device": device}
        self.backend = backend
        self.problem = layers.draw(*self.sizes, seed=seed, **self.options)
        self.leaves = [t.detach().requires_grad_() for t in self.problem.inputs]

    def __call__(self):
        x, h0, c0, *weights = self.leaves
        y, (h_n, c_n) = functional.lstm(x, (h0, c0), weights, precision="tf32", backend=self.backend)
        return [y, h_n, c_n, *torch.autograd.grad([y, h_n, c_n], self.leaves, self.problem.cotangents)]

    def change(self, seed):
        other = layers.draw(*self.sizes, seed=seed, **self.options)
        for t, value in zip((*self.leaves, *self.problem.cotangents), (*other.inputs, *other.cotangents)):
            t.detach().copy_(value)


def _kept(results):
    return [t.detach().clone() for t in results]


def _assert_equal(found, expected, names):
    for name, result, wanted in zip(names, found, expected, strict=True):
        assert result.isfinite().all(), f"{name} is not finite"
        assert torch.equal(result, wanted), f"{name} differs by up to {(result - wanted).abs().max().item():.3g}"


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the checks ------------------------------------------------------------------------------------------------------


def captured_training_step(device, backend, T, B, H, replays):
    """A CUDA graph of forward and backward, replayed with other inputs, is the eager step bit for bit."""
    _require_waiting(T, B, H, BF16, device)
    step = _Training(device, backend, T, B, H)
    replay = step
    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()

        def replay():
            graph.replay()
            return captured

    previous = None
    for seed in range(1, replays + 1):
        step.change(seed)
        found = _kept(replay())
        again = _kept(replay())
        _assert_equal(found, _kept(step()), step.problem.names)
        _assert_equal(again, found, step.problem.names)
        assert previous is None or not torch.equal(found[0], previous)
        previous = found[0]


def two_streams(device, backend, T, sizes, rounds, priorities=(0, 0)):
    """Two layers at once give what each of them gives alone, also where the second may overtake the first (priority -1)."""
    B, H = sizes(device)
    _require_waiting(T, B, H, BF16, device)
    steps = [_Training(device, backend, T, B, H, seed=seed) for seed in (0, 1)]
    alone = [_kept(step()) for step in steps]
    synchronize(device)
    is_cuda = device.type == "cuda"
    streams = [torch.cuda.Stream(priority=p) if is_cuda else contextlib.nullcontext() for p in priorities]
    for _ in range(rounds):
        found = []
        for stream in streams:
            if is_cuda:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(20_000_000)  # until both layers are under way
        for stream, step in zip(streams, steps):
            with torch.cuda.stream(stream) if is_cuda else stream:
                found.append(step())
        synchronize(device)
        for step, results, expected in zip(steps, found, alone):
            _assert_equal(results, expected, step.problem.names)


def beside_a_kernel_that_stays(device, backend, T, seconds):
    """A layer that needs SMs which another kernel holds, as communication may, waits for it to end."""
    B, H = both_do_not_fit(device)
    _require_waiting(T, B, H, BF16, device)
    step = _Training(device, backend, T, B, H)
    alone = _kept(step())
    synchronize(device)
    if device.type == "cuda":
        blocks = multiprocessor_count(device) // 2
        started = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            _stay_kernel[(blocks,)](started, int(seconds * 1e9), num_warps=32)
        while not started.item():  # before the layer takes the places
            time.sleep(0.001)
    _assert_equal(step(), alone, step.problem.names)


@triton.jit
def _stay_kernel(started_ptr, nanoseconds):
    """Each program, of 1024 threads, leaves too few registers of its SM for another of 256 times 255."""
    tl.store(started_ptr, 1)
    began = globaltimer()
    now = began
    while now - began < nanoseconds:
        now = globaltimer()


def both_fit(device):
    """Half of the SMs hold either layer."""
    if device.type == "cpu":
        return 2, 5
    return 16, 256


def both_do_not_fit(device):
    """The layer with the most rows and units that one launch takes, if two of them are more programs than SMs."""
    if device.type == "cpu":
        return 2, 5
    multiprocessors = multiprocessor_count(device)
    for H in (1024, 768, 512):
        for B in (128, 96, 64, 48, 32, 16):
            plans = layer.training_plans(Problem("forward", B, H, 1, BF16, "ieee"), 64, device)
            if all(c.persistent and 2 * c.programs * c.groups > multiprocessors for c in plans.values()):
                return B, H
    raise Unserved("no layer takes more than half of this GPU")


def poisoned_runs(device, backend, T, B, H, dtype, runs):
    """Runs whose memory held NaN before agree bit for bit, and are as accurate as one launch per step."""
    _require_waiting(T, B, H, dtype, device)
    problem = layers.draw(T, B, H, H, 1, dtype, precision="tf32", device=device)
    first = None
    for _ in range(runs):
        _poison_free_memory(device)
        found = layers.by_kernels(problem, backend)
        first = found if first is None else first
        _assert_equal(found, first, problem.names)
    stepwise: list[list[tolerance.Errors]] = [[] for _ in first]
    for moved in tolerance.neighbours((*problem.inputs, *problem.cotangents)):
        neighbour = problem.with_tensors(moved)
        for errors, result, true in zip(stepwise, layers.by_kernels(neighbour, "triton-stepwise"), _truth(neighbour)):
            errors.append(tolerance.errors(result, true))
    for name, result, true, errors in zip(problem.names, first, _truth(problem), stepwise, strict=True):
        tolerance.assert_as_accurate(result, true, tolerance.worst(errors), name)


def _truth(problem):
    wide = problem.with_tensors([t.double() for t in (*problem.inputs, *problem.cotangents)])
    return layers.by_torch(replace(wide, precision="ieee"))


def _poison_free_memory(device):
    """What torch's allocator hands out next is all ones, which is NaN in every format, and -1: in large blocks and in small."""
    sizes = [2**30 if device.type == "cuda" else 2**20, *[2**20] * 16]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]
    del blocks


def many_steps(device, backend, T, B, H, chunk):
    """More steps than cuDNN takes, forward, as accurate as one launch per step."""
    _require_waiting(T, B, H, BF16, device)
    problem = layers.draw(T, B, 8, H, 1, BF16, device=device)

    def run(backend):
        y, state = functional.lstm(problem.x, problem.hx, problem.weights, backend=backend)
        return y, *state

    with torch.no_grad():
        found, stepwise = run(backend), run("triton-stepwise")
        weights, state, pieces = [w.double() for w in problem.weights], [s.double() for s in problem.hx], []
        for x in problem.x.double().split(chunk):
            y, *state = torch._VF.lstm(x, tuple(state), weights, True, 1, 0.0, False, False, False)
            pieces.append(y)
    for name, result, other, true in zip(problem.names, found, stepwise, (torch.cat(pieces), *state)):
        tolerance.assert_as_accurate(result, true, tolerance.errors(other, true), name)


def _failing(allocate, allowed):
    """allocate, which fails after so many times."""
    left = iter(range(allowed))

    def limited(*args):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no memory")
        return allocate(*args)

    return limited


@contextlib.contextmanager
def _little_memory(device, attempt):
    """Less memory than a step needs, at first; each attempt gets further."""
    if device.type == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            limited = _failing(layer.new_states, attempt)
            for module in (layer, layer_backward):
                patch.setattr(module, "new_states", limited)
            yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min((torch.cuda.memory_reserved() + attempt * 2**25) / total, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def after_out_of_memory(device, backend, T, B, H, least):
    """A step that runs out of memory, at one place or another, leaves nothing behind that the next one would trip over."""
    _require_waiting(T, B, H, BF16, device)
    step = _Training(device, backend, T, B, H)
    expected = _kept(step())
    failures = 0
    for attempt in range(100):
        try:
            with _little_memory(device, attempt):
                step()
        except torch.OutOfMemoryError:
            failures += 1
        else:
            break
        _assert_equal(step(), expected, step.problem.names)
    assert least <= failures < 100, failures


def the_host_does_not_wait(device, backend, T, B, H):
    """Resets and lengths may lie on the CPU, in pinned memory too, and change as soon as the call returns; packed as well."""
    _require_waiting(T, B, H, BF16, device)
    lstm = LSTM(8, H, device=device, dtype=BF16, backend=backend).requires_grad_(False)
    x = torch.randn(T, B, 8, dtype=BF16, device=device)
    lengths, resets = torch.arange(B) % T + 1, torch.rand(T, B) < 0.2
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected = lstm(x, lengths=lengths, resets=resets)[0]
    expected_packed = lstm(packed, return_cell_states=True)[0].data
    synchronize(device)
    # The first of these makes the allocators ask CUDA for as much memory as they need while nothing ends, which may wait.
    for attempt, pinned in enumerate((False, False, True) if device.type == "cuda" else (False,)):
        given = [t.pin_memory() if pinned else t.clone() for t in (lengths, resets)]
        started = time.monotonic()
        asleep = torch.cuda.Event() if device.type == "cuda" else None
        if asleep:
            torch.cuda._sleep(4_000_000_000)  # two seconds
            asleep.record()
        found = lstm(x, lengths=given[0], resets=given[1])[0]
        found_packed = lstm(packed, return_cell_states=True)[0].data
        for t in given:
            t.zero_()
        assert not attempt or not asleep.query(), f"the host waited: {time.monotonic() - started:.2f} s"
        _assert_equal([found, found_packed], [expected, expected_packed], ["y", "packed y"])
