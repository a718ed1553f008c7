"""What the tests of the benchmark share: tasks measured with a clock that counts, and runs in this process on the CPU."""

import os
import time
from pathlib import Path

import torch

from lstm_triton.bench import measure as measuring
from lstm_triton.bench import progress, rows, schema, store, worker
from lstm_triton.bench import run as running
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.providers import CUDNN, OURS

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["--device", "cpu", "--scale", "tiny", "--seconds", "0.001", "--threads", "1"]
CPU = torch.device("cpu")


def context(**options):
    maker = rows.RowMaker(CPU, "a test", synthetic=True)
    return measuring.Context(CPU, maker, FakeClock(), seconds=0.0, **options)


class FakeClock:
    """Counts what it times; each call takes as many microseconds as its turn."""

    name, l2, sample_seconds = "fake", None, 1e-9

    def __init__(self):
        self.calls = []

    def sample(self, call, n):
        call()
        self.calls.append(call)
        return 2.0, 3.0


def run(task, **options):
    found = []
    measuring.measure(task, context(**options), found.append)
    for row in found:
        schema.encode(row)
    return {row["provider"]: row for row in found}


def options(folder, **changes):
    given = {
        "device": "cpu",
        "command": "a test",
        "seconds": 0.001,
        "threads": 1,
        "names": (OURS, CUDNN),
        "anchors": False,
    }
    return running.Options(folder, **(given | changes))


class Here:
    """A worker in this process: for what does not depend on its being another."""

    def __init__(self, setup, **options):
        self._context = worker.make_context(setup, lambda *stage: None)
        maker = self._context.rows
        row = maker.make(running.anchor("cpu"), "", "eager", "skipped", "a template")
        self.about = {name: row[name] for name in ("device", "versions", "source")}

    def ready(self):
        return self.about

    def run(self, task, skip, roofs, seconds, emit, stage, *, silence_s, deadline):
        if deadline is not None and time.monotonic() >= deadline:
            return False
        self._context.roofs, self._context.seconds = roofs, seconds
        measuring.measure(task, self._context, emit, skip)
        return True

    def end(self, patience_s=0.0):
        pass


def measure(folder, tasks, new_worker=Here, **changes):
    with open(os.devnull, "w") as nowhere:
        bar = progress.Progress(len(tasks), None, stream=nowhere)
        return running.Runner(options(folder, **changes), tasks, bar, lambda text: None, new_worker).run()


def rows_of(folder):
    found = store.read_all([folder])
    assert not found.problems
    return found.rows


def small(*sizes, **changes):
    return [Task("batch", Case("a", H, 2, 3, dtype="float32", precision="ieee", **changes)) for H in sizes]
