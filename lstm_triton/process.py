"""Processes in which `lstm-triton tune` and the benchmark measure: each sends its results through a pipe, and a crash ends only
that process."""

import contextlib
import importlib
import itertools
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# Import from PYTHONPATH alone, not from the working folder.
_CODE = """import sys, time
begin = time.perf_counter()
sys.path[:] = [path for path in sys.path if path]
from lstm_triton.process import main
main(begin, *sys.argv[1:])"""
imports_s = 0.0  # seconds that the imports of this process took, if it is a Process


class Died(RuntimeError):
    """The process crashed, stopped answering or lost the device."""


class Fatal(RuntimeError):
    """This process cannot measure any more: the device reports an error that persists."""


class Process:
    """Runs `package.module:function(connection, argument)`. Its standard output goes to standard error.

    environment: variables that differ from this process's; None removes one.
    """

    def __init__(self, function: str, argument: Any, environment: Mapping[str, str | None]) -> None:
        folders = os.pathsep.join(map(os.path.abspath, sys.path))
        environ = {**os.environ, "PYTHONPATH": folders, **environment}
        self._connection, its = Pipe()
        command, null = [sys.executable, "-c", _CODE, function, str(its.fileno())], subprocess.DEVNULL
        environ = {name: value for name, value in environ.items() if value is not None}
        options: Any = dict(env=environ, stdin=null, stdout=2, pass_fds=[its.fileno()])
        self._process = subprocess.Popen(command, **options)
        its.close()
        self.send(argument)

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # the process has died: the next `receive` raises Died
            self._connection.send(message)

    def receive(self, silence_s: float, deadline: float = float("inf")) -> Any:
        """Return the next message, or raise it, if it is an exception, and end the process.

        Raises Died after `silence_s` without a message, TimeoutError at `deadline` (time.monotonic).
        """
        try:
            if self._connection.poll(max(min(silence_s, deadline - time.monotonic()), 0.0)):
                message = self._connection.recv()
                if isinstance(message, Exception):
                    self.end()
                    raise message
                return message
        except (EOFError, OSError):
            code = self._process.wait()
            raise Died(f"the process ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}") from None
        self.end()
        if time.monotonic() >= deadline:
            raise TimeoutError
        raise Died(f"no sign of life for {silence_s:.0f} s: ended")

    def ask(self, request: Any, silence_s: float, deadline: float = float("inf")) -> Iterator[Any]:
        """Send a request to a process that runs `answer`, and return its events. Raises what `receive` raises, and Died where
        the process says that it cannot go on.
        """
        self.send(request)
        while (event := self.receive(silence_s, deadline)) is not None:
            yield event

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def answer(connection: Any, respond: Callable[[Any], None]) -> None:
    """Answer each request, in the new process, by the events that `respond` sends, until there are no more."""
    with contextlib.suppress(EOFError):
        while True:
            respond(connection.recv())
            connection.send(None)


def brief(error: BaseException) -> str:
    """Return the kind and the first line of an error, and whether a backward raised it."""
    in_backward = any(frame.name == "backward" for frame in traceback.extract_tb(error.__traceback__))
    text = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    return "in its backward: " * in_backward + text[:330]


def main(begin: float, function: str, handle: str) -> None:
    """Run the function, and send what it raises as Died: the entry point of the new process."""
    global imports_s
    module, _, name = function.partition(":")
    run = getattr(importlib.import_module(module), name)
    imports_s = time.perf_counter() - begin
    connection: Connection = Connection(int(handle))
    try:
        run(connection, connection.recv())
    except Exception as error:
        traceback.print_exc()
        what = "the device was lost" if isinstance(error, Fatal) else "the measuring process itself failed"
        connection.send(Died(f"{what}: {brief(error)}"))


def why_lost() -> str | None:
    """Return why the CUDA context of this process is lost, or None if it is not, or if there is none.

    The context itself is tried, because the text of an error does not say: cuDNN and cuBLAS name an illegal access after the
    call, and a failed capture of a CUDA graph is a "CUDA error" too, after which everything still runs.
    """
    if not torch.cuda.is_initialized():
        return None
    stall = sys.modules.get("lstm_triton.kernels.stall")  # imported with the first launch
    if stall and (text := stall.message()):
        return text
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return None


def raise_if_lost(error: BaseException) -> None:
    """Raise Fatal if the error has lost the process its CUDA context."""
    if why := why_lost():
        raise Fatal(why.splitlines()[0][:300]) from error


def age_s() -> float:
    """Return the seconds since this process began, imports included; infinity where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, StopIteration, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        starttime = int(next(itertools.islice(fields, 19, None))) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - starttime, 0.0)
    return float("inf")
