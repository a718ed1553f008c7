"""Readout problems: drawing them, and running them through the kernels, through torch, and in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lstm_triton import functional, reference

from . import tolerance
from .cells import matmul_precision
from .extended import Extended

INPUTS = ("h", "weight", "bias")
RESULTS = ("y", *(f"d{name}" for name in INPUTS))


@dataclass(frozen=True)
class Problem:
    """h [B, H], weight [V, H], bias [V] or None, and the cotangent of y [B, V]."""

    inputs: tuple[Tensor, Tensor, Tensor | None]
    cotangent: Tensor
    precision: str = "ieee"

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype


def draw(
    B: int,
    H: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    precision: str = "ieee",
    scale: float = 1.0,
    bias: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """A random problem, whose logits have a standard deviation of about 1.4 * scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)

    inputs = normal(B, H), normal(V, H, size=scale / math.sqrt(max(H, 1))), normal(V, size=scale) if bias else None
    return Problem(inputs, normal(B, V), precision)


def by_kernels(problem: Problem) -> list[Tensor | None]:
    """y and the gradient of every input, in the order of RESULTS."""

    def readout(*inputs):
        return functional.softmax_readout(*inputs, precision=problem.precision, backend="triton")

    return with_gradients(readout, problem)


def by_torch(problem: Problem) -> list[Tensor | None]:
    """The same through torch's own linear layer and softmax; for TF32 in plain PyTorch with such products."""

    def readout(h, weight, bias):
        return torch.softmax(torch.nn.functional.linear(h, weight, bias), -1)

    with matmul_precision("ieee"):
        if problem.precision == "tf32":
            with tolerance.Tf32Products():
                return with_gradients(reference.softmax_readout, problem)
        return with_gradients(readout, problem)


def truth(problem: Problem) -> list[Tensor | Extended | None]:
    """The same in float64; for float64 problems in more."""
    tensors = (*problem.inputs, problem.cotangent)
    if problem.dtype == torch.float64:
        *inputs, dy = (Extended.of(t) for t in tensors)
    else:
        *inputs, dy = (None if t is None else t.detach().cpu().double() for t in tensors)
    dh, dweight, dbias = reference.softmax_readout_backward(dy, *inputs)
    return [reference.softmax_readout(*inputs), dh, dweight, None if problem.inputs[2] is None else dbias]


def assert_as_accurate_as_torch(results: list[Tensor | None], problem: Problem) -> None:
    """Judge results in the order of RESULTS by the rule of `tolerance`."""
    torchs: dict[str, list[tolerance.Errors]] = {name: [] for name in RESULTS}
    for moved in tolerance.neighbours((*problem.inputs, problem.cotangent)):
        neighbour = Problem(tuple(moved[:3]), moved[3], problem.precision)
        for name, result, true in zip(RESULTS, by_torch(neighbour), truth(neighbour)):
            if true is not None:
                torchs[name].append(tolerance.errors(result, true))
    for name, result, true in zip(RESULTS, results, truth(problem)):
        assert (result is None) == (true is None), name
        if true is not None:
            assert result.dtype == problem.dtype, name
            tolerance.assert_as_accurate(result, true, tolerance.worst(torchs[name]), name)


def with_gradients(readout, problem: Problem) -> list[Tensor | None]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in problem.inputs]
    y = readout(*leaves)
    found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], problem.cotangent))
    return [y.detach(), *(None if t is None else next(found) for t in leaves)]
