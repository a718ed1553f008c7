"""The suites: which cases, how large, and in which order, so that a run that is cut short already tells the story.

suites.json has their sizes at each scale, the most telling first: (H, B) or (H, B, T) of hidden size, batch and length.
`grid` and `cells` are crossed; `compiled`: torch.compile, seconds for each shape, at sizes whose ranks add up to at most
this; `most_flops`: of a real workload. The scale tiny is for the tests of the harness. real_workloads.csv has the LSTMs that
people run, each with its source. A field of it may be a range or an estimate; its last column, `run`, has the arguments of the
case that is run, or says why there is none.
"""

import csv
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

from . import by_hand
from .cases import MODES, Case, Form, Task

HERE = Path(__file__).parent
SIZES = {scale: SimpleNamespace(**of) for scale, of in json.loads((HERE / "suites.json").read_text()).items()}
FORMS: tuple[Form, Form] = ("layer", "cell")  # of a loop over cells a suite has no cases
BOTH = {"executions": ("eager", "graph")}
_SMALLER = "made smaller than the real one, to end in time"
# A priority (the lowest comes first), a case and the options of its task.
Ordered = Iterator[tuple[float, Case, dict[str, Any]]]


def hidden_sizes(s: Any) -> Ordered:
    """cuDNN, these kernels, peers and the floor across hidden sizes: the headline."""
    for (rank, H), (k, dtype), mode in product(enumerate(s.hidden), enumerate(s.dtypes), MODES):
        # Everything at the first hidden size, then the first dtype throughout, then the others.
        case = Case(f"H{H}", H, s.batch, s.length, dtype=dtype, mode=mode)
        yield 1.0 if rank == 0 else 2 + 0.05 * rank + 2 * k, case, BOTH if rank < 3 else {}


def batch(s: Any) -> Ordered:
    """The heat map: hidden size by batch."""
    hidden, batches, length = s.grid
    for (i, B), (j, H), mode, (k, dtype) in product(enumerate(batches), enumerate(hidden), MODES, enumerate(s.dtypes)):
        yield 3 + 0.1 * (i + j) + 3 * k, Case(f"H{H} B{B}", H, B, length, dtype=dtype, mode=mode), {}


def length(s: Any) -> Ordered:
    """Scaling in the number of steps; the longest is past what cuDNN takes."""
    H, B, _ = s.features
    for (rank, T), mode in product(enumerate(s.lengths), MODES):
        if T <= 16384 or mode == "forward":
            yield 3.2 + 0.2 * rank, Case(f"T{T}", H, min(B, 16), T, dtype=s.dtypes[0], mode=mode), {}


def cell(s: Any) -> Ordered:
    """One step of a cell, eager and in a CUDA graph."""
    hidden, batches = s.cells
    for (i, H), (j, B), dtype, mode in product(enumerate(hidden), enumerate(batches), s.dtypes, MODES):
        first = i == j == 0 and dtype == "float32"  # what most cells run in
        names = ("lstm_triton auto", "torch.nn.LSTMCell", "torch.compile") if i + j <= s.compiled else None
        case = Case(f"H{H} B{B}", H, B, 1, form="cell", dtype=dtype, mode=mode)
        yield 1.5 if first else 3 + 0.15 * (i + j) + s.dtypes.index(dtype), case, BOTH | {"providers": names}


def step(s: Any) -> Ordered:
    """One step a call, with the state carried from call to call in place: streaming, decoding, acting."""
    for (rank, (H, B)), form in product(enumerate(s.steps), FORMS):
        yield 2.25 + 0.3 * rank, Case(f"H{H} B{B} {form}", H, B, 1, form=form, dtype="float32", carried=True), BOTH


def real(s: Any) -> Ordered:
    """The LSTMs that people run, from real_workloads.csv, taking turns between domains."""
    turns: dict[str, int] = {}
    for workload in workloads():
        turns[workload.domain] = turn = turns.get(workload.domain, -1) + 1
        if workload.case is not None:
            yield 2.2 + 0.3 * turn, _shrunk(workload.case, s.most_flops), BOTH if workload.case.carried else {}


def _shrunk(case: Case, most: float) -> Case:
    """Fewer batch rows, then fewer steps and units, until it takes at most that many operations; the note says so."""
    if case.flops() <= most:
        return case
    sizes = (
        ["batch"] if case.batch > 1 else ["length"] if case.length > 4 else ["hidden_size", "input_size", "proj_size"]
    )
    smaller: dict[str, Any] = {name: (getattr(case, name) + 1) // 2 for name in sizes}
    smaller |= {} if _SMALLER in case.note else {"note": "; ".join(filter(None, (_SMALLER, case.note)))}
    return _shrunk(replace(case, **smaller), most)


def features(s: Any) -> Ordered:
    """The cost of features: packed and lengths against padded, resets against none, stacks, both directions; and a GRU."""
    (H, B, T), more = s.features, dict[str, dict[str, Any]]()
    more |= {"padded": {}, "packed": {"rows": "packed"}, "lengths": {"rows": "lengths"}, "resets": {"resets": 0.02}}
    more |= {"two layers": {"layers": 2}, "bidirectional": {"bidirectional": True}, "projection": {"proj_size": H // 2}}
    more |= {"GRU": {"cell": "gru"}}
    for (rank, (name, options)), mode in product(enumerate(more.items()), MODES[::-1]):
        yield 2.2 + 0.1 * rank, Case(name, H, B, T, dtype="float32", mode=mode, **options), {}


def segments(s: Any) -> Ordered:
    """Lengths, resets and cell states beside the best that users can write with torch alone."""
    more: dict[str, dict[str, Any]] = {"lengths": {"rows": "lengths"}, "cell states": {"cell_states": True}}
    more |= {f"resets {share:g}": {"resets": share} for share in (0.002, 0.02, 0.1, 0.3)}
    for (rank, (H, B, T)), (name, options), mode in product(enumerate(s.segments), more.items(), MODES):
        case = Case(name, H, B, T, dtype="float32", input_size=64, mode=mode, **options)
        yield 3.4 + 0.1 * rank, case, {"providers": ("lstm_triton auto", "torch.nn.LSTM", *by_hand.PROVIDERS)}


def memory(s: Any) -> Ordered:
    """Bytes held for the backward and at the peak, with and without recomputation, of one layer and of four."""
    for (rank, (H, B, T)), layers, dtype in product(enumerate(s.memory), (1, 4), s.dtypes):
        name = f"H{H} B{B} T{T}" + (" 4 layers" if layers > 1 else "")
        case = Case(name, H, B, T, dtype=dtype, mode="train", layers=layers)
        yield 2.2 + 0.5 * rank + 0.1 * (layers > 1), case, {"kind": "memory"}


def accuracy(s: Any) -> Ordered:
    """Errors of outputs and gradients against float64."""
    precisions = (("float32", "tf32"), ("float32", "ieee"), ("bfloat16", ""), ("float16", ""))
    for (rank, (H, B, T)), scale, (dtype, precision) in product(enumerate(s.accuracy), (1.0, 4.0), precisions):
        options: dict[str, Any] = dict(dtype=dtype, precision=precision, mode="train", scale=scale)
        yield 2.1 + 0.4 * rank + 0.025 * scale, Case(f"H{H} T{T} x{scale:g}", H, B, T, **options), {"kind": "accuracy"}
        if rank == 0:
            one = Case(f"cell H{H} x{scale:g}", H, B, 1, form="cell", **options)
            yield 2.2 + 0.025 * scale, one, {"kind": "accuracy"}


def overhead(s: Any) -> Ordered:
    """Host microseconds per call, at sizes where the device has next to nothing to do."""
    for form, mode in product(FORMS, MODES):
        yield 2.15, Case(f"host time, {form}", 64, 1, 1, form=form, dtype="float32", mode=mode), {"kind": "overhead"}


def cold_start(s: Any) -> Ordered:
    """Seconds to the first result in a new process, with an empty and with a warm cache of kernels."""
    for form, T in zip(FORMS, (16, 1)):
        yield 3.5, Case(f"first call, {form}", 512, 16, T, form=form, mode="train"), {"kind": "cold-start"}


def roofs(s: Any) -> Ordered:
    """The roofs of this device: copies, matrix products, barriers."""
    yield 0.5, Case("roofs", 1, 1, 1, dtype=s.dtypes[0]), {"kind": "roof"}


_SUITES = [hidden_sizes, batch, length, cell, step, real, features, segments, memory, accuracy, overhead, cold_start]
SUITES: dict[str, Callable[[Any], Ordered]] = {s.__name__.replace("_", "-"): s for s in [*_SUITES, roofs]}


def tasks(suites: Iterable[str], scale: str, device_type: str) -> list[Task]:
    """Everything the suites measure, the most telling first.

    scale: one of SIZES. device_type: "cuda" or "cpu"; on a CPU there are no graphs and no TF32.
    """
    found: dict[Task, float] = {}
    for suite in suites:
        for priority, case, options in SUITES[suite](SIZES[scale]):
            task = Task(suite, case, **options)
            if device_type == "cpu":
                task = replace(task, executions=("eager",), case=replace(case, precision="ieee"))
            found.setdefault(task, priority)
    return sorted(found, key=lambda task: found[task])


class Workload(NamedTuple):
    """One row of real_workloads.csv; `case` is None where it cannot be run, for `reason`."""

    id: str
    domain: str
    project: str
    source: str
    case: Case | None
    reason: str = ""


@functools.cache
def workloads() -> tuple[Workload, ...]:
    """Every row of the table, in its order."""
    kinds, found = get_type_hints(Case), []
    with (HERE / "real_workloads.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            about, run = (row["id"], row["domain"], row["project"], row["source"]), row["run"]
            if run.startswith("no: "):
                found.append(Workload(*about, None, run.removeprefix("no: ")))
                continue
            given = dict(part.split("=", 1) for part in re.split(r"; (?=\w+=)", run))
            options = {n: kinds[n](text) if kinds[n] in (int, float, bool) else text for n, text in given.items()}
            found.append(Workload(*about, Case(row["id"], **options)))  # type: ignore[arg-type]
    return tuple(found)
