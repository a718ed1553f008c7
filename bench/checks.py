"""A case as one provider computes it, its errors against float64, and when it is wrong."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lstm_triton.process import raise_if_lost
from lstm_triton.tolerance import Errors

from .cases import Case
from .problem import Problem, Provider
from .providers import MOST_CUDNN_STEPS, PROVIDERS, REFERENCE, torchs
from .rows import Error

# Bits of the mantissa that a product keeps of its operands, by how it takes them: one rounding costs 2^-bits near 1.
MANTISSA = {"float32 tf32": 11, "float32": 24, "float16": 11, "bfloat16": 8, "float64": 53}
# A provider is wrong beyond so many times torch's own error on the same problem, plus so many roundings: far from what
# rounding in another order can do, and close enough that a misplaced batch row or step cannot hide. Whether a provider is as
# accurate as torch (twice its largest error) is another question, which the table of errors answers.
TIMES_TORCH, ROUNDINGS = 8.0, 16.0
ROUNDINGS_ALONE = 64.0  # where torch itself cannot compute it


class Built:
    """A provider's model of a problem. `call` is what a user would write and what is timed.

    states: the gradients of h0 and c0 are computed too. Raises Unavailable where the provider cannot serve.
    """

    def __init__(self, provider: Provider, problem: Problem, states: bool = False) -> None:
        self.problem, self.model = problem, provider(problem)
        x, h0, c0, self.dy = (t.clone() for t in (problem.x, problem.h0, problem.c0, problem.dy))
        self.inputs, self.leaves = (x, h0, c0), dict[str, Tensor]()
        if problem.training:
            given = {"x": x, "h0": h0, "c0": c0} if states else {"x": x}
            self.leaves = {**{name: t.requires_grad_() for name, t in given.items()}, **self.model.weights}

    def forward(self) -> tuple[Tensor, ...]:
        """y, h_n, c_n."""
        x, h0, c0 = self.inputs
        y, state = self.model.run(x, (h0, c0))
        return y, *state

    def call(self) -> tuple[Tensor, ...]:
        """The forward, and in train mode the gradients of the input and every weight: zeros where y does not depend on one, as
        that of a GRU does not on c."""
        outputs = self.forward()
        if self.leaves:
            leaves, absent = list(self.leaves.values()), dict(allow_unused=True, materialize_grads=True)
            return *outputs, *torch.autograd.grad(outputs[0], leaves, self.dy, **absent)
        if self.problem.case.carried:
            for state, new in zip(self.inputs[1:], outputs[1:]):
                state.copy_(new)
        return outputs

    def results(self, call: Callable[[], Any] | None = None) -> dict[str, Tensor]:
        """What `call` returns by name, from the problem's own state: what calls with a carried state did is undone. Of the two
        biases' equal gradients only that of bias_ih is kept."""
        if self.problem.case.carried:
            for state, first in zip(self.inputs[1:], (self.problem.h0, self.problem.c0)):
                state.copy_(first)
        with torch.set_grad_enabled(self.problem.training):
            found = zip(("y", "h_n", "c_n", *(f"d{name}" for name in self.leaves)), (call or self.call)())
        return {name: t.detach() for name, t in found if not name.startswith("dbias_hh")}


@torch.no_grad()
def error(result: Tensor, true: Tensor) -> Error:
    """Largest and RMS error in units of the largest true value; infinite where the shapes differ or the result has a NaN."""
    if result.shape != true.shape:
        return Error(math.inf, math.inf)
    found = Errors.of(result.double() - true, true)
    return Error(found.largest, found.rms)


def why_wrong(case: Case, found: Mapping[str, Error], torchs: Mapping[str, Error] | None) -> str | None:
    """The worst offence in a sentence, or None. torchs: torch's own errors, if it could compute the case."""
    worst, reason = 1.0, None
    rounding = 2.0 ** -MANTISSA.get(case.dtype_name, MANTISSA[case.dtype])
    for name, e in found.items():
        own, limit, beside = torchs.get(name) if torchs else None, ROUNDINGS_ALONE * rounding, ""
        if own is not None and math.isfinite(own.max):
            limit, beside = TIMES_TORCH * own.max + ROUNDINGS * rounding, f", torch's {own.max:.1e}"
        if not e.max <= limit * worst:
            worst = e.max / limit
            reason = f"wrong: {name} is off by {e.max:.1e} of its largest true value{beside}; the limit is {limit:.1e}"
    return reason


def truth(problem: Problem) -> dict[str, Tensor]:
    """y, h_n, c_n and in train mode all gradients ("dx", "dh0", "dc0", "dweight_ih_l0", ...) in float64.

    By torch's own module, or where that cannot compute the case by this package's plain-PyTorch specification.
    """
    case = problem.case
    is_torchs = not case.resets and case.rows == "padded" and case.length <= MOST_CUDNN_STEPS
    return Built(PROVIDERS[torchs(case) if is_torchs else REFERENCE], problem.double(), states=True).results()


class Judge:
    """Compares results with the truth, and knows torch's own errors on the problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.truth, self.torchs = problem, truth(problem), dict[str, Error]()

    def ask_torch(self) -> None:
        try:
            self.torchs = self.errors(Built(PROVIDERS[torchs(self.problem.case)], self.problem, states=True))
        except Exception as failure:  # it gets a row of its own where it was asked for
            raise_if_lost(failure)

    def errors(self, built: Built, call: Callable[[], Any] | None = None) -> dict[str, Error]:
        return {name: error(result, self.truth[name]) for name, result in built.results(call).items()}

    def why_wrong(self, found: Mapping[str, Error]) -> str | None:
        return why_wrong(self.problem.case, found, self.torchs)
