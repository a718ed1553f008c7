"""What the tests of the benchmark share: tasks measured with a clock that counts, and runs in this process on the CPU."""

import time
from pathlib import Path

import torch

from lstm_triton.bench import __main__ as main
from lstm_triton.bench import measure as measuring
from lstm_triton.bench import progress, rows
from lstm_triton.bench import run as running
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.device import RowMaker
from lstm_triton.bench.providers import CUDNN, OURS
from support.process import ForkedProcess

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["--device", "cpu", "--scale", "tiny", "--seconds", "0.001", "--threads", "1"]
CPU = torch.device("cpu")


def context():
    return measuring.Context(RowMaker(CPU, "a test", "run", synthetic=True), FakeClock(), seconds=0.0)


class FakeClock:
    """Counts what it times; each call takes as many microseconds as its turn."""

    name, l2, sample_seconds = "fake", None, 1e-9

    def __init__(self):
        self.calls = []

    def sample(self, call, n):
        call()
        self.calls.append(call)
        return 2.0, 3.0


def run(task, names=None):
    found = []
    measuring.measure(task, context(), found.append, names and [(n, e) for n in names for e in task.executions])
    assert [rows.decode(row.encode().encode()) for row in found] == found
    return {row.provider: row for row in found}


def options(folder, **changes):
    given = {
        "device": "cpu",
        "command": "a test",
        "seconds": 0.001,
        "threads": 1,
        "provider": (OURS, CUDNN),
        "anchors": False,
    }
    options = main.make_parser().parse_args([])
    vars(options).update(given | changes, output=folder)
    return options


class Here:
    """A worker in this process: for what does not depend on its being another."""

    def __init__(self, given, run):
        self._context = running.make_context(given, run, lambda *stage: None)
        self.maker = self._context.maker

    def ask(self, request, silence_s, deadline):
        if time.monotonic() >= deadline:
            raise TimeoutError
        (task, pairs, self._context.roofs), found = request, []
        measuring.measure(task, self._context, found.append, pairs)
        yield from found

    def end(self):
        pass


class Forked(ForkedProcess):
    """A worker in a fork of this process, which costs nothing to start."""

    def __init__(self, given, run):
        super().__init__(f"{running.__name__}:serve", (given, run), {"TRITON_INTERPRET": None})
        self.maker = self.receive(60.0)


def measure(folder, tasks, new_worker=Here, **changes):
    runner = running.Runner(options(folder, **changes), progress.Progress(len(tasks)), new_worker)
    runner.run(tasks)
    return runner


def rows_of(folder):
    found, problems = rows.read_all([folder])
    assert not problems
    return found


def small(*sizes, **changes):
    return [Task("batch", Case("a", H, 2, 3, dtype="float32", precision="ieee", **changes)) for H in sizes]
