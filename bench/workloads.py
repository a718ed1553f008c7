"""The LSTMs that people run (real_workloads.csv, each with its source), as cases.

A field of the table may be a range or an estimate; its last column, `run`, names what is run, or why a row is not.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from .cases import Case

TABLE = Path(__file__).with_name("real_workloads.csv")
RESETS = 0.02  # the share of steps that begin an episode, where the table gives none: one in 50
_SIZES = {"input_size": "input_size", "hidden_size": "hidden_size", "layers": "layers", "B": "batch", "T": "length"}
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "AMP": "float16"}


@dataclass(frozen=True)
class Workload:
    """One row of the table; `case` is None where it cannot be run, for `reason`."""

    id: str
    domain: str
    project: str
    source: str
    case: Case | None
    reason: str = ""


def load(path: Path = TABLE) -> list[Workload]:
    """Every row of the table, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        return [_workload(row) for row in csv.DictReader(file)]


def _workload(row: Mapping[str, str]) -> Workload:
    about = row["id"], row["domain"], row["project"], row["source"]
    if row["run"].startswith("no: "):
        return Workload(*about, None, row["run"].removeprefix("no: "))
    options: dict[str, Any] = {name: int(row[field]) for field, name in _SIZES.items() if row[field].isdigit()}
    options |= {
        "form": "cell" if row["kind"].startswith("cell") else "layer",
        "mode": "train" if "bwd" in row["kind"] else "forward",
        "rows": "packed" if row["kind"].startswith("packed fwd") else "padded",
        "dtype": next(_DTYPES[word] for word in re.findall(r"fp32|fp16|bf16|AMP", row["dtype"])),
        "bidirectional": row["bidir"] == "1",
        "proj_size": int(row["proj"]),
    }
    options |= _options(row["run"])
    options["carried"] = options["length"] == 1 and options["mode"] == "forward"
    # A loop over single steps that only clears states is what a layer with resets replaces.
    resets = options["form"] == "layer" and options["length"] > 1 and re.search("reset|done", row["extras"])
    return Workload(*about, Case(row["id"], **{"resets": RESETS if resets else 0.0} | options))


def _options(text: str) -> dict[str, Any]:
    """ "batch=8; dtype=float32" as arguments of Case."""
    pairs = (part.split("=", 1) for part in re.split(r"; (?=\w+=)", text) if part)
    hints = get_type_hints(Case)
    return {name: hints[name](value) if hints[name] in (int, float) else value for name, value in pairs}
