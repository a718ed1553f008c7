"""The tensors of a case, the same for every provider, and what they give in float64."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lstm_triton import reference

from .cases import Case

MOST_CUDNN_STEPS = 65535
PIECE = 32768  # steps of the float64 truth at a time
Outputs = tuple[Tensor, Tensor, Tensor]  # y [T, B, D * R], h_n [L * D, B, R], c_n [L * D, B, H]


@dataclass(frozen=True)
class Problem:
    """Inputs and weights, already rounded to the case's dtype, on the device.

    weights: by torch.nn.LSTM's parameter names (a cell's too, as "weight_ih_l0"). x: [T, B, I]; h0 [L * D, B, R],
    c0 [L * D, B, H]. lengths: [B] on the CPU, longest first, or None. resets: [T, B] bool or None. dy: the cotangent of y.
    """

    case: Case
    device: torch.device
    x: Tensor
    h0: Tensor
    c0: Tensor
    weights: dict[str, Tensor]
    lengths: Tensor | None
    resets: Tensor | None
    dy: Tensor

    def from_zeros(self) -> "Problem":
        """The same problem from an initial state of zeros."""
        return replace(self, h0=torch.zeros_like(self.h0), c0=torch.zeros_like(self.c0))


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw a problem; the same for one seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=generator)).to(dtype).to(device)

    T, B, H, D = case.length, case.batch, case.hidden_size, case.directions
    bound = 1 / math.sqrt(H)
    weights = {}
    for name, shape in weight_shapes(case).items():
        weights[name] = ((2 * torch.rand(shape, generator=generator) - 1) * bound).to(dtype).to(device)
    x = draw(T, B, case.input_size, size=case.scale)
    h0, c0 = (draw(case.layers * D, B, n, size=0.5) for n in (case.output_size, H))
    lengths = None
    if case.rows != "padded":
        # From half of the steps to all, as in a batch of sentences that were sorted into buckets.
        lengths = torch.linspace(T, max(T // 2, 1), B).round().long()
    resets = torch.rand(T, B, generator=generator).lt(case.resets).to(device) if case.resets else None
    dy = draw(T, B, D * case.output_size)
    if lengths is not None:  # what lies past the end of a batch row has no gradient
        dy = dy * (torch.arange(T)[:, None] < lengths)[..., None].to(device)
    return Problem(case, device, x, h0, c0, weights, lengths, resets, dy)


def weight_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The parameters of torch.nn.LSTM of this case, in its order."""
    with torch.device("meta"):
        return {name: tuple(w.shape) for name, w in torch_lstm(case, torch.device("meta")).named_parameters()}


def torch_lstm(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> nn.LSTM:
    """A torch.nn.LSTM of the case's shape, weights as torch draws them."""
    options = dict(bidirectional=case.bidirectional, proj_size=case.proj_size, device=device, dtype=dtype)
    return nn.LSTM(case.input_size, case.hidden_size, case.layers, **options)


def results(problem: Problem, outputs: Outputs, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """y, h_n, c_n and in train mode the gradients of `leaves` ("x", "h0", "c0", weights by name), detached.

    The gradients of the two biases are equal: only that of bias_ih is kept.
    """
    found = dict(zip(("y", "h_n", "c_n"), outputs))
    if problem.case.mode == "train":
        wanted = {name: t for name, t in leaves.items() if not name.startswith("bias_hh")}
        gradients = torch.autograd.grad(outputs[0], list(wanted.values()), problem.dy.to(outputs[0].dtype))
        found |= {f"d{name}": g for name, g in zip(wanted, gradients)}
    return {name: t.detach() for name, t in found.items()}


def truth(problem: Problem) -> dict[str, Tensor]:
    """`results` of the same problem in float64: torch.nn.LSTM's, or where it cannot, the plain-PyTorch specification's."""
    case, training = problem.case, problem.case.mode == "train"
    # cuDNN takes no longer sequences, and both directions do not run in pieces; on a CPU torch has no such bound.
    in_one_piece = case.bidirectional and case.length > MOST_CUDNN_STEPS
    device = torch.device("cpu") if in_one_piece else problem.device

    def widened(t: Tensor) -> Tensor:
        return t.detach().to(device, torch.float64, copy=True)

    resets = None if problem.resets is None else problem.resets.to(device)
    weights = {name: widened(w).requires_grad_(training) for name, w in problem.weights.items()}
    x, h0, c0 = (widened(t).requires_grad_(training) for t in (problem.x, problem.h0, problem.c0))
    wide = Problem(case, device, x, h0, c0, weights, problem.lengths, resets, widened(problem.dy))
    with torch.set_grad_enabled(training):
        outputs = _by_specification(wide) if case.resets or case.rows != "padded" else _by_torch(wide)
        found = results(wide, outputs, {"x": x, "h0": h0, "c0": c0, **weights})
    return {name: t.to(problem.device) for name, t in found.items()}


def _by_torch(problem: Problem) -> Outputs:
    lstm = torch_lstm(problem.case, problem.device, torch.float64)
    states = problem.h0, problem.c0
    pieces = []
    for x in problem.x.split(problem.case.length if problem.case.bidirectional else PIECE):
        y, states = torch.func.functional_call(lstm, problem.weights, (x, states))
        pieces.append(y)
    return torch.cat(pieces), *states


def _by_specification(problem: Problem) -> Outputs:
    case, D, x, last = problem.case, problem.case.directions, problem.x, []
    lengths = None if problem.lengths is None else problem.lengths.to(problem.device)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", *(("weight_hr",) if case.proj_size else ()))
    for layer in range(case.layers):
        ends = [f"_l{layer}{direction}" for direction in ("", "_reverse")[:D]]
        weights = [[problem.weights[name + end] for name in names] for end in ends]
        rows = slice(layer * D, (layer + 1) * D)
        states = problem.h0[rows], problem.c0[rows]
        x, h_n, c_n, _ = reference.lstm_layer(x, *states, weights, problem.resets, lengths=lengths)
        last.append((h_n, c_n))
    h_n, c_n = (torch.cat(states) for states in zip(*last))
    return x, h_n, c_n
