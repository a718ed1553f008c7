"""Readout problems: drawing them, and running them through the kernels, through torch, and in float64."""

import math

import torch
from torch import Tensor

from lstm_triton import functional, reference

from . import tolerance
from .extended import Extended
from .problems import Problem, judge, normal_from

RESULTS = ("y", "dh", "dweight", "dbias")


def draw(
    B: int,
    H: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    precision: str | None = "ieee",
    scale: float = 1.0,
    bias: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """A random problem: h [B, H], weight [V, H], bias [V]. The standard deviation of the logits is about 1.4 * scale."""
    normal = normal_from(torch.Generator().manual_seed(seed), dtype, device)
    inputs = normal(B, H), normal(V, H, size=scale / math.sqrt(max(H, 1))), normal(V, size=scale) if bias else None
    return Problem(inputs, (normal(B, V),), RESULTS, precision)


def by_kernels(problem: Problem) -> list[Tensor | None]:
    """y and the gradient of every input, in the order of RESULTS."""

    def readout(*inputs):
        return (functional.softmax_readout(*inputs, precision=problem.precision, backend="triton"),)

    return problem.run(readout)


def by_torch(problem: Problem) -> list[Tensor | None]:
    """The same through torch's own linear layer and softmax; for TF32 in plain PyTorch with such products."""
    with tolerance.torchs_products(problem.precision):
        if problem.precision == "tf32":
            return problem.run(lambda *inputs: (reference.softmax_readout(*inputs),))
        return problem.run(lambda *inputs: (torch.softmax(torch.nn.functional.linear(*inputs), -1),))


def truth(problem: Problem) -> list[Tensor | Extended | None]:
    """The same in float64; for float64 problems in more."""
    *inputs, dy = problem.wide()
    dh, dweight, dbias = reference.softmax_readout_backward(dy, *inputs)
    return [reference.softmax_readout(*inputs), dh, dweight, None if inputs[2] is None else dbias]


def assert_as_accurate_as_torch(results: list[Tensor | None], problem: Problem) -> None:
    """Judge results in the order of RESULTS by the rule of `tolerance`."""
    by, true = (lambda tensors, f=f: f(problem.with_tensors(tensors)) for f in (by_torch, truth))
    judge(results, RESULTS, problem.tensors, by, true)
