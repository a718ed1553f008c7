"""A case as one provider computes it, ready to be called: with names to be checked by, and as users write it to be timed."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import problem as problems
from .cases import Case
from .problem import Problem
from .providers import Model, Provider


@dataclass
class Built:
    """A provider's model of the problem; `call` gives its results by name, to be checked.

    timed: what a user would write, without names and detours; named: what it returned, by name.
    """

    provider: str
    model: Model
    call: Callable[[], dict[str, Tensor]]
    timed: Callable[[], Any]
    named: Callable[[Any], dict[str, Tensor]]


def build(provider: Provider, problem: Problem, states: bool = False) -> Built:
    """The provider's model, and the call that is checked and timed: forward in eval mode, or forward and backward.

    states: the call that is checked also gives the gradients of h0 and c0. Raises Unavailable where the provider cannot serve.
    """
    model = provider.make(problem)
    training = problem.case.mode == "train"
    x, h0, c0 = (t.detach().clone() for t in (problem.x, problem.h0, problem.c0))
    if not model.takes_initial_state:
        h0, c0 = torch.zeros_like(h0), torch.zeros_like(c0)
    x.requires_grad_(training)
    leaves = {"x": x, **model.weights}
    if states and training and model.takes_initial_state:
        leaves |= {"h0": h0.requires_grad_(), "c0": c0.requires_grad_()}
    convert = {f"d{name}": function for name, function in model.to_torch_gradient.items()}

    def call() -> dict[str, Tensor]:
        with torch.set_grad_enabled(training):
            found = problems.results(problem, model.run(x, h0, c0), leaves)
        return {name: convert[name](t) if name in convert else t for name, t in found.items()}

    def named(returned: Any) -> dict[str, Tensor]:
        if not training:
            *y, h_n, c_n = returned  # a cell's h_n is its y
            states = dict(zip(("h_n", "c_n"), (h_n.reshape(h0.shape), c_n.reshape(c0.shape))))
            return {"y": y[0] if y else h_n[None], **states}
        gradients = {"x": returned[0].reshape(x.shape)} | dict(zip(weights, returned[1:]))
        found = {f"d{name}": t.detach() for name, t in gradients.items() if not name.startswith("bias_hh")}
        return {name: convert[name](t) if name in convert else t for name, t in found.items()}

    weights = {name: w for name, w in model.weights.items() if w.requires_grad}
    return Built(provider.name, model, call, _timed(problem, model, x, h0, c0, list(weights.values())), named)


def _timed(
    problem: Problem, model: Model, x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor]
) -> Callable[[], Any]:
    """What a user would write: the forward, and in train mode the gradients of the input and every weight."""
    if model.step is not None and problem.case.form == "cell":
        step, x_t, h, c, dh = model.step, x.detach()[0], h0[0], c0[0], problem.dy[0]
        if problem.case.mode != "train":
            return lambda: step(x_t, (h, c))
        x_t.requires_grad_()
        return lambda: torch.autograd.grad(step(x_t, (h, c))[0], [x_t, *weights], dh)
    run, dy = model.run, problem.dy
    if problem.case.mode != "train":
        return lambda: run(x, h0, c0)
    return lambda: torch.autograd.grad(run(x, h0, c0)[0], [x, *weights], dy)


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    """torch's settings of float32 products as the case wants them, for cuDNN and for matrix products alike.

    For other dtypes TF32 is left on: off, it slows cuDNN's bfloat16 down too. Matrix products are set by torch's older call,
    which sets the newer `fp32_precision` along: after the newer one alone, libraries that read the older one get an error.
    """
    wanted = "ieee" if case.precision in ("ieee", "tf32x3") else "tf32"
    backends: Any = torch.backends
    settings = (backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul)
    before = [s.fp32_precision for s in settings]
    older = None
    with contextlib.suppress(RuntimeError):  # the older and the newer setting disagree already
        older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if wanted == "ieee" else "high")
    backends.cudnn.rnn.fp32_precision = wanted
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for s, value in zip(settings, before):
            s.fp32_precision = value
