"""Run all programs of a launch at the same time, in Triton's interpreter, so that they can wait for each other.

The interpreter runs program 0 to its end, then program 1, and so on: a barrier between programs never opens. Inside
`with concurrent_grid():` each program is a forked process, and the launch's tensors lie in memory that the processes
share, where tl.atomic_* are real atomic instructions of the CPU.

A correct barrier passes in every mode. A faulty one may pass by luck, which two modes take away:

* jitter=s: a program sleeps up to s seconds before one in four of its memory accesses.
* weak=True: memory as weak as a GPU's. A program's stores reach the others when it executes a release (by chance,
  earlier); its loads see memory as it was at its last acquire (by chance, as it is now), except loads that are volatile
  or have the cache modifier .cg or .cv, which see it as it is now. Bounds of stores are not checked.

What the threads of one program do among themselves is below the interpreter; aot.lint_grid_barrier reads that in the
compiled code. Atomics on float16 are not atomic between processes.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import mmap
import os
import random
import signal
import time
import traceback
import types
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing import connection, get_context

import numpy as np
import torch
import triton
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

from lstm_triton.kernels import interpreter

_NOT_KERNEL_CODE = (*(os.path.dirname(m.__file__) + os.sep for m in (triton, np)), interpreter.__file__, __file__)
_SEMANTIC, _CACHE = stock._ir.MEM_SEMANTIC, stock._ir.CACHE_MODIFIER
_SequentialExecutor = stock.GridExecutor


class GridDeadlock(InterpreterError):
    """Some programs were still running at the time-out; the message says where each of them was."""


@contextlib.contextmanager
def concurrent_grid(
    timeout: float = 60,
    jitter: float = 0.0,
    weak: bool = False,
    seed: int = 0,
    max_programs: int = 64,
    only_cooperative: bool = False,
) -> Iterator[None]:
    """Within this context every launch in the interpreter runs its programs at the same time.

    timeout: seconds until a launch is stopped with GridDeadlock.
    jitter, weak: see the module; seed repeats their choices, though not the order in which programs run.
    max_programs: refuse larger grids, since each program is a process.
    only_cooperative: leave launches without launch_cooperative_grid=True to the stock interpreter.
    """
    options = {"options": types.SimpleNamespace(**locals())}
    previous, stock.GridExecutor = stock.GridExecutor, type("ConcurrentExecutor", (_ConcurrentExecutor,), options)
    could_wait, interpreter.programs_are_concurrent = interpreter.programs_are_concurrent, True
    try:
        yield
    finally:
        stock.GridExecutor, interpreter.programs_are_concurrent = previous, could_wait


class _ConcurrentExecutor(_SequentialExecutor):
    def __call__(self, *args, **kwargs):
        if self.options.only_cooperative and not kwargs.get("launch_cooperative_grid"):
            return _SequentialExecutor(self.fn, self.arg_names, self.grid, self.pre_run_hooks)(*args, **kwargs)
        self.programs = {}  # the end of a pipe that receives a program's answer -> program id, process
        self.fn = _Starter(self.fn, self._start)
        try:
            super().__call__(*args, **kwargs)
        finally:
            for _, process in self.programs.values():
                process.kill()
                process.join()

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        self.memory = _SharedMemory([*_tensors([*args, *kwargs.values()])])
        return args, kwargs

    def _start(self, kernel, args):
        builder = stock.interpreter_builder
        if math.prod(builder.grid_dim) > self.options.max_programs:
            raise ValueError(f"a grid of {builder.grid_dim} is more than max_programs={self.options.max_programs}")
        fork = get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_run_program, args=(kernel, args, self.options, self.memory, sender))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads; they are idle
            process.start()
        sender.close()
        self.programs[receiver] = builder.grid_idx, process

    def _restore_args_dev(self, *args):
        """The interpreter comes here once it has "run", in truth started, every program."""
        deadline = time.monotonic() + self.options.timeout
        running = dict(self.programs)
        while running:
            ready = connection.wait(list(running), max(0, deadline - time.monotonic()))
            for receiver in ready:
                program, process = running.pop(receiver)
                if failure := _answer(receiver, process):
                    raise InterpreterError(f"program {program} {failure}")
            if not ready:
                for _, process in running.values():
                    process.terminate()
                stuck = [f"program {program} {_answer(end, child)}" for end, (program, child) in running.items()]
                raise GridDeadlock("\n  ".join([f"{len(stuck)} of {len(self.programs)} programs did not end:", *stuck]))
        super()._restore_args_dev(*args)


class _Starter:
    """Stands for the kernel: the interpreter calls it once per program, and looks at its signature and globals."""

    def __init__(self, kernel, start):
        self.kernel, self.start = kernel, start
        self.__name__, self.__globals__ = kernel.__name__, kernel.__globals__
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **args):
        self.start(self.kernel, args)


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, stock.TensorDescriptor):
            yield from _tensors([value.base])
        elif hasattr(value, "data_ptr"):
            yield stock._unwrap_tensor(value)


class _SharedMemory:
    """The storages of some tensors, moved to one piece of memory that forked processes share."""

    def __init__(self, tensors: list[torch.Tensor]):
        shared = mmap.mmap(-1, 256 + sum(tensor.untyped_storage().nbytes() + 256 for tensor in tensors))
        moved, used = {}, 256
        for tensor in tensors:
            old = tensor.untyped_storage()
            if old.nbytes() and old.data_ptr() not in moved:
                new = torch.frombuffer(shared, dtype=torch.uint8, count=old.nbytes(), offset=used).untyped_storage()
                moved[old.data_ptr()] = new.copy_(old)
                used += old.nbytes() // 256 * 256 + 256
            if old.nbytes():
                tensor.set_(moved[old.data_ptr()], tensor.storage_offset(), tensor.size(), tensor.stride())
        self.bytes = np.frombuffer(shared, np.uint8, used)
        self.address = np.uint64(self.bytes.ctypes.data)


def _run_program(kernel, args, options, memory, sender):
    """The life of a program's process. Sends how it failed, or ""."""
    failure = ""
    signal.alarm(math.ceil(options.timeout) + 60)  # the end, should the parent be killed
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        builder = stock.interpreter_builder
        builder.__class__ = type("ConcurrentBuilder", (_ConcurrentBuilder, type(builder)), {})
        builder.begin(options, memory)
        kernel(**args)
        if builder.weak:
            builder.weak.release()
    except KeyboardInterrupt as stopped:
        frames = [f for f in traceback.extract_tb(stopped.__traceback__) if not f.filename.startswith(_NOT_KERNEL_CODE)]
        lines = [f"{f.filename}:{f.lineno} in {f.name}: `{f.line}`" for f in reversed(frames)]
        failure = "was at " + ", called at ".join(lines)
    except BaseException as error:
        while error.__cause__:
            error = error.__cause__
        failure = f"raised {type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sender.send(failure)


def _answer(receiver, process) -> str:
    if receiver.poll(5):
        with contextlib.suppress(EOFError):
            return receiver.recv()
    process.join(1)
    return f"gave no answer, exit code {process.exitcode}"


class _ConcurrentBuilder:
    """Goes before the class of the interpreter's builder, repaired or not, in a program's process."""

    def begin(self, options, memory):
        self.random = random.Random(f"{options.seed} {self.grid_idx}")
        self.jitter = options.jitter
        self.weak = _WeakMemory(memory) if options.weak else None

    def get_cache_policy(self, cache_modifier, eviction_policy):  # Triton 3.9 makes one policy of the two, by name
        return getattr(_CACHE, cache_modifier.upper())

    def create_masked_load(self, ptrs, mask, other, *policy, **named_policy):
        lanes, touched = self._access(ptrs, mask)
        cache_modifier, *_, is_volatile = policy or (*named_policy.values(), False)
        past_l1 = is_volatile or cache_modifier in (_CACHE.CG, _CACHE.CV)
        if self.weak and past_l1:
            self.weak.release_own(touched)  # a program always sees its own stores
        result = super().create_masked_load(ptrs, mask, other, *policy, **named_policy)
        if self.weak and not past_l1 and (self.random.random() < 0.9 or self.weak.is_own(touched)):
            result.data = result.data.copy()
            result.data[lanes] = self.weak.load(touched, result.data.dtype)
        return result

    def create_masked_store(self, ptrs, value, mask, *policy):
        lanes, touched = self._access(ptrs, mask)
        if not self.weak:
            return super().create_masked_store(ptrs, value, mask, *policy)
        self.weak.store(touched, value.data[lanes])
        if self.random.random() < 0.02:
            self.weak.release()

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        return self._atomic(super().create_atomic_rmw, ptr, mask, sem, op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        return self._atomic(super().create_atomic_cas, ptr, None, sem, ptr, cmp, val, sem, scope)

    def _atomic(self, operation, ptr, mask, sem, *args):
        _, touched = self._access(ptr, mask)
        if not self.weak:
            return operation(*args)
        releases = sem in (_SEMANTIC.RELEASE, _SEMANTIC.ACQUIRE_RELEASE)
        acquires = sem in (_SEMANTIC.ACQUIRE, _SEMANTIC.ACQUIRE_RELEASE)
        self.weak.release() if releases else self.weak.release_own(touched)
        result = operation(*args)
        self.weak.acquire() if acquires else self.weak.acquire_own(touched, result.data.dtype)
        return result

    def _access(self, ptrs, mask):
        """Which lanes access memory, and which addresses; after a pause."""
        if self.jitter and self.random.random() < 0.25:
            time.sleep(self.random.random() * self.jitter)
        elif ptrs.data.size == 1:
            time.sleep(2e-5)  # whoever polls gives the core to other programs
        lanes = np.broadcast_to(True if mask is None else np.asarray(mask.data, bool), ptrs.data.shape)
        return lanes, ptrs.data[lanes]


class _WeakMemory:
    """Memory as one program sees it: its stores wait in `pending`, its loads read `seen`, a copy."""

    def __init__(self, memory):
        self.memory = memory
        self.pending = []  # addresses, values
        self.seen = None

    def acquire(self):
        self.seen = None  # copied when needed: polling copies nothing

    def acquire_own(self, addresses, dtype):
        """What an atomic of this program has seen, it cannot unsee."""
        if self.seen is not None:
            index = self._index(addresses, dtype)
            self.seen.view(dtype)[index] = self.memory.bytes.view(dtype)[index]

    def release(self):
        self._write(self.memory.bytes, self.pending)
        self.pending.clear()

    def is_own(self, addresses):
        return any(np.isin(addresses, pending).any() for pending, _ in self.pending)

    def release_own(self, addresses):
        if self.is_own(addresses):
            self.release()

    def load(self, addresses, dtype):
        if self.seen is None:
            self.seen = self.memory.bytes.copy()
            self._write(self.seen, self.pending)
        return self.seen.view(dtype)[self._index(addresses, dtype)]

    def store(self, addresses, values):
        self.pending.append((addresses, values))
        if self.seen is not None:
            self._write(self.seen, self.pending[-1:])

    def _write(self, target, stores):
        for addresses, values in stores:
            target.view(values.dtype)[self._index(addresses, values.dtype)] = values

    def _index(self, addresses, dtype):
        return (addresses - self.memory.address) // np.uint64(dtype.itemsize)
