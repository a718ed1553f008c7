"""Cases: the problems that are timed, each with every parameter that decides it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

FORMS = ("layer", "cell", "loop")
MODES = ("forward", "train")
DTYPES = ("float32", "float16", "bfloat16", "float64")
ROWS = ("padded", "packed", "lengths")
PRECISIONS = ("", "ieee", "tf32", "tf32x3")


@dataclass(frozen=True)
class Case:
    """One problem.

    form: "layer": a sequence, given whole; "cell": one step (length 1) of an LSTM cell; "loop": a sequence, of which the
        caller sees every step before the next (a decoder, an environment), so that only cells can serve.
    mode: "forward": eval mode, no gradients; "train": forward and backward, gradients of the input and all weights.
    rows: "padded": all rows have `length` steps; "packed": rows of different lengths in a PackedSequence; "lengths": the same
        rows, padded, with their lengths as an argument.
    resets: the share of (row, step) pairs at which a new segment starts.
    scale: standard deviation of the input (4 saturates the gates).
    precision: of float32 products, on every side; by default what torch's own module would take: "tf32" for a layer, "ieee" for
        cells. Empty for other dtypes.
    """

    name: str
    hidden_size: int
    batch: int
    length: int
    form: str = "layer"
    input_size: int = 0  # 0: the hidden size
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    dtype: str = "bfloat16"
    mode: str = "forward"
    rows: str = "padded"
    resets: float = 0.0
    scale: float = 1.0
    precision: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not self.input_size:
            object.__setattr__(self, "input_size", self.hidden_size)
        if self.dtype == "float32" and not self.precision:
            object.__setattr__(self, "precision", "tf32" if self.form == "layer" else "ieee")
        elif self.dtype != "float32":
            object.__setattr__(self, "precision", "")
        words = {"form": FORMS, "mode": MODES, "dtype": DTYPES, "rows": ROWS, "precision": PRECISIONS}
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name, least in (
            ("hidden_size", 1),
            ("batch", 1),
            ("length", 1),
            ("input_size", 1),
            ("layers", 1),
            ("proj_size", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, less than {least}")
        if not 0 <= self.resets <= 1 or not self.scale > 0:
            raise ValueError("resets is a share, from 0 to 1, and scale is above 0")
        if self.form == "cell" and (self.length != 1 or self.layers != 1 or self.bidirectional or self.proj_size):
            raise ValueError("a cell is one step of one layer in one direction")

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Of one direction."""
        return self.proj_size or self.hidden_size

    @property
    def dtype_name(self) -> str:
        """The dtype, and for float32 how its products are computed."""
        return f"{self.dtype} {self.precision}" if self.precision else self.dtype

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Case":
        known = {f.name for f in fields(Case)}
        return Case(**{name: value for name, value in data.items() if name in known})

    def describe(self) -> str:
        """In a few words, for people."""
        parts = [f"H{self.hidden_size}"]
        if self.input_size != self.hidden_size:
            parts.append(f"I{self.input_size}")
        parts += [f"B{self.batch}", *([f"T{self.length}"] if self.form != "cell" else ["cell"])]
        parts += [f"{self.layers} layers"] if self.layers > 1 else []
        parts += ["bidirectional"] if self.bidirectional else []
        parts += [f"proj {self.proj_size}"] if self.proj_size else []
        parts += [self.rows] if self.rows != "padded" else []
        parts += [f"resets {self.resets:g}"] if self.resets else []
        parts += ["step by step"] if self.form == "loop" else []
        parts += [f"x{self.scale:g}"] if self.scale != 1 else []
        return " ".join([*parts, self.dtype_name, self.mode])

    def flops(self) -> float:
        """Floating-point operations of the matrix products, forward and (in train mode) backward."""
        total = 0.0
        for layer in range(self.layers):
            inputs = self.input_size if layer == 0 else self.output_size * self.directions
            per_step = 2.0 * 4 * self.hidden_size * (inputs + self.output_size)
            per_step += 2.0 * self.hidden_size * self.proj_size
            total += per_step * self.directions * self.batch * self.length
        return total * (3 if self.mode == "train" else 1)


def case_key(case: Mapping[str, Any]) -> tuple:
    """What makes two cases the same problem; names and notes do not."""
    return tuple(sorted((name, value) for name, value in case.items() if name not in ("name", "note")))


def row_key(row: Mapping[str, Any]) -> tuple:
    """What makes two rows measurements of the same thing: kind, suite, name, case, provider, execution, settings."""
    return *task_key(row["kind"], row["suite"], row["case"]), row["provider"], row["execution"], settings(row)


def task_key(kind: str, suite: str, case: Mapping[str, Any]) -> tuple:
    """The part of `row_key` that all rows of a task share."""
    name = case["name"] if kind in ("roof", "overhead", "cold-start", "anchor") else ""
    return kind, suite, name, case_key(case)


def settings(row: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """What a run may set that changes its times: the state of the L2 cache, and on a CPU the number of threads."""
    return row["l2"], row["device"].get("threads")


@dataclass(frozen=True)
class Task:
    """What is measured together, because it is compared: one case, by all providers, interleaved.

    kind: as in the rows. executions: eager, and for a CUDA graph of it "graph".
    """

    suite: str
    case: Case
    kind: str = "timing"
    executions: tuple[str, ...] = ("eager",)
    providers: tuple[str, ...] | None = None  # None: those chosen for the run
    interpreter: bool = False  # kernels in Triton's interpreter: for errors only

    def with_case(self, **changes: Any) -> "Task":
        return replace(self, case=replace(self.case, **changes))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "case": self.case.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Task":
        providers = data["providers"]
        return Task(
            data["suite"], Case.from_json(data["case"]), data["kind"], tuple(data["executions"]),
            None if providers is None else tuple(providers), data["interpreter"],
        )  # fmt: skip
