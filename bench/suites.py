"""The suites: which cases, how large, and in which order, so that a run that is cut short already tells the story.

suites.json declares them: what each is about, and blocks of cases, crossed from lists of the fields of a Case ("$name": the
list of that name among the sizes of the scale; tiny is for the tests of the harness). The tasks with the lowest `order` come
first, and each further value of a field comes `later` by so much. real_workloads.csv has the LSTMs that people run, each with
its source. A field of it may be a range or an estimate; its last column, `run`, has the arguments of the case that is run, or
says why there is none.
"""

import csv
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

from .cases import Case, Execution, Task

HERE = Path(__file__).parent
_DECLARED = json.loads((HERE / "suites.json").read_text(encoding="utf-8"))
SIZES: dict[str, dict[str, Any]] = _DECLARED["sizes"]  # by scale
SUITES: dict[str, str] = {name: about for name, (about, *_) in _DECLARED["suites"].items()}
_SMALLER = "made smaller than the real one, to end in time"


def tasks(suites: Iterable[str], scale: str, device_type: str) -> list[Task]:
    """Everything the suites measure, the most telling first.

    scale: one of SIZES. device_type: "cuda" or "cpu"; on a CPU there are no graphs and no TF32.
    """
    found: dict[Task, tuple[float, Task]] = {}
    for suite in suites:
        sizes, blocks = SIZES[scale], _DECLARED["suites"][suite][1:]
        ordered = _real(sizes) if suite == "real" else (of for block in blocks for of in _crossed(suite, sizes, block))
        for order, task in ordered:
            if device_type == "cpu":
                task = replace(task, executions=["eager"], case=replace(task.case, precision="ieee"))
            found.setdefault(task, (order, task))
    return [task for _, task in sorted(found.values(), key=lambda ordered: ordered[0])]


def _crossed(suite: str, sizes: dict[str, Any], block: dict[str, Any]) -> Iterator[tuple[float, Task]]:
    """The tasks of one block: every combination of a value for each of the axes, which are one or more fields of a case."""
    axes = [(axis, sizes[of[1:]] if isinstance(of, str) else of) for axis, of in block["cross"].items()]
    options = {name: block[name] for name in ("kind", "executions", "providers") if name in block}
    for chosen in product(*(enumerate(values) for _, values in axes)):
        case, order = dict(block.get("case", {})), block["order"]
        for (axis, _), (rank, value) in zip(axes, chosen):
            case |= zip(axis.split(), value) if " " in axis else {axis: value}
            order += rank * block.get("later", {}).get(axis, 0.0)
        case.setdefault("name", block.get("name", "").format_map(case))
        yield order, Task(suite, Case(**case), **options)


def _real(sizes: dict[str, Any]) -> Iterator[tuple[float, Task]]:
    turns = Counter[str]()
    for row, case in workloads():
        turns[row["domain"]] += 1
        if case is not None:
            executions: list[Execution] = ["eager", "graph"] if case.carried else ["eager"]
            order = 1.9 + 0.3 * turns[row["domain"]]
            yield order, Task("real", _shrunk(case, sizes["most flops"]), executions=executions)


def _shrunk(case: Case, most: float) -> Case:
    """Fewer batch rows, then fewer steps and units, until it takes at most that many operations; the note says so."""
    if case.flops() <= most:
        return case
    sizes = "batch" if case.batch > 1 else "length" if case.length > 4 else "hidden_size input_size proj_size"
    smaller: dict[str, Any] = {name: (getattr(case, name) + 1) // 2 for name in sizes.split()}
    smaller |= {} if _SMALLER in case.note else {"note": "; ".join(filter(None, (_SMALLER, case.note)))}
    return _shrunk(replace(case, **smaller), most)


@functools.cache
def workloads() -> list[tuple[dict[str, str], Case | None]]:
    """The rows of real_workloads.csv, each with its case; None where it cannot be run, and its `run` says "no: ..."."""
    kinds, found = get_type_hints(Case), list[tuple[dict[str, str], Case | None]]()
    with (HERE / "real_workloads.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            case = None
            if not row["run"].startswith("no: "):
                given = dict(part.split("=", 1) for part in re.split(r"; (?=\w+=)", row["run"]))
                options = {n: kinds[n](text) if kinds[n] in (int, float, bool) else text for n, text in given.items()}
                case = Case(row["id"], **options)  # type: ignore[arg-type]
            found.append((row, case))
    return found
