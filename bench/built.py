"""A case as one provider computes it, ready to be called, checked and timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .problem import Problem
from .providers import Provider


class Built:
    """A provider's model of a problem. `call` is what a user would write and what is timed; `named` gives its results names.

    states: the gradients of h0 and c0 are computed too. Raises Unavailable where the provider cannot serve.
    """

    def __init__(self, provider: Provider, problem: Problem, states: bool = False) -> None:
        self.model = model = provider(problem)
        self.problem = problem if model.takes_initial_state else problem.from_zeros()
        case, self.training = problem.case, problem.case.mode == "train"
        self.in_step = case.form == "cell" and model.step is not None
        tensors = (self.problem.x, self.problem.h0, self.problem.c0, problem.dy)
        x, h0, c0, self.dy = (t[0].clone() if self.in_step else t.clone() for t in tensors)
        self.state = h0, c0
        leaves = {"x": x.requires_grad_(self.training)} | {n: w for n, w in model.weights.items() if w.requires_grad}
        if states and self.training and model.takes_initial_state:
            leaves |= {"h0": h0.requires_grad_(), "c0": c0.requires_grad_()}
        self.inputs, self.leaves = (x, h0, c0), leaves

    def forward(self) -> tuple[Tensor, ...]:
        x, h0, c0 = self.inputs
        return self.model.step(x, (h0, c0)) if self.in_step else self.model.run(x, h0, c0)  # type: ignore[misc]

    def call(self) -> tuple[Tensor, ...]:
        """The forward, and in train mode the gradients of the input and every weight."""
        outputs = self.forward()
        if self.training:
            return *outputs, *torch.autograd.grad(outputs[0], list(self.leaves.values()), self.dy)
        if self.problem.case.carried:
            for state, new in zip(self.state, outputs[-2:]):
                state.copy_(new)
        return outputs

    def reset(self) -> None:
        """Undo what calls with a carried state did to it."""
        if self.problem.case.carried:
            for state, first in zip(self.state, (self.problem.h0, self.problem.c0)):
                state.copy_(first.view_as(state))

    def named(self, returned: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What `call` returned, by name and shaped as in Problem; of the two biases' equal gradients only that of bias_ih."""
        if self.in_step:  # a cell's h_n is its y
            returned = returned[0], *returned
        p, convert = self.problem, self.model.to_torch_gradient
        found = {"y": returned[0].view_as(p.dy) if self.in_step else returned[0]}
        found |= {"h_n": returned[1].reshape(p.h0.shape), "c_n": returned[2].reshape(p.c0.shape)}
        shapes = {"x": p.x.shape, "h0": p.h0.shape, "c0": p.c0.shape}
        for name, gradient in zip(self.leaves, returned[3:]):
            if not name.startswith("bias_hh"):
                gradient = gradient.reshape(shapes.get(name, gradient.shape))
                found[f"d{name}"] = convert[name](gradient) if name in convert else gradient
        return {name: t.detach() for name, t in found.items()}

    def results(self, call: Callable[[], Any] | None = None) -> dict[str, Tensor]:
        """The results of `call` by name, from the problem's own state."""
        self.reset()
        with torch.set_grad_enabled(self.training):
            return self.named((call or self.call)())
