"""Tests of compiled kernels, from a test process that interprets kernels: a process is either the one or the other."""

from __future__ import annotations

import faulthandler
import functools
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lstm_triton import process

if not torch.cuda.is_available():
    # The first derivative decides whether autograd starts threads, which no fork survives. Under a FakeTensorMode it would,
    # because torch's builds for CUDA count a GPU there.
    torch.ones((), requires_grad=True).backward()


def run_without_interpreter(script: str | Path, *args: str, timeout: float = 600) -> str:
    """Run a Python script without TRITON_INTERPRET, importing from where this process does; return what it prints.

    It runs in a fork of a process that has imported torch and Triton; on a GPU in a process of its own. Where the system
    allows, its memory lies at the same addresses in every run: the compiler's order of instructions follows them, and with it
    whether a kernel that fills all registers spills one or two.

    Raises AssertionError with the script's output if it fails, subprocess.TimeoutExpired if it takes longer.
    """
    return _printed([str(script), *args], os.getcwd(), timeout, _fork_of_a_server)


def run_script(script: str | Path, *args: str, cwd: Path, timeout: float = 300) -> str:
    """What a Python script prints that is run as if by `python script *args` in the folder `cwd`.

    It runs in a fork of this process, which has imported torch and this package already; on a GPU in a process of its own.

    Raises AssertionError with the script's output if it fails.
    """
    return _printed([str(script), *args], str(cwd), timeout, _fork)


def _printed(command: list[str], cwd: str, timeout: float, fork: Callable[[list[Any], float], int | None]) -> str:
    """What `_as_main` prints for this command in a fork; on a GPU, which no fork survives, a Python of its own."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        if torch.cuda.is_available():
            started = [*_with_fixed_addresses(), sys.executable, *command]
            with open(out.name, "w") as stdout, open(err.name, "w") as stderr:
                options = dict(cwd=cwd, env=_environment(), stdout=stdout, stderr=stderr, timeout=timeout)
                failed = subprocess.run(started, **options).returncode
        else:
            failed = fork([command, cwd, out.name, err.name], timeout)
        printed, errors = out.read(), err.read()
    if failed != 0:
        raise AssertionError(f"{' '.join(command)} failed:\n{printed}\n{errors}")
    return printed


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"}


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported what the scripts without the interpreter need, and forks for each: see `_serve`. It ends with
    this one, which closes the pipe."""
    command = [*_with_fixed_addresses(), sys.executable, "-c", "from support.process import _serve; _serve()"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=_environment(), stdin=pipe, stdout=pipe, text=True, start_new_session=True)


def _fork_of_a_server(arguments: list[Any], timeout: float) -> int:
    """The exit code of a fork of `_server` that has called `_as_main` with these arguments."""
    server = _server()
    print(json.dumps(arguments), file=server.stdin, flush=True)
    ready, _, _ = select.select([server.stdout], [], [], timeout)
    if not ready or not (line := server.stdout.readline()):
        os.killpg(server.pid, signal.SIGKILL)  # with the compilers that the script has started
        server.wait()
        _server.cache_clear()
        raise subprocess.TimeoutExpired(arguments[0], timeout)
    return int(line)


def _serve() -> None:
    """Read the arguments of `_as_main` line by line; call it in a fork of this process and print the fork's exit code."""
    from triton.runtime.cache import triton_key

    from . import aot_sequence  # noqa: F401  imports Triton, its compiler and the package

    triton_key()  # reads all of Triton, once

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return _as_main(*json.loads(line))  # and end as Python does
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _fork(arguments: list[Any], timeout: float) -> int | None:
    """The exit code of a fork of this process that has called `_as_main` with these arguments; None after the timeout."""
    child = multiprocessing.get_context("fork").Process(target=_as_main, args=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads; they are idle
        child.start()
    child.join(timeout)
    code = child.exitcode
    child.kill()
    return code


def _as_main(command: list[str], cwd: str | Path, out: str, err: str) -> None:
    """Run a script as Python would, in this process, with its output in the files `out` and `err`."""
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # pytest has put others there
    for name, module in list(sys.modules.items()):
        if name.startswith("lstm_triton.kernels.") and hasattr(module, "torch"):
            module.torch = torch  # not the one with which conftest.py fills new memory
    os.chdir(cwd)
    sys.argv, script = command, Path(command[0]).resolve()
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.stdout.flush()


class ForkedProcess(process.Process):
    """A fork of this process instead of a new Python: for what depends on its being another, but not on its start."""

    def __init__(self, function: str, argument: Any, environment: Mapping[str, str | None]) -> None:
        self._connection, its = multiprocessing.Pipe()
        self._process: Any = _Fork(function, its, environment)
        self._process.start()
        its.close()
        self.send(argument)


class _Fork(multiprocessing.get_context("fork").Process):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(target=_call, args=arguments)

    def wait(self) -> int | None:
        self.join()
        return self.exitcode


def _call(function: str, connection: Connection, environment: Mapping[str, str | None]) -> None:
    faulthandler.disable()  # pytest's, which would print where a process on purpose aborts
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    process.main(time.perf_counter(), function, str(os.dup(connection.fileno())))


@functools.cache
def _with_fixed_addresses() -> list[str]:
    command = ["setarch", "-R"]
    allowed = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def run_checks(namespace: Mapping[str, Any]) -> None:
    """For such a script: call every function named check_*, print what fails, and exit with an error if any does."""
    checks = {name: value for name, value in namespace.items() if name.startswith("check_")}
    failed = []
    for name, check in checks.items():
        try:
            check()
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed or not checks:
        sys.exit(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    print(f"{len(checks)} checks passed")
