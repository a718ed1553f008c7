"""The process that measures, and the handle its parent has on it.

A kernel that hangs or corrupts the device takes its process along. So the tasks run in a process of their own, which tells
what it is about to do; when it falls silent or dies, the parent knows whom to blame, and goes on with a new one.
"""

import os
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import choice, host, measure, problem, process, timing
from .built import Built
from .cases import Case, Task
from .device import RowMaker
from .process import Died, Process
from .roofs import Roofs
from .rows import Row


@dataclass
class Options:
    """Of a run. budget_s: stop by then; seconds: of sampling for each provider; silence_s: after which a worker is given up."""

    folder: Path
    device: str
    command: str
    budget_s: float | None = None
    seconds: float = 1.0
    silence_s: float = 180.0
    flush_l2: bool = False
    names: tuple[str, ...] | None = None
    threads: int | None = None
    again: bool = False
    retry: bool = False
    path: Sequence[str] | None = None  # of the workers' imports
    environment: dict[str, str] = field(default_factory=dict)
    anchors: bool = True


class Worker(Process):
    """A worker process. maker: makes rows as it does; doing: provider, execution and stage that it told last."""

    doing = ("the worker process", "eager", "start")

    def __init__(self, options: Options, run: str, interpreter: bool) -> None:
        environment = options.environment | ({"TRITON_INTERPRET": "1"} if interpreter else {})
        super().__init__("worker:serve", (options, run), options.path, environment)
        self.maker: RowMaker = self.receive(300.0)  # when it has imported everything
        self._silence_s = options.silence_s

    def run(
        self,
        task: Task,
        skip: Collection[tuple[str, str]],
        roofs: Roofs | None,
        deadline: float,
        emit: Callable[[Row], None],
        stage: Callable[[str], None],
    ) -> None:
        """Measure one task. Raises TimeoutError when `deadline` (time.monotonic) came first, and Died; both end the worker, and
        rows emitted before that are good.
        """
        self.doing = ("the worker process", "eager", "task")
        self.send((task, skip, roofs))
        while True:
            event, content = self.receive(self._silence_s, deadline)
            if event == "stage":
                self.doing = content
                stage(f"{content[0]}: {content[2]}")
            elif event == "row":
                emit(content)
            elif event == "error":
                self.end()
                raise Died(content)
            else:
                return


def serve(connection: Any, setup: tuple[Options, str]) -> None:
    """The worker's side: answer requests until there are no more, or the device is lost."""
    context = make_context(*setup, lambda *doing: connection.send(("stage", doing)))
    connection.send(context.maker)
    while True:
        try:
            task, skip, context.roofs = connection.recv()
        except EOFError:
            return
        try:
            measure.measure(task, context, lambda row: connection.send(("row", row)), skip)
            connection.send(("done", None))
        except Exception as error:
            traceback.print_exc()
            lost = isinstance(error, measure.Fatal)
            why = f"the device was lost: {error}" if lost else f"the benchmark itself failed: {measure.brief(error)}"
            connection.send(("error", why))
            return


def make_context(options: Options, run: str, stage: Callable[[str, str, str], None]) -> measure.Context:
    """What the tasks of a run share, on the device that the options name."""
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if os.environ.get("TRITON_INTERPRET"):
        from lstm_triton.kernels import interpreter

        interpreter.install()  # what Triton's own gets wrong
    clock = timing.clock(device, options.flush_l2)
    maker = RowMaker(device, options.command, run, clock.l2)
    return measure.Context(device, maker, clock, options.seconds, options.names, None, stage)


def first_calls(connection: Any, request: tuple[Case, str, str]) -> None:
    """In a new process: send import_s, first_call_s and second_call_s of (case, provider, kind of device)."""
    case, provider, device_type = request
    device = torch.device(device_type)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.zeros(1, device=device)  # CUDA itself starts before the clock does
    synchronize()
    with host.conditions(provider, device):
        built = Built(choice.provider(provider), problem.make(case, device))
        torch.set_grad_enabled(built.training)
        times = [time.perf_counter()]
        for _ in range(2):
            built.call()
            synchronize()
            times.append(time.perf_counter())
    first, second = times[1] - times[0], times[2] - times[1]
    connection.send({"import_s": process.imports_s, "first_call_s": first, "second_call_s": second})
