"""The tensors of a case, the same for every provider; what a provider makes of them; its errors, and when it is wrong."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lstm_triton.kernels.device import fp32_precision
from lstm_triton.process import raise_if_lost
from lstm_triton.tolerance import Errors

from .cases import Case

State = tuple[Tensor, Tensor]  # h [L * D, B, R], c [L * D, B, H]; of a cell [B, H] each
Run = Callable[[Tensor, Any], tuple[Tensor, Any]]  # of x and the state (of a GRU h alone): y and the state after it
_BACKENDS: Any = torch.backends


@dataclass(frozen=True)
class Problem:
    """Inputs and weights, already rounded to the case's dtype, on the device. weights: by torch.nn.LSTM's parameter names (a
    cell's too, as "weight_ih_l0"). x: [T, B, I]; h0 [L * D, B, R], c0 [L * D, B, H]; of a cell x [B, I], h0 and c0 [B, H].
    lengths: [B] on the CPU, longest first, or None; ends: the same on the device. resets: [T, B] bool or None. dy: the
    cotangent of y. states: whether the gradients of h0 and c0 are computed too."""

    case: Case
    device: torch.device
    x: Tensor
    h0: Tensor
    c0: Tensor
    weights: dict[str, Tensor]
    lengths: Tensor | None
    ends: Tensor | None
    resets: Tensor | None
    dy: Tensor
    states: bool = False

    training = property(lambda self: self.case.mode == "train")

    def double(self) -> "Problem":
        """Return the same problem in float64. Batch rows with an end are padded, and cell states are not returned."""
        rows: Any = "padded" if self.lengths is None else "lengths"
        case = replace(self.case, dtype="float64", precision="", rows=rows, cell_states=False)
        tensors: Any = {name: getattr(self, name).double() for name in ("x", "h0", "c0", "dy")}
        return replace(self, case=case, weights={name: w.double() for name, w in self.weights.items()}, **tensors)


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw a problem; the same for one seed on every device."""
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, case.dtype)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        t = (size * torch.randn(shape, generator=generator)).to(dtype).to(device)
        return t[0] if case.form == "cell" else t

    T, B, H, D = case.length, case.batch, case.hidden_size, case.directions
    weights = {}
    for name, w in torch_lstm(case, torch.device("meta")).named_parameters():
        uniform = 2 * torch.rand(w.shape, generator=generator) - 1
        weights[name] = (uniform / math.sqrt(H)).to(dtype).to(device)
    x = draw(T, B, case.input_size, size=case.scale)
    h0, c0 = (draw(case.layers * D, B, n, size=0.5) for n in (case.output_size, H))
    resets = torch.rand(T, B, generator=generator).lt(case.resets).to(device) if case.resets else None
    dy, lengths = draw(T, B, D * case.output_size), None
    if case.rows != "padded":
        # From half of the steps to all, as in a batch of sentences that were sorted into buckets.
        lengths = torch.linspace(T, max(T // 2, 1), B).round().long()
        dy = dy * (torch.arange(T)[:, None] < lengths)[..., None].to(device)  # no gradient past the end of a batch row
    ends = None if lengths is None else lengths.to(device)
    return Problem(case, device, x, h0, c0, weights, lengths, ends, resets, dy)


def torch_lstm(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> nn.LSTM | nn.GRU:
    """Return a torch.nn.LSTM or GRU of the case's shape, with weights as torch draws them."""
    options: dict[str, Any] = dict(bidirectional=case.bidirectional, device=device, dtype=dtype)
    options |= {} if case.cell == "gru" else dict(proj_size=case.proj_size)
    return getattr(nn, case.cell.upper())(case.input_size, case.hidden_size, case.layers, **options)


def by_steps(
    step: Any, resets: Tensor | None, x: Tensor, state: State, lengths: Tensor | None = None, is_cell: bool = True
) -> tuple[Tensor, State]:
    """A whole sequence by a loop in Python: by a cell, whose states are [B, H], or a layer that is called with one step. The
    state is zero where a segment starts. Past the end of a batch row it stays, and y is zero."""
    outputs, (h, c) = [], (state[0][0], state[1][0]) if is_cell else state
    for t, piece in enumerate(x.unbind(0) if is_cell else x.split(1)):
        if resets is not None:
            h, c = h * ~resets[t, :, None], c * ~resets[t, :, None]
        found = step(piece, (h, c))
        y, (h_next, c_next) = (found[0], found) if is_cell else found
        if lengths is not None:
            active = (t < lengths)[:, None]
            y, h_next, c_next = y * active, torch.where(active, h_next, h), torch.where(active, c_next, c)
        outputs.append(y)
        h, c = h_next, c_next
    return (torch.stack(outputs), (h[None], c[None])) if is_cell else (torch.cat(outputs), (h, c))


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    """Within, torch's precision of float32 products, cuDNN's and those of matrices alike, is what the case has. For other
    dtypes TF32 is left on: without it torch has cuDNN multiply bfloat16 without tensor cores. Products are set by torch's
    older call, which sets the newer `fp32_precision` along: after the newer one alone, readers of the older one fail."""
    ieee = case.precision in ("ieee", "tf32x3")
    with contextlib.ExitStack() as put_back:
        for setting in (_BACKENDS.cudnn.rnn, _BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul):
            put_back.enter_context(fp32_precision(setting, setting.fp32_precision))
        with contextlib.suppress(RuntimeError):  # the older and the newer setting disagree already
            put_back.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest" if ieee else "high")
        _BACKENDS.cudnn.rnn.fp32_precision = "ieee" if ieee else "tf32"
        yield


class Unavailable(RuntimeError):
    """The provider cannot serve here; the message says why."""


def load(module: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """Put the problem's weights into a module or cell; returns its parameters by the layer's names."""
    module.train(problem.training).requires_grad_(problem.training)
    parameters: dict[str, Tensor] = {n if n in problem.weights else f"{n}_l0": p for n, p in module.named_parameters()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(problem.weights[name])
    return parameters


@dataclass
class Model:
    """A problem as one provider computes it. `call` is what a user would write and what is timed. run: of x and the initial
    state, y and the final one, shaped as in Problem. weights: its parameters by torch.nn.LSTM's names, in torch's layout.
    remarks: why this backend, and what else to know."""

    problem: Problem
    run: Run
    weights: Mapping[str, Tensor]
    backend: str | None = None
    algorithm: str | None = None
    remarks: Sequence[str] = ()

    def __post_init__(self) -> None:
        x, h0, c0, self.dy = (t.clone() for t in (self.problem.x, self.problem.h0, self.problem.c0, self.problem.dy))
        self.inputs, self.leaves = (x, h0, c0), dict[str, Tensor]()
        if self.problem.training:
            given = {"x": x, "h0": h0, "c0": c0} if self.problem.states else {"x": x}
            self.leaves = {**{name: t.requires_grad_() for name, t in given.items()}, **self.weights}

    def forward(self) -> tuple[Tensor, ...]:
        """Return y, h_n, c_n. A GRU has no c, and the initial one is its last."""
        x, h, c = self.inputs
        if self.problem.case.cell == "gru":
            return *self.run(x, h), c
        y, state = self.run(x, (h, c))
        return y, *state

    def backward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of the input and every weight: zeros where y does not depend on one, as a GRU's not on c."""
        absent = dict(allow_unused=True, materialize_grads=True)
        return torch.autograd.grad(outputs[0], list(self.leaves.values()), self.dy, **absent)

    def call(self) -> tuple[Tensor, ...]:
        """Run the forward, and in train mode the backward."""
        outputs = self.forward()
        if self.leaves:
            return *outputs, *self.backward(outputs)
        if self.problem.case.carried:
            self._set_state(outputs[1:])
        return outputs

    def results(self, call: Callable[[], Any] | None = None) -> dict[str, Tensor]:
        """Return what `call` returns, by name, from the problem's own state: what calls with a carried state did is undone.
        Of the two biases' equal gradients only that of bias_ih is kept."""
        if self.problem.case.carried:
            self._set_state((self.problem.h0, self.problem.c0))
        with torch.set_grad_enabled(self.problem.training):
            found = zip(("y", "h_n", "c_n", *(f"d{name}" for name in self.leaves)), (call or self.call)())
        return {name: t.detach() for name, t in found if not name.startswith("dbias_hh")}

    def _set_state(self, state: Sequence[Tensor]) -> None:
        for mine, new in zip(self.inputs[1:], state):
            mine.copy_(new)


Provider = Callable[[Problem], Model]
# Bits of the mantissa that a product keeps of its operands, by how it takes them: one rounding costs 2^-bits near 1.
MANTISSA = {"float32 tf32": 11, "float32": 24, "float16": 11, "bfloat16": 8, "float64": 53}
# A provider is wrong beyond so many times torch's own error on the same problem, plus so many roundings: far from what
# rounding in another order can do, and close enough that a misplaced batch row or step cannot hide. Whether a provider is as
# accurate as torch (twice its largest error) is another question, which the table of errors answers.
TIMES_TORCH, ROUNDINGS = 8.0, 16.0
ROUNDINGS_ALONE = 64.0  # where torch itself cannot compute it


class Judge:
    """Compares results with the truth: all that `true` makes of the problem in float64. torchs: torch's own errors, as far as
    it could compute the problem."""

    def __init__(self, problem: Problem, true: Provider) -> None:
        self.problem, self.torchs = problem, dict[str, Errors]()
        self.truth = true(replace(problem.double(), states=True)).results()

    def ask_torch(self, torchs: Provider) -> None:
        try:
            self.torchs = self.errors(torchs(replace(self.problem, states=True)))
        except Exception as failure:  # it gets a row of its own where it was asked for
            raise_if_lost(failure)

    def errors(self, model: Model, call: Callable[[], Any] | None = None) -> dict[str, Errors]:
        """Return errors by tensor, in units of the largest true value: infinite where shapes differ or the result has a NaN."""
        results, wrong = model.results(call), Errors(0, math.inf, math.inf)
        return {
            name: Errors.of(t.double() - true, true) if t.shape == (true := self.truth[name]).shape else wrong
            for name, t in results.items()
        }

    def why_wrong(self, found: Mapping[str, Errors]) -> str | None:
        """Return the worst offence in a sentence, or None."""
        worst, reason, case = 1.0, None, self.problem.case
        rounding = 2.0 ** -MANTISSA.get(case.dtype_name, MANTISSA[case.dtype])
        for name, e in found.items():
            own, limit, beside = self.torchs.get(name), ROUNDINGS_ALONE * rounding, ""
            if own is not None and math.isfinite(own.largest):
                limit, beside = TIMES_TORCH * own.largest + ROUNDINGS * rounding, f", torch's {own.largest:.1e}"
            if not e.largest <= limit * worst:
                worst, off = e.largest / limit, f"{name} is off by {e.largest:.1e} of its largest true value"
                reason = f"wrong: {off}{beside}; the limit is {limit:.1e}"
        return reason
