"""What the tests of the benchmark share: made-up rows, tasks measured with a made-up clock, and runs on the CPU."""

import dataclasses
import html.parser
import itertools
import time
from pathlib import Path

import torch

from lstm_triton import timing
from lstm_triton.bench import __main__ as cli
from lstm_triton.bench import measure as measuring
from lstm_triton.bench import providers, rows
from lstm_triton.bench import run as running
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.device import RowMaker
from lstm_triton.bench.providers import CUDNN, OURS
from support.process import ForkedProcess

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["--device", "cpu", "--scale", "tiny", "--seconds", "0.001", "--threads", "1"]
CPU = torch.device("cpu")
FLOOR = rows.Floor(1.0, 0.5, 0.5, 0.1, "assumed")
IEEE = dict(dtype="float32", precision="ieee")
maker = RowMaker(CPU, "a test", "run", synthetic=True)


def make_row(
    case=None, provider=OURS, us=10.0, suite="hidden-sizes", kind="timing", status="ok", execution="eager", **changes
):
    """A synthetic row: a timing of `us` microseconds a call."""
    case = case or Case("H64", 64, 8, 16, **IEEE)
    measured = {}
    if kind in ("timing", "anchor", "overhead") and status == "ok":
        samples = timing.Samples(1, [us * (1 + 0.001 * k) for k in range(-5, 6)], [us] * 11)
        measured["timing"] = rows.Timing.of(samples, case.length, "a clock")
    reason = changes.pop("reason", None if status == "ok" else "a reason")
    row = maker.make(Task(suite, case, kind), provider, execution, status, reason, state={}, **measured)
    return dataclasses.replace(row, **changes)


class FakeClock:
    """Calls once, and says that this took 2 us on the device and 3 us by the host's clock."""

    name, l2, sample_seconds = "fake", None, 1e-9

    def sample(self, call, n):
        call()
        return 2.0, 3.0


def run(task, names):
    """The rows of a task by provider, and by "<provider> graph"."""
    found, pairs = [], [(name, execution) for name in names for execution in task.executions]
    measuring.measure(task, measuring.Context(maker, FakeClock(), seconds=0.0), found.append, pairs)
    assert sorted(row.pair for row in found) == sorted(pairs), "one row for each"
    assert [rows.decode(row.encode().encode()) for row in found] == found
    return {row.provider + " graph" * (row.execution == "graph"): row for row in found}


def faulty(problem, fault, at=range(1, 1000)):
    """A provider: torch.nn.LSTM with `fault` applied to its output in the calls of these numbers."""
    model, number = providers.torchs_lstm(problem), itertools.count(1)
    right = model.run

    def run(x, state):
        y, state = right(x, state)
        return fault(y) if next(number) in at else y, state

    model.run = run
    return model


def options(folder, **changes):
    given = dict(device="cpu", command="a test", seconds=0.001, threads=1, provider=(OURS, CUDNN), anchors=False)
    options = cli.make_parser().parse_args([])
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
    runner = running.Runner(options(folder, **changes), running.Progress(len(tasks)), new_worker)
    runner.run(tasks)
    return runner


def rows_of(folder):
    found, problems = rows.read_all([folder])
    assert not problems
    return found


def small(*sizes, **changes):
    return [Task("batch", Case("a", H, 2, 3, **IEEE, **changes)) for H in sizes]


class Page(html.parser.HTMLParser):
    """A page taken apart: its tags, its text, and what a browser would fetch. Its tags must be closed, its ids unique, and its
    links within the page must lead somewhere."""

    VOID = ("meta", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.fetched, self._open, self._ids = [], "", set(), [], []
        self.feed(text)
        self.close()
        assert self._open == [] and len(set(self._ids)) == len(self._ids)
        self.fetched -= {f"#{name}" for name in self._ids}
        assert not [link for link in self.fetched if link.startswith("#")]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open += [tag] * (tag not in self.VOID)
        self._ids += [value for name, value in attributes if name == "id"]
        self.fetched |= {value for name, value in attributes if name in ("src", "href", "xlink:href", "data")}

    def handle_endtag(self, tag):
        assert tag in self.VOID or self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
