"""LSTM cell problems: drawing them, and running them through the kernels, through torch, and in float64."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lstm_triton import functional, reference

from . import tolerance
from .extended import Extended

INPUTS = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")
RESULTS = ("h", "c", *(f"d{name}" for name in INPUTS))


@dataclass(frozen=True)
class Problem:
    """Inputs in the order of INPUTS (None where there is none) and the cotangents of h and c."""

    inputs: tuple[Tensor | None, ...]
    cotangents: tuple[Tensor, Tensor]
    precision: str = "ieee"

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype


def draw(
    B: int,
    I: int,
    H: int,
    dtype: torch.dtype = torch.float32,
    *,
    precision: str = "ieee",
    scale: float = 1.0,
    biases: tuple[bool, bool] = (True, True),
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """A random problem; with scale 4 most gates are saturated and c reaches beyond 45, with a small one all values are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)

    w = 1 / math.sqrt(max(H, 1))
    c = normal(B, H, size=scale)
    if scale > 1 and c.numel():
        c.view(-1)[:: max(1, c.numel() // 5)] *= 45
    inputs = [normal(B, I, size=scale), normal(B, H, size=scale), c]
    inputs += [normal(4 * H, I, size=w), normal(4 * H, H, size=w)]
    inputs += [normal(4 * H, size=w * min(scale, 1)) if wanted else None for wanted in biases]
    return Problem(tuple(inputs), (normal(B, H), normal(B, H)), precision)


def by_kernels(problem: Problem) -> list[Tensor | None]:
    """h, c and the gradient of every input, in the order of RESULTS."""

    def cell(x, h, c, *weights):
        return functional.lstm_cell(x, (h, c), *weights, precision=problem.precision, backend="triton")

    return with_gradients(cell, problem.inputs, problem.cotangents)


def by_torch(problem: Problem) -> list[Tensor | None]:
    """The same through torch's own cell; for TF32 in plain PyTorch with such products, as `tolerance.Tf32Products` has them."""

    def cell(x, h, c, *weights):
        return torch.lstm_cell(x, (h, c), *weights)

    with matmul_precision("ieee"):
        if problem.precision == "tf32":
            with tolerance.Tf32Products():
                return with_gradients(reference.lstm_cell, problem.inputs, problem.cotangents)
        return with_gradients(cell, problem.inputs, problem.cotangents)


def truth(problem: Problem) -> list[Tensor | Extended | None]:
    """The same in float64; for float64 problems in more."""
    has_bias = [b is not None for b in problem.inputs[5:]]
    if problem.dtype == torch.float64:
        inputs = [Extended.of(t) for t in problem.inputs]
        dh, dc = (Extended.of(t) for t in problem.cotangents)
    else:
        inputs = [None if t is None else t.detach().cpu().double() for t in problem.inputs]
        dh, dc = (t.cpu().double() for t in problem.cotangents)
    h, c = reference.lstm_cell(*inputs)
    *gradients, db = reference.lstm_cell_backward((dh, dc), *inputs)
    return [h, c, *gradients, *(db if has else None for has in has_bias)]


def assert_as_accurate_as_torch(
    results: list[Tensor | None], problem: Problem, names: tuple[str, ...] = RESULTS
) -> None:
    """Judge results in the order of RESULTS (those in `names`) by the rule of `tolerance`."""
    torchs: dict[str, list[tolerance.Errors]] = {name: [] for name in names}
    tensors = (*problem.inputs, *problem.cotangents)
    for moved in tolerance.neighbours(tensors):
        neighbour = Problem(tuple(moved[:7]), tuple(moved[7:]), problem.precision)
        for name, result, true in zip(RESULTS, by_torch(neighbour), truth(neighbour)):
            if name in names and true is not None:
                torchs[name].append(tolerance.errors(result, true))
    for name, result, true in zip(RESULTS, results, truth(problem)):
        if name in names:
            assert (result is None) == (true is None), name
            if true is not None:
                assert result.dtype == problem.dtype, name
                tolerance.assert_as_accurate(result, true, tolerance.worst(torchs[name]), name)


def with_gradients(cell, inputs, cotangents) -> list[Tensor | None]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    h, c = cell(*leaves)
    found = iter(torch.autograd.grad((h, c), [t for t in leaves if t is not None], cotangents))
    return [h.detach(), c.detach(), *(None if t is None else next(found) for t in leaves)]


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """torch's float32 products on a GPU in this precision."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
