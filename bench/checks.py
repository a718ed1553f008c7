"""A case as one provider computes it, its errors against float64, and when it is wrong."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lstm_triton.process import raise_if_lost
from lstm_triton.tolerance import Errors

from . import problem as problems
from .cases import Case
from .problem import Problem, Provider, unused
from .rows import Error

# Bits of the mantissa that a product keeps of its operands, by how it takes them: one rounding costs 2^-bits near 1.
MANTISSA = {"float32 tf32": 11, "float32": 24, "float16": 11, "bfloat16": 8, "float64": 53}
# A provider is wrong beyond so many times torch's own error on the same problem, plus so many roundings: far from what
# rounding in another order can do, and close enough that a misplaced batch row or step cannot hide. Whether a provider is as
# accurate as torch (twice its largest error) is another question, which the table of errors answers.
TIMES_TORCH, ROUNDINGS = 8.0, 16.0
ROUNDINGS_ALONE = 64.0  # where torch itself cannot compute it


class Built:
    """A provider's model of a problem. `call` is what a user would write and what is timed; `named` gives its results names.

    states: the gradients of h0 and c0 are computed too. Raises Unavailable where the provider cannot serve.
    """

    def __init__(self, provider: Provider, problem: Problem, states: bool = False) -> None:
        self.model = model = provider(problem)
        self.problem = p = problem if model.takes_initial_state else problem.from_zeros()
        self.training = p.case.mode == "train"
        self.in_step = p.case.form == "cell" and model.step is not None
        x, h0, c0, self.dy = (t[0].clone() if self.in_step else t.clone() for t in (p.x, p.h0, p.c0, p.dy))
        leaves = {"x": x.requires_grad_(self.training)} | {n: w for n, w in model.weights.items() if w.requires_grad}
        if states and self.training and model.takes_initial_state:
            leaves |= {"h0": h0.requires_grad_(), "c0": c0.requires_grad_()}
        self.inputs, self.leaves = (x, h0, c0), leaves

    def forward(self) -> tuple[Tensor, ...]:
        """y, h_n, c_n; of a cell h and c."""
        x, *state = self.inputs
        if self.in_step:
            return self.model.step(x, tuple(state))  # type: ignore
        y, state = self.model.run(x, tuple(state))  # type: ignore
        return y, *state

    def call(self) -> tuple[Tensor, ...]:
        """The forward, and in train mode the gradients of the input and every weight."""
        outputs = self.forward()
        if self.training:
            leaves, options = list(self.leaves.values()), unused(self.problem.case)
            return *outputs, *torch.autograd.grad(outputs[0], leaves, self.dy, **options)
        if self.problem.case.carried:
            for state, new in zip(self.inputs[1:], outputs[-2:]):
                state.copy_(new)
        return outputs

    def named(self, returned: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Name what `call` returned, shaped as in Problem; of the two biases' equal gradients only that of bias_ih is kept."""
        if self.in_step:  # a cell's h_n is its y
            returned = returned[0][None], *returned
        p, convert = self.problem, self.model.to_torch_gradient
        found = {"y": returned[0], "h_n": returned[1].reshape(p.h0.shape), "c_n": returned[2].reshape(p.c0.shape)}
        shapes = {"x": p.x.shape, "h0": p.h0.shape, "c0": p.c0.shape}
        for name, gradient in zip(self.leaves, returned[3:]):
            if not name.startswith("bias_hh"):
                gradient = gradient.reshape(shapes.get(name, gradient.shape))
                found[f"d{name}"] = convert[name](gradient) if name in convert else gradient
        return {name: t.detach() for name, t in found.items()}

    def results(self, call: Callable[[], Any] | None = None) -> dict[str, Tensor]:
        """The results of `call` by name, from the problem's own state: what calls with a carried state did is undone."""
        if self.problem.case.carried:
            for state, first in zip(self.inputs[1:], (self.problem.h0, self.problem.c0)):
                state.copy_(first.view_as(state))
        with torch.set_grad_enabled(self.training):
            return self.named((call or self.call)())


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


class Judge:
    """Compares results with the truth, and knows torch's own errors on the problem. torchs: the provider of those."""

    def __init__(self, problem: Problem, torchs: Provider) -> None:
        self.problem, self._torchs = problem, torchs
        self.truth: dict[bool, Mapping[str, Tensor]] = {True: problems.truth(problem)}
        self.torchs: dict[str, Error] | None = None

    def ask_torch(self) -> None:
        try:
            self.torchs = self.errors(Built(self._torchs, self.problem, states=True))
        except Exception as failure:  # it gets a row of its own where it was asked for
            raise_if_lost(failure)

    def errors(self, built: Built, call: Callable[[], Any] | None = None) -> dict[str, Error]:
        with_state = built.model.takes_initial_state
        if with_state not in self.truth:
            self.truth[with_state] = problems.truth(built.problem)
        return {name: error(result, self.truth[with_state][name]) for name, result in built.results(call).items()}

    def why_wrong(self, found: Mapping[str, Error]) -> str | None:
        return why_wrong(self.problem.case, found, self.torchs)
