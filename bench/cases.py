"""Cases: the problems that are timed, each with every parameter that decides it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Dtype = Literal["float32", "float16", "bfloat16", "float64"]
Form = Literal["layer", "cell", "loop"]
Mode = Literal["forward", "train"]
Kind = Literal["timing", "accuracy", "memory", "overhead", "cold-start", "roof", "anchor"]
Execution = Literal["eager", "graph"]
Pair = tuple[str, Execution]  # of a provider and how it is run
DTYPES, MODES = get_args(Dtype), get_args(Mode)
GATES = {"lstm": 4, "gru": 3}
_UNUSUAL = "form cell input_size layers bidirectional proj_size rows resets cell_states carried scale".split()


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
    scale: standard deviation of the input (4 saturates the gates).
    cell: "gru": torch.nn.GRU and lstm_triton.GRU in the place of their LSTMs.
    precision: of float32 products, on every side; by default that of torch's own module: "tf32" for a layer, "ieee" for
        cells. Empty for other dtypes.
    """

    name: str
    hidden_size: int
    batch: int
    length: int
    form: Form = "layer"
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

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """The size of y in one direction."""
        return self.proj_size or self.hidden_size

    @property
    def dtype_name(self) -> str:
        """The dtype, and for float32 how its products are computed."""
        return f"{self.dtype} {self.precision}" if self.precision else self.dtype

    @property
    def is_simple(self) -> bool:
        """Whether this is one layer in one direction over padded batch rows, without projection."""
        return self.layers == 1 and not self.bidirectional and not self.proj_size and self.rows == "padded"

    def describe(self) -> str:
        """The sizes, whatever else is not as usual, and dtype and mode."""
        said, usual = [f"H{self.hidden_size} B{self.batch} T{self.length}"], Case("", self.hidden_size, 1, 1)
        for name in _UNUSUAL:
            if (value := getattr(self, name)) != getattr(usual, name):
                said.append(value if isinstance(value, str) else name + f" {value:g}" * (value is not True))
        return " ".join([*said, self.dtype_name, self.mode]).replace("_", " ")

    def flops(self) -> float:
        """Floating-point operations of the matrix products, forward and (in train mode) backward."""
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
