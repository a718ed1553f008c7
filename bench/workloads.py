"""The LSTMs that people run (real_workloads.csv, each with its source), as cases.

A field of the table may be a range or an estimate; its last column, `run`, has the arguments of the case that is run, or says
why there is none.
"""

import csv
import functools
import re
from pathlib import Path
from typing import NamedTuple, get_type_hints

from .cases import Case

TABLE = Path(__file__).with_name("real_workloads.csv")


class Workload(NamedTuple):
    """One row of the table; `case` is None where it cannot be run, for `reason`."""

    id: str
    domain: str
    project: str
    source: str
    case: Case | None
    reason: str = ""


@functools.cache
def load() -> tuple[Workload, ...]:
    """Every row of the table, in its order."""
    kinds, found = get_type_hints(Case), []
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            about, run = (row["id"], row["domain"], row["project"], row["source"]), row["run"]
            if run.startswith("no: "):
                found.append(Workload(*about, None, run.removeprefix("no: ")))
                continue
            given = dict(part.split("=", 1) for part in re.split(r"; (?=\w+=)", run))
            options = {n: kinds[n](text) if kinds[n] in (int, float, bool) else text for n, text in given.items()}
            found.append(Workload(*about, Case(row["id"], **options)))  # type: ignore[arg-type]
    return tuple(found)
