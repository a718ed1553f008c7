"""Checks of launches whose programs wait for each other: graphs, streams, memory that holds anything, many steps, the trap.

On a GPU they need a process of their own. Without one they pass at small sizes, with a launch for each step.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from lstm_triton import LSTM, functional
from lstm_triton.bench.measure import graphed
from lstm_triton.kernels import layer, layer_backward, search, sequence
from lstm_triton.kernels.device import multiprocessor_count
from lstm_triton.kernels.sequence_config import Problem

from . import layers, tolerance
from .lstms import flat
from .problems import judge

BF16 = torch.bfloat16


def _end_unserved(why):
    """End the process of a check for which this GPU has no room."""
    print("unserved:", why)
    sys.exit()


class Step:
    """Outputs and all gradients of a layer, of tensors that stay where they are: call it to compute them."""

    def __init__(self, device, backend, T, B, H, dtype=BF16, seed=0):
        self.arguments = device, backend, T, B, H, dtype
        self.device, self.on_gpu, self.backend = device, device.type == "cuda", backend
        if self.on_gpu:
            plans = layer.training_plans(Problem("forward", B, H, 1, dtype, "tf32"), T, device)
            if not all(config.waits for config in plans.values()):
                _end_unserved(f"H = {H}, B = {B} in {dtype} does not run in one launch here")
        self.problem = self._draw(seed)

    def _draw(self, seed):
        device, _, T, B, H, dtype = self.arguments
        return layers.draw(T, B, H, H, 1, dtype, precision="tf32", device=device, seed=seed)

    def __call__(self):
        return layers.by_kernels(self.problem, self.backend)

    def change(self, seed):
        for t, value in zip(self.problem.tensors, self._draw(seed).tensors):
            t.copy_(value)

    def assert_equal(self, found, expected):
        for name, result, wanted in zip(self.problem.names, found, expected, strict=True):
            assert result.isfinite().all(), f"{name} is not finite"
            assert torch.equal(result, wanted), f"{name} differs by up to {(result - wanted).abs().max().item():.3g}"


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the checks ------------------------------------------------------------------------------------------------------


def captured_training_step(step, replays):
    """A CUDA graph of forward and backward, replayed with other inputs, is the eager step bit for bit."""
    if step.on_gpu:
        graph, captured = graphed(step)

    def replay():
        if not step.on_gpu:
            return step()
        graph()
        return [t.clone() for t in captured]

    previous = None
    for seed in range(1, replays + 1):
        step.change(seed)
        found = replay()
        step.assert_equal(replay(), found)
        step.assert_equal(step(), found)
        assert previous is None or not torch.equal(found[0], previous)
        previous = found[0]


def two_streams(step, rounds, priorities):
    """Two layers at once give what each of them gives alone, also where the second may overtake the first (priority -1)."""
    steps = [step, Step(*step.arguments, seed=1)]
    alone = [step() for step in steps]
    synchronize(step.device)
    streams = [torch.cuda.Stream(priority=p) if step.on_gpu else None for p in priorities]
    for _ in range(rounds):
        for stream in streams if step.on_gpu else ():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # until both layers are under way
        found = []
        for stream, each in zip(streams, steps):
            with torch.cuda.stream(stream):  # None changes nothing
                found.append(each())
        synchronize(step.device)
        for results, expected in zip(found, alone):
            step.assert_equal(results, expected)


def beside_a_kernel_that_stays(step, seconds):
    """A layer that needs SMs which another kernel holds, as communication may, waits for it to end."""
    alone = step()
    synchronize(step.device)
    if step.on_gpu:
        started = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            _stay_kernel[(multiprocessor_count(step.device) // 2,)](started, int(seconds * 1e9), num_warps=32)
        while not started.item():  # before the layer takes the places
            time.sleep(0.001)
    step.assert_equal(step(), alone)


@triton.jit
def _stay_kernel(started_ptr, nanoseconds):
    """Each program, of 1024 threads, leaves too few registers of its SM for another of 256 times 255."""
    tl.store(started_ptr, 1)
    began = globaltimer()
    now = began
    while now - began < nanoseconds:
        now = globaltimer()


def poisoned_runs(step, runs):
    """Runs whose memory held NaN before agree bit for bit, and are as accurate as one launch per step."""
    first = None
    for _ in range(runs):
        # What torch's allocator hands out next is all ones, NaN in every format, and -1: in large blocks and in small.
        if step.on_gpu:
            torch.cuda.empty_cache()
        sizes = [2**30 if step.on_gpu else 2**20, *[2**20] * 16]
        blocks = [torch.full((size,), 255, dtype=torch.uint8, device=step.device) for size in sizes]
        del blocks
        found = step()
        first = first or found
        step.assert_equal(found, first)

    def truth(tensors):
        return layers.by_torch(replace(step.problem.with_tensors([t.double() for t in tensors]), precision="ieee"))

    def stepwise(tensors):
        return layers.by_kernels(step.problem.with_tensors(tensors), "triton-stepwise")

    judge(first, step.problem.names, step.problem.tensors, stepwise, truth)


def many_steps(step, chunk):
    """More steps than cuDNN takes, forward, as accurate as one launch per step."""
    problem = step.problem
    with torch.no_grad():
        found, stepwise = (
            flat(functional.lstm(problem.x, problem.hx, problem.weights, backend=backend))
            for backend in (step.backend, "triton-stepwise")
        )
        weights, state, pieces = [w.double() for w in problem.weights], [s.double() for s in problem.hx], []
        for x in problem.x.double().split(chunk):
            y, *state = torch._VF.lstm(x, tuple(state), weights, True, 1, 0.0, False, False, False)
            pieces.append(y)
    for name, result, other, true in zip(problem.names, found, stepwise, (torch.cat(pieces), *state)):
        tolerance.assert_as_accurate(result, true, tolerance.errors(other, true), name)


@contextlib.contextmanager
def _little_memory(step, attempt):
    """Less memory than a step needs, at first; each attempt gets further."""
    if step.on_gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(step.device).total_memory
        allowed = torch.cuda.memory_reserved() + attempt * 2**25
        torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    left, allocate = iter(range(attempt)), layer.new_states

    def limited(*args):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no memory")
        return allocate(*args)

    with mock.patch.object(layer, "new_states", limited), mock.patch.object(layer_backward, "new_states", limited):
        yield


def after_out_of_memory(step, least):
    """A step that runs out of memory, at one place or another, leaves nothing behind that the next one would trip over."""
    expected, failures = step(), 0
    for attempt in range(100):
        try:
            with _little_memory(step, attempt):
                step()
        except torch.OutOfMemoryError:
            failures += 1
        else:
            break
        step.assert_equal(step(), expected)
    assert least <= failures < 100, failures


def the_host_does_not_wait(step):
    """Resets and lengths may lie on the CPU, in pinned memory too, and change as soon as the call returns; packed as well."""
    x = step.problem.x
    T, B, H = x.shape
    lstm = LSTM(H, H, device=step.device, dtype=BF16, backend=step.backend).requires_grad_(False)
    lengths, resets = torch.arange(B) % T + 1, torch.rand(T, B) < 0.2
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)

    def results(lengths, resets):
        return lstm(x, lengths=lengths, resets=resets)[0], lstm(packed, return_cell_states=True)[0].data

    expected = results(lengths, resets)
    synchronize(step.device)
    # The first of these makes the allocators ask CUDA for as much memory as they need while nothing ends, which may wait.
    for attempt, pinned in enumerate((False, False, True) if step.on_gpu else (False,)):
        given = [t.pin_memory() if pinned else t.clone() for t in (lengths, resets)]
        started = time.monotonic()
        asleep = torch.cuda.Event() if step.on_gpu else None
        if asleep:
            torch.cuda._sleep(4_000_000_000)  # two seconds
            asleep.record()
        found = results(*given)
        for t in given:
            t.zero_()
        assert not attempt or not asleep.query(), f"the host waited: {time.monotonic() - started:.2f} s"
        assert all(map(torch.equal, found, expected))


@triton.jit
def _no_arrival(counter_ptr, last):
    pass


@triton.jit
def _no_store(ptr, h, rows, offs_h, mask):
    pass


def wait_without_end(device, backend, sizes, in_band):
    """A layer whose programs never say that their state is there. It must be the first of its process, as it is compiled so."""
    name, nothing = ("store_state", _no_store) if in_band else ("arrive", _no_arrival)
    with mock.patch.object(sequence, name, nothing), mock.patch.object(search, "_IN_BAND", (in_band,)):
        T, B, H = sizes
        lstm = LSTM(H, H, device=device, dtype=BF16, backend=backend).requires_grad_(False)
        x = torch.randn(T, B, H, device=device, dtype=BF16)
        lstm(x)
        try:
            synchronize(device)
        except RuntimeError as error:
            print("stopped:", error)
        lstm(x)


def most(device):
    """Rows and units of the largest layer that one launch takes, two of which are more programs than there are SMs."""
    for H in (1024, 768, 512):
        for B in (128, 96, 64, 48, 32, 16):
            plans = layer.training_plans(Problem("forward", B, H, 1, BF16, "ieee"), 64, device)
            if all(c.persistent and 2 * c.programs * c.groups > multiprocessor_count(device) for c in plans.values()):
                return B, H
    _end_unserved("no layer takes more than half of this GPU")
