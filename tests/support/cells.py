"""LSTM cell problems: drawing them, and running them through the kernels, through torch, and in float64."""

import math

import torch
from torch import Tensor

from lstm_triton import functional, reference

from . import tolerance
from .extended import Extended
from .problems import Problem, judge, normal_from

INPUTS = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")
RESULTS = ("h", "c", *(f"d{name}" for name in INPUTS))


def draw(
    B: int,
    I: int,
    H: int,
    dtype: torch.dtype = torch.float32,
    *,
    precision: str | None = "ieee",
    scale: float = 1.0,
    biases: tuple[bool, bool] = (True, True),
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """A random problem; with scale 4 most gates are saturated and c reaches beyond 45, with a small one all values are."""
    normal = normal_from(torch.Generator().manual_seed(seed), dtype, device)
    w = 1 / math.sqrt(max(H, 1))
    c = normal(B, H, size=scale)
    if scale > 1 and c.numel():
        c.view(-1)[:: max(1, c.numel() // 5)] *= 45
    inputs = [normal(B, I, size=scale), normal(B, H, size=scale), c]
    inputs += [normal(4 * H, I, size=w), normal(4 * H, H, size=w)]
    inputs += [normal(4 * H, size=w * min(scale, 1)) if wanted else None for wanted in biases]
    return Problem(tuple(inputs), (normal(B, H), normal(B, H)), RESULTS, precision)


def by_kernels(problem: Problem) -> list[Tensor | None]:
    """h, c and the gradient of every input, in the order of RESULTS."""

    def cell(x, h, c, *weights):
        return functional.lstm_cell(x, (h, c), *weights, precision=problem.precision, backend="triton")

    return problem.run(cell)


def by_torch(problem: Problem) -> list[Tensor | None]:
    """The same through torch's own cell; for TF32 in plain PyTorch with such products, as `tolerance.Tf32Products` has them."""
    with tolerance.torchs_products(problem.precision):
        if problem.precision == "tf32":
            return problem.run(reference.lstm_cell)
        return problem.run(lambda x, h, c, *weights: torch.lstm_cell(x, (h, c), *weights))


def truth(problem: Problem) -> list[Tensor | Extended | None]:
    """The same in float64; for float64 problems in more."""
    *inputs, dh, dc = problem.wide()
    h, c = reference.lstm_cell(*inputs)
    *gradients, db = reference.lstm_cell_backward((dh, dc), *inputs)
    return [h, c, *gradients, *(None if b is None else db for b in inputs[5:])]


def assert_as_accurate_as_torch(results: list[Tensor | None], problem: Problem) -> None:
    """Judge results in the order of RESULTS by the rule of `tolerance`."""
    by, true = (lambda tensors, f=f: f(problem.with_tensors(tensors)) for f in (by_torch, truth))
    judge(results, RESULTS, problem.tensors, by, true)
