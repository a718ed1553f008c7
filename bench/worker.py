"""The process that measures, and the handle its parent has on it.

A kernel that hangs or corrupts the device takes its process along. So the tasks run in a process of their own, which tells
what it is about to do; when it falls silent or dies, the parent knows whom to blame, and goes on with a new one.
"""

import os
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lstm_triton import timing
from lstm_triton.process import Died, Fatal, Process

from . import measure
from .cases import Task
from .device import RowMaker
from .roofs import Roofs
from .rows import Row


@dataclass
class Options:
    """Options of a run.

    budget_s: the run stops by then; seconds: sampling time of each provider; silence_s: a worker silent that long is ended.
    """

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
    environment: dict[str, str | None] = field(default_factory=dict)
    anchors: bool = True


class Worker(Process):
    """A worker process. maker: makes rows as it does."""

    def __init__(self, options: Options, run: str, interpreter: bool) -> None:
        environment = options.environment | {"TRITON_INTERPRET": "1" if interpreter else None}
        super().__init__(f"{__name__}:serve", (options, run), environment, options.path)
        self.maker: RowMaker = self.receive(300.0)  # when it has imported everything
        self._silence_s = options.silence_s

    def run(
        self, task: Task, skip: Collection[tuple[str, str]], roofs: Roofs | None, deadline: float
    ) -> Iterator[Row | tuple[str, str, str]]:
        """Measure one task: its rows, and before whatever may take the process along, whose turn it is: provider, execution,
        and what is done. Raises TimeoutError when `deadline` (time.monotonic) came first, and Died; both end the worker.
        """
        self.send((task, skip, roofs))
        while (event := self.receive(self._silence_s, deadline)) is not None:
            if isinstance(event, str):
                self.end()
                raise Died(event)
            yield event


def serve(connection: Any, setup: tuple[Options, str]) -> None:
    """The worker's side: answer requests until there are no more, or the device is lost."""
    context = make_context(*setup, lambda *doing: connection.send(doing))
    connection.send(context.maker)
    while True:
        try:
            task, skip, context.roofs = connection.recv()
        except EOFError:
            return
        try:
            measure.measure(task, context, connection.send, skip)
            connection.send(None)
        except Exception as error:
            traceback.print_exc()
            what = "the device was lost" if isinstance(error, Fatal) else "the benchmark itself failed"
            connection.send(f"{what}: {measure.brief(error)}")
            return


def make_context(options: Options, run: str, stage: Callable[[str, str, str], None]) -> measure.Context:
    """Make what the tasks of a run share, on the device that the options name."""
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if os.environ.get("TRITON_INTERPRET"):
        from lstm_triton.kernels import interpreter

        interpreter.install()  # what Triton's own gets wrong
    clock = timing.Clock(device, options.flush_l2)
    maker = RowMaker(device, options.command, run, clock.l2)
    return measure.Context(device, maker, clock, options.seconds, options.names, None, stage)
