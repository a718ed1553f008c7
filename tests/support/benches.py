"""What the tests of the benchmark share: made-up rows, tasks measured with a clock that counts, and runs on the CPU."""

import dataclasses
import html.parser
import time
from pathlib import Path

import torch

from lstm_triton import timing
from lstm_triton.bench import __main__ as cli
from lstm_triton.bench import measure as measuring
from lstm_triton.bench import rows
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
    reason = None if status == "ok" else "a reason"
    row = maker.make(Task(suite, case, kind), provider, execution, status, reason, state={}, **measured)
    return dataclasses.replace(row, **changes)


class FakeClock:
    """Counts what it times; each call takes as many microseconds as its turn."""

    name, l2, sample_seconds = "fake", None, 1e-9

    def __init__(self):
        self.calls = []

    def sample(self, call, n):
        call()
        self.calls.append(call)
        return 2.0, 3.0


def context():
    return measuring.Context(maker, FakeClock(), seconds=0.0)


def run(task, names=None):
    """The rows of a task by provider."""
    found = []
    measuring.measure(task, context(), found.append, names and [(n, e) for n in names for e in task.executions])
    assert [rows.decode(row.encode().encode()) for row in found] == found
    return {row.provider: row for row in found}


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
    """A page taken apart: its tags, those that are open at the end, its text, and what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.fetched, self.ids, self.links = [], [], "", [], set(), set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        self.open += [tag] * (tag not in ("meta", "link", "br"))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data"):
                self.links.add(value[1:]) if value.startswith("#") else self.fetched.append(value)
            if name == "id":
                assert value not in self.ids, f"two elements are called {value}"
                self.ids.add(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
