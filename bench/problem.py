"""The tensors of a case, the same for every provider; torch's precision for it; and what a provider makes of a problem."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lstm_triton.kernels.device import fp32_precision

from .cases import Case

State = tuple[Tensor, Tensor]  # h [L * D, B, R], c [L * D, B, H]; of a cell [B, H] each
Run = Callable[[Tensor, State], tuple[Tensor, State]]
_BACKENDS: Any = torch.backends


@dataclass(frozen=True)
class Problem:
    """Inputs and weights, already rounded to the case's dtype, on the device.

    weights: by torch.nn.LSTM's parameter names (a cell's too, as "weight_ih_l0"). x: [T, B, I]; h0 [L * D, B, R],
    c0 [L * D, B, H]; of a cell x [B, I], h0 and c0 [B, H]. lengths: [B] on the CPU, longest first, or None. resets: [T, B]
    bool or None. dy: the cotangent of y.
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

    @property
    def training(self) -> bool:
        return self.case.mode == "train"

    def double(self) -> "Problem":
        """The same problem in float64. Batch rows with an end are padded, and cell states are not returned."""
        rows: Any = "padded" if self.lengths is None else "lengths"
        case = replace(self.case, dtype="float64", precision="", rows=rows, cell_states=False)
        x, h0, c0, dy = (t.double() for t in (self.x, self.h0, self.c0, self.dy))
        weights = {name: w.double() for name, w in self.weights.items()}
        return replace(self, case=case, x=x, h0=h0, c0=c0, dy=dy, weights=weights)


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw a problem; the same for one seed on every device."""
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, case.dtype)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        t = (size * torch.randn(shape, generator=generator)).to(dtype).to(device)
        return t[0] if case.form == "cell" else t

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


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    """Within, torch's settings of float32 products are those of `set_precision`."""
    with contextlib.ExitStack() as put_back:
        for setting in (_BACKENDS.cudnn.rnn, _BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul):
            put_back.enter_context(fp32_precision(setting, setting.fp32_precision))
        with contextlib.suppress(RuntimeError):  # the older and the newer setting disagree already
            put_back.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        set_precision(case)
        yield


def set_precision(case: Case) -> None:
    """Set torch's precision of float32 products, cuDNN's and those of matrices alike, as the case has it.

    For other dtypes TF32 is left on: off, it slows cuDNN's bfloat16 down too. Matrix products are set by torch's older call,
    which sets the newer `fp32_precision` along: after the newer one alone, libraries that read the older one get an error.
    """
    ieee = case.precision in ("ieee", "tf32x3")
    torch.set_float32_matmul_precision("highest" if ieee else "high")
    _BACKENDS.cudnn.rnn.fp32_precision = "ieee" if ieee else "tf32"


class Unavailable(RuntimeError):
    """The provider cannot serve here; the message says why."""


@dataclass
class Model:
    """A problem as one provider computes it. run: of x and the initial state, y and the final one, shaped as in Problem.
    weights: its parameters by torch.nn.LSTM's names, in torch's layout. remarks: why this backend, and what else to know."""

    run: Run
    weights: Mapping[str, Tensor]
    backend: str | None = None
    algorithm: str | None = None
    remarks: Sequence[str] = ()


Provider = Callable[[Problem], Model]


def load(module: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """Put the problem's weights into a module or cell; returns its parameters by the layer's names."""
    known = problem.weights
    module.train(problem.training).requires_grad_(problem.training)
    parameters = {name if name in known else f"{name}_l0": p for name, p in module.named_parameters()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(known[name])
    return dict(parameters)
