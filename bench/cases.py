"""Cases: the problems that are timed, with every parameter that decides them; suites of them, the most telling cases first.

suites.json says what each suite is about, and has blocks of cases, crossed from lists of the fields of a Case ("$name": the
list of that name among the sizes of the scale; tiny is for the tests of the harness). The tasks with the lowest `order` come
first, and each further value of a field comes `later` by so much. real_workloads.csv has the LSTMs that people run, each with
its source. A field of it may be a range or an estimate; `run` has the arguments of the case, or says why there is none.
"""

import csv
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

Dtype = Literal["float32", "float16", "bfloat16", "float64"]
Mode = Literal["forward", "train"]
Kind = Literal["timing", "accuracy", "memory", "overhead", "cold-start", "roof", "anchor"]
Execution = Literal["eager", "graph"]
Pair = tuple[str, Execution]  # of a provider and how it is run
DTYPES, MODES, EXECUTIONS = get_args(Dtype), get_args(Mode), get_args(Execution)
GATES = {"lstm": 4, "gru": 3}
_UNUSUAL = "form cell input_size layers bidirectional proj_size rows resets cell_states carried scale".split()
HERE = Path(__file__).parent
_DECLARED = json.loads((HERE / "suites.json").read_text(encoding="utf-8"))
SIZES: dict[str, dict[str, Any]] = _DECLARED["sizes"]  # by scale
SUITES: dict[str, str] = {name: about for name, (about, *_) in _DECLARED["suites"].items()}
_SMALLER = "made smaller than the real one, to end in time"


class UsageError(ValueError):
    """Arguments that make no sense together or here, or a file that cannot be used; the message says which and why."""


def require(rules: Mapping[str, object], kind: type[Exception] = ValueError) -> None:
    """Raise `kind` with the first of the sentences that does not hold."""
    for rule, holds in rules.items():
        if not holds:
            raise kind(rule)


@dataclass(frozen=True)
class Case:
    """One problem.

    form: "layer": a whole sequence; "cell": one step (length 1) of an LSTM cell; "loop": a sequence of which the caller sees
        every step before the next (a decoder, an environment), so that only cells can serve.
    mode: "forward": eval mode without gradients; "train": forward and backward, gradients of the input and all weights.
    rows: "padded": all batch rows have `length` steps; "packed": batch rows of different lengths in a PackedSequence;
        "lengths": the same batch rows, padded, with their lengths as an argument.
    resets: the share of (batch row, step) pairs at which a new segment starts. cell_states: c of every step is returned too.
    carried: the length is 1, and each call leaves its final state in place of its initial one, as a stream's next call needs.
    scale: standard deviation of the input (4 saturates the gates). cell: "gru": GRUs in the place of the LSTMs.
    precision: of float32 products, on every side; by default that of torch's own module: "tf32" for a layer, "ieee" for
        cells. Empty for other dtypes.
    """

    name: str
    hidden_size: int
    batch: int
    length: int
    form: Literal["layer", "cell", "loop"] = "layer"
    input_size: int = 0  # 0: the hidden size
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    dtype: Dtype = "bfloat16"
    mode: Mode = "forward"
    rows: Literal["padded", "packed", "lengths"] = "padded"
    resets: float = 0.0
    cell_states: bool = False
    carried: bool = False
    scale: float = 1.0
    precision: Literal["", "ieee", "tf32", "tf32x3"] = ""
    cell: Literal["lstm", "gru"] = "lstm"
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", self.input_size or self.hidden_size)
        usual = self.precision or ("tf32" if self.form == "layer" else "ieee")
        object.__setattr__(self, "precision", usual if self.dtype == "float32" else "")
        sizes = self.hidden_size, self.batch, self.length, self.layers, self.scale
        no_cell, no_gru = self.form != "cell", self.cell == "lstm"
        as_gru = (self.form, self.rows, self.resets, self.proj_size) == ("layer", "padded", 0, 0)
        one_call = (self.length, self.mode, self.rows) == (1, "forward", "padded")
        rules = {
            "sizes and the scale are above 0": min(sizes) > 0,
            f"no dtype is {self.dtype!r}": self.dtype in DTYPES,
            "resets are a share, from 0 to 1": 0 <= self.resets <= 1,
            "a cell is one step of one layer in one direction": no_cell or (self.length == 1 and self.is_simple),
            "a GRU is a layer, padded, without resets and projection": no_gru or as_gru,
            "a carried state is of forward calls, one step, padded": not self.carried or one_call,
        }
        require({f"case: {rule}": holds for rule, holds in rules.items()})

    directions = property(lambda self: 2 if self.bidirectional else 1)
    output_size = property(lambda self: self.proj_size or self.hidden_size)  # of y in one direction
    dtype_name = property(
        lambda self: f"{self.dtype} {self.precision}".strip()
    )  # and how float32's products are computed
    # one layer in one direction over padded batch rows, without projection
    is_simple = property(lambda c: (c.layers, c.bidirectional, c.proj_size, c.rows) == (1, False, 0, "padded"))

    def describe(self) -> str:
        """Return the sizes, whatever else is not as usual, and dtype and mode, as text."""
        said, usual = [f"H{self.hidden_size} B{self.batch} T{self.length}"], Case("", self.hidden_size, 1, 1)
        for name in _UNUSUAL:
            if (value := getattr(self, name)) != getattr(usual, name):
                said.append(value if isinstance(value, str) else name + f" {value:g}" * (value is not True))
        return " ".join([*said, self.dtype_name, self.mode]).replace("_", " ")

    def flops(self) -> float:
        """Count the floating-point operations of the matrix products, forward and (in train mode) backward."""
        H, R, P, D = self.hidden_size, self.output_size, self.proj_size, self.directions
        inputs = [self.input_size, *[R * D] * (self.layers - 1)]
        per_step = sum(2.0 * GATES[self.cell] * H * (n + R) + 2.0 * H * P for n in inputs) * D * self.batch
        return per_step * self.length * (3 if self.mode == "train" else 1)


@dataclass(frozen=True)
class Task:
    """A unit of measurement: one case by all providers that are compared, interleaved."""

    suite: str
    case: Case
    kind: Kind = "timing"
    executions: Sequence[Execution] = field(default=("eager",), compare=False)
    providers: Sequence[str] | None = field(default=None, compare=False)  # None: those worth comparing


# A case that never changes, measured again and again: what moves in it is the machine.
ANCHORS = {
    kind: Task("anchor", Case(**case), "anchor", providers=["torch"]) for kind, case in _DECLARED["anchors"].items()
}


def tasks(suites: Iterable[str], scale: str, device_type: str) -> list[Task]:
    """Return all that the suites measure, the most telling first. scale: one of SIZES. device_type: "cuda" or "cpu"; on a CPU
    there are no graphs and no TF32."""
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
    """Yield the tasks of one block: every combination of values of the axes, which are one or more fields of a case each."""
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
            task = Task("real", _shrunk(case, sizes["most flops"]), executions=EXECUTIONS[: 1 + case.carried])
            yield 1.9 + 0.3 * turns[row["domain"]], task


def _shrunk(case: Case, most: float) -> Case:
    """Halve the batch rows, then steps and units, until the case takes `most` operations at most; its note says so."""
    if case.flops() <= most:
        return case
    sizes = "batch" if case.batch > 1 else "length" if case.length > 4 else "hidden_size input_size proj_size"
    smaller: dict[str, Any] = {name: (getattr(case, name) + 1) // 2 for name in sizes.split()}
    smaller |= {} if _SMALLER in case.note else {"note": "; ".join(filter(None, (_SMALLER, case.note)))}
    return _shrunk(replace(case, **smaller), most)


@functools.cache
def workloads() -> list[tuple[dict[str, str], Case | None]]:
    """Read real_workloads.csv: its rows, each with its case, or with None where its `run` says "no: ..."."""
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
