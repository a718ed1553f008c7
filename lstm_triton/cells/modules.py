"""`Recurrent` and `RecurrentCell`: modules for any `Cell`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import functional, lstm
from ..dispatch import Call, Choice, choose_cell, choose_layer, environment
from ..kernels.inputs import Direction
from ..modules import check_options, is_proxy, leaf, options_repr
from .declaration import Cell

States = Tensor | tuple[Tensor, Tensor]


def _refuse_torchscript(module: torch.nn.Module) -> torch.nn.Module:
    raise NotImplementedError(
        f"TorchScript cannot compile {type(module).__name__}: use torch.jit.trace or torch.export;"
        " to_torch(model) gives torch.nn.GRU back"
    )


class Recurrent(torch.nn.RNNBase):
    """A recurrent layer, or several, of a cell of one's own: what `LSTM` is for the LSTM.

    On NVIDIA GPUs the kernels of the LSTM run it, with the equations generated from the cell's function; on a CPU, and for
    backend="reference", the function itself does.

    Args:
        cell: a `Cell`, with G gates.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.LSTM.
            Parameters have its names, a block of H rows for each gate in the cell's order, and its initial values.
        precision, backend, recompute: as in `LSTM`.

    Inputs:
        input, resets, lengths: as `LSTM` takes them.
        hx, reset_state: (h, c) for a cell with a state c; h for one without.
        return_states: also return every state of the last layer, of h where the cell has no other.

    Outputs: output, hx after the last step, and with return_states [T, B, D * H], shaped like output.

    Raises as `LSTM` does; TypeError for what is not a `Cell`.
    """

    _has_cell = True
    cell: Cell
    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size

    def __init__(  # noqa: PLR0913
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        precision: str | None = None,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        _check_cell(cell)
        check_options(precision, backend)
        if backend == "cudnn":
            raise ValueError(f"backend='cudnn' cannot serve: cuDNN does not know the cell {cell.name}")
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        # torch knows no other number of gates: its parameters lend their names and widths.
        super().__init__("LSTM", *sizes, device="meta", dtype=dtype)
        self.cell, self.precision, self.backend, self.recompute = cell, precision, backend, recompute
        for name, p in list(self.named_parameters()):
            shape = (p.shape[0] // 4 * len(cell.gates), *p.shape[1:])
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._init_flat_weights()
        self.reset_parameters()

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        _base(hidden).check_forward_args(self, input, hidden, batch_sizes)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        return _base(hx).permute_hidden(self, hx, permutation)

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN, which wants it, has no such cell."""

    def extra_repr(self) -> str:
        text = f"{self.cell.name}, {super().extra_repr()}" + options_repr(self)
        return text + (", recompute=True" if self.recompute else "")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        resets: Tensor | None = None,
        reset_state: States | None = None,
        lengths: Tensor | None = None,
        return_states: bool = False,
    ):
        if is_proxy(input):
            given = dict(resets=resets, reset_state=reset_state, lengths=lengths, return_states=return_states)
            return leaf(self, input, hx, **given)
        output, hidden, *states = lstm.forward(
            self,
            input,
            _both(self.cell, hx),
            resets=resets,
            reset_state=_both(self.cell, reset_state),
            lengths=lengths,
            return_cell_states=return_states,
        )
        return output, tuple(hidden) if self.cell.states else hidden[0], *states

    def choice(self, device: torch.device, dtype: torch.dtype, plain: bool) -> Choice:
        """What serves a call on such tensors, and why; plain: without resets, lengths and states."""
        call = Call(False, False, self.precision)
        return _reason(choose_layer(self.backend, device.type, dtype, environment(device), call))

    __prepare_scriptable__ = _refuse_torchscript


class RecurrentCell(torch.nn.RNNCellBase):
    """One step of a cell of one's own: what `LSTMCell` is for the LSTM.

    Args:
        cell: a `Cell`, with G gates.
        input_size, hidden_size, bias, device, dtype: as in torch.nn.LSTMCell, with a block of H rows for each gate.
        precision, backend: as in `LSTMCell`.

    Inputs: input [B, I] or [I]; hx: (h, c), or h for a cell without another state, each [B, H] or [H]; zeros when None.
    Outputs: hx after the step, shaped alike. Twice differentiable.

    Raises as `LSTMCell` does; TypeError for what is not a `Cell`.
    """

    cell: Cell

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        precision: str | None = None,
        backend: str = "auto",
    ) -> None:
        _check_cell(cell)
        check_options(precision, backend)
        super().__init__(input_size, hidden_size, bias, len(cell.gates), device, dtype)
        self.cell, self.precision, self.backend = cell, precision, backend

    def extra_repr(self) -> str:
        return f"{self.cell.name}, {super().extra_repr()}" + options_repr(self)

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        if is_proxy(input):
            return leaf(self, input, hx)
        given = _both(self.cell, hx)
        states = {"hidden": hx} if isinstance(hx, Tensor) else {f"hx[{k}]": t for k, t in enumerate(hx or ())}
        for name, t in {"input": input, **states}.items():
            if t.dim() not in (1, 2):
                raise ValueError(f"{type(self).__name__}: Expected {name} to be 1D or 2D, got {t.dim()}D instead")
        pair = (input.new_zeros(*input.shape[:-1], self.hidden_size),) * 2 if given is None else given
        weights = self.cell.placed(Direction(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))
        batched = functional.cell_inputs(input, pair, *weights[:4])
        h, state = functional.step(batched, self.precision, self.backend, self.cell.key)
        if input.dim() == 1:
            h, state = h.squeeze(0), state.squeeze(0)
        return (h, state) if self.cell.states else h

    def choice(self, device: torch.device, dtype: torch.dtype, plain: bool) -> Choice:
        """As `Recurrent.choice`."""
        return _reason(choose_cell(self.backend, device.type, dtype, environment(device)))

    __prepare_scriptable__ = _refuse_torchscript


def _reason(choice: Choice) -> Choice:
    """In the words of a cell of one's own."""
    if choice.backend in ("reference", "torch"):
        return Choice("reference", "the cell's own function, in torch")
    return Choice(choice.backend, "the LSTM's kernels with the cell's equations, not yet measured on a GPU")


def _check_cell(cell: object) -> None:
    if not isinstance(cell, Cell):
        raise TypeError(f"cell must be a function declared by lstm_triton.cell, got {type(cell).__name__}")


def _base(hx: Any) -> Any:
    """torch's class whose checks are those of this state: of h alone, or of h and another."""
    return torch.nn.RNNBase if isinstance(hx, Tensor) else torch.nn.LSTM


def _both(cell: Cell, hx: Any) -> Any:
    """h and the state that the kernels carry; where the cell has none besides h, that is h."""
    if hx is None:
        return None
    if cell.states:
        if isinstance(hx, Tensor) or len(hx) != 2 or not all(isinstance(t, Tensor) for t in hx):
            raise TypeError(
                f"{cell.name} has a state {cell.carried}: hx must be a tuple of two Tensors (h, {cell.carried})"
            )
        return hx
    if not isinstance(hx, Tensor):
        raise TypeError(f"{cell.name} has no state besides h: it must be a Tensor, not {type(hx).__name__}")
    return hx, hx
