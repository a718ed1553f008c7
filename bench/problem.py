"""The tensors of a case, the same for every provider, what they give in float64, torch's precision for the case; and a model of
it, which a provider makes."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton.kernels.device import fp32_precision

from .cases import Case

MOST_CUDNN_STEPS = 65535
PIECE = 32768  # steps of the float64 truth at a time
State = tuple[Tensor, Tensor]  # h [L * D, B, R], c [L * D, B, H]; of one step [B, H] each
Run = Callable[[Tensor, State], tuple[Tensor, State]]
_BACKENDS: Any = torch.backends


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
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, case.dtype)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, generator=generator)).to(dtype).to(device)

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
    return Problem(case, device, x, h0, c0, weights, lengths, resets, dy)


def torch_lstm(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> nn.LSTM | nn.GRU:
    """A torch.nn.LSTM of the case's shape, or a GRU that takes its arguments, weights as torch draws them."""
    options: dict[str, Any] = dict(bidirectional=case.bidirectional, device=device, dtype=dtype)
    options |= {} if case.cell == "gru" else dict(proj_size=case.proj_size)
    module: Any = with_pair(nn.GRU) if case.cell == "gru" else nn.LSTM
    return module(case.input_size, case.hidden_size, case.layers, **options)


def with_pair(gru: Any) -> Any:
    """A class of GRUs that takes and returns (h, c), as an LSTM does; c goes through."""

    class Pair(gru):
        def forward(self, x: Tensor, state: State, **options: Any) -> tuple[Tensor, State]:
            y, h = super().forward(x, state[0], **options)
            return y, (h, state[1])

    return Pair


def unused(case: Case) -> dict[str, bool]:
    """Options of torch.autograd.grad: no output of a GRU depends on c."""
    return dict.fromkeys(("allow_unused", "materialize_grads"), True) if case.cell == "gru" else {}


def truth(problem: Problem) -> dict[str, Tensor]:
    """y, h_n, c_n and in train mode the gradients ("dx", "dh0", "dc0", "dweight_ih_l0", ...) in float64, detached.

    By torch.nn.LSTM, or with resets or lengths by this package's plain-PyTorch specification. The gradients of the two biases
    are equal: only that of bias_ih is kept.
    """
    case, training = problem.case, problem.case.mode == "train"
    specified = bool(case.resets) or case.rows != "padded"
    # cuDNN takes no longer sequences, and both directions do not run in pieces; on a CPU torch has no such bound.
    device = torch.device("cpu") if case.bidirectional and case.length > MOST_CUDNN_STEPS else problem.device
    leaves = {
        name: t.detach().to(device, torch.float64, copy=True).requires_grad_(training)
        for name, t in {"x": problem.x, "h0": problem.h0, "c0": problem.c0, **problem.weights}.items()
    }
    lstm, options = torch_lstm(case, device, torch.float64), {}
    if specified:
        lstm_triton.convert(lstm, backend="reference")
        segments = {"resets": problem.resets, "lengths": problem.lengths}
        options = {name: t if t is None else t.to(device) for name, t in segments.items()}
    weights, states, pieces = {name: leaves[name] for name in problem.weights}, (leaves["h0"], leaves["c0"]), []
    with torch.set_grad_enabled(training):
        for x in leaves["x"].split(case.length if specified or case.bidirectional else PIECE):
            y, states = torch.func.functional_call(lstm, weights, (x, states), options)
            pieces.append(y)
        y = torch.cat(pieces)
        found = dict(zip(("y", "h_n", "c_n"), (y, *states)))
        if training:
            kept = {name: t for name, t in leaves.items() if not name.startswith("bias_hh")}
            dy = problem.dy.to(device, torch.float64)
            gradients = torch.autograd.grad(y, list(kept.values()), dy, **unused(case))
            found |= {f"d{name}": g for name, g in zip(kept, gradients)}
    return {name: t.detach().to(problem.device) for name, t in found.items()}


def set_precision(case: Case) -> None:
    """Set torch's precision of float32 products, cuDNN's and those of matrices alike, as the case has it.

    For other dtypes TF32 is left on: off, it slows cuDNN's bfloat16 down too. Matrix products are set by torch's older call,
    which sets the newer `fp32_precision` along: after the newer one alone, libraries that read the older one get an error.
    """
    ieee = case.precision in ("ieee", "tf32x3")
    torch.set_float32_matmul_precision("highest" if ieee else "high")
    _BACKENDS.cudnn.rnn.fp32_precision = "ieee" if ieee else "tf32"


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    """Within, torch's settings are those of `set_precision`."""
    with contextlib.ExitStack() as put_back:
        for setting in (_BACKENDS.cudnn.rnn, _BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul):
            put_back.enter_context(fp32_precision(setting, setting.fp32_precision))
        with contextlib.suppress(RuntimeError):  # the older and the newer setting disagree already
            put_back.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        set_precision(case)
        yield


class Unavailable(RuntimeError):
    """The provider cannot serve here; the message says why."""


@dataclass
class Model:
    """A case as one provider computes it.

    run: as torch.nn.LSTM: of x and the initial state, y and the final one. step: as torch.nn.LSTMCell, for a cell. weights: its
    parameters by torch.nn.LSTM's names; to_torch_gradient: maps a gradient to torch's layout where that differs.
    """

    run: Run
    weights: Mapping[str, Tensor]
    backend: str | None = None
    backend_reason: str | None = None
    algorithm: str | None = None
    remarks: Sequence[str] = ()
    takes_initial_state: bool = True
    step: Callable[[Tensor, State], State] | None = None
    to_torch_gradient: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


Provider = Callable[[Problem], Model]


def load(module: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """Put the problem's weights into a module or cell; returns its parameters by the layer's names."""
    known, training = problem.weights, problem.case.mode == "train"
    module.train(training).requires_grad_(training)
    parameters = {name if name in known else f"{name}_l0": p for name, p in module.named_parameters()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(known[name])
    return dict(parameters)
