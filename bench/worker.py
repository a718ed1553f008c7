"""The process that measures, and the handle its parent has on it.

A kernel that hangs or corrupts the device takes its process along. So the tasks run in a process of their own, which tells
what it is about to do; when it falls silent or dies, the parent knows whom to blame, and goes on with a new one.

Both speak JSON lines: the parent sends {"task", "skip", "roofs", "seconds"}; the worker answers with events "ready", "stage",
"row", "error" (the device is lost) and "done".
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from . import child
from .cases import Task
from .floor import Roofs


@dataclass(frozen=True)
class Setup:
    """What a worker is told at its start."""

    device: str
    command: str
    run: str
    flush_l2: bool = False
    names: tuple[str, ...] | None = None
    threads: int | None = None


class WorkerDied(RuntimeError):
    """The worker crashed, fell silent or lost the device; provider, execution and stage say what it was doing."""

    def __init__(self, reason: str, provider: str, execution: str, stage: str) -> None:
        super().__init__(reason)
        self.provider, self.execution, self.stage = provider, execution, stage


class Worker:
    """A worker process. path: folders that its imports come from, in place of this process's."""

    def __init__(self, setup: Setup, *, interpreter: bool = False, path: Sequence[str] | None = None,
                 environment: Mapping[str, str] | None = None) -> None:  # fmt: skip
        environ = child.environment(path, {**({"TRITON_INTERPRET": "1"} if interpreter else {}), **(environment or {})})
        command = child.command("worker", json.dumps(asdict(setup)))
        self._process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._doing = ("the worker process", "eager", "start")
        self.about: dict[str, Any] = {}

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._events.put(json.loads(line))
            except ValueError:
                print(line, end="", file=sys.stderr)
        self._events.put(None)

    def ready(self, seconds: float = 300.0) -> dict[str, Any]:
        """Wait until it has imported everything; returns what its rows say of device, versions and source."""
        self.about = {name: value for name, value in self._next(seconds, None).items() if name != "event"}
        return self.about

    def run(
        self,
        task: Task,
        skip: Collection[tuple[str, str]],
        roofs: Roofs | None,
        seconds: float,
        emit: Callable[[dict[str, Any]], None],
        stage: Callable[[str], None],
        *,
        silence_s: float,
        deadline: float | None,
    ) -> bool:
        """Measure one task; False when `deadline` (time.monotonic) came first, and the worker was ended.

        Raises WorkerDied; rows emitted before that are good.
        """
        request = {
            "task": task.to_json(),
            "skip": list(skip),
            "roofs": asdict(roofs) if roofs else None,
            "seconds": seconds,
        }
        self._doing = ("the worker process", "eager", "task")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is dead: the next read says how
        while True:
            try:
                event = self._next(silence_s, deadline)
            except TimeoutError:
                self.end(patience_s=0.0)
                return False
            if event["event"] == "stage":
                self._doing = (event["provider"], event["execution"], event["what"])
                stage(f"{event['provider']}: {event['what']}")
            elif event["event"] == "row":
                emit(event["row"])
            elif event["event"] == "error":
                self.end()
                raise WorkerDied(event["reason"], *self._doing)
            elif event["event"] == "done":
                return True

    def _next(self, silence_s: float, deadline: float | None) -> dict[str, Any]:
        left = silence_s if deadline is None else min(silence_s, deadline - time.monotonic())
        try:
            event = self._events.get(timeout=max(left, 0.0))
        except queue.Empty:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError from None
            self.end()
            raise WorkerDied(f"no sign of life for {silence_s:.0f} s: ended", *self._doing) from None
        if event is None:
            code = self._process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise WorkerDied(f"the process ended {how}", *self._doing)
        return event

    def end(self, patience_s: float = 0.5) -> None:
        """End the process, by force if it does not go within `patience_s`."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                pass
        try:
            self._process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(arguments: Sequence[str]) -> int:
    """The worker's side."""
    # Libraries print to standard output; only this module may answer there.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    data = json.loads(arguments[0])
    data["names"] = None if data["names"] is None else tuple(data["names"])
    return serve(Setup(**data), sys.stdin, answers)


def serve(setup: Setup, requests: TextIO, answers: TextIO) -> int:
    """Answer requests until there are no more; 1 when the device is lost."""

    def tell(event: str, **content: Any) -> None:
        answers.write(json.dumps({"event": event, **content}) + "\n")
        answers.flush()

    from . import device as devices
    from . import measure as measuring

    context = make_context(setup, lambda provider, execution, what: tell(
        "stage", provider=provider, execution=execution, what=what))  # fmt: skip
    tell("ready", device=devices.describe(context.device), versions=devices.versions(), source=devices.source())
    for line in requests:
        request = json.loads(line)
        task = Task.from_json(request["task"])
        context.roofs = Roofs(**request["roofs"]) if request["roofs"] else None
        context.seconds = request["seconds"]
        try:
            skip = {(provider, execution) for provider, execution in request["skip"]}
            measuring.measure(task, context, lambda row: tell("row", row=row), skip)
        except measuring.Fatal as error:
            tell("error", reason=f"the device was lost: {error}")
            return 1
        except Exception:
            tell("error", reason=f"the benchmark itself failed: {traceback.format_exc().splitlines()[-1]}")
            traceback.print_exc()
            return 1
        tell("done")
    return 0


def make_context(setup: Setup, stage: Callable[[str, str, str], None]) -> Any:
    """The Context of a run, on the device that `setup` names."""
    import torch

    from . import measure as measuring
    from . import rows, timing

    device = torch.device(setup.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    if setup.threads:
        torch.set_num_threads(setup.threads)
    if os.environ.get("TRITON_INTERPRET"):
        from lstm_triton.kernels import interpreter

        interpreter.install()  # what Triton's own gets wrong
    clock = timing.clock(device, setup.flush_l2)
    maker = rows.RowMaker(device, setup.command, setup.run, l2=clock.l2)
    return measuring.Context(device, maker, clock, names=setup.names, stage=stage)
