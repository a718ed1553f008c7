"""`Recurrent` and `RecurrentCell`: modules for any `Cell`."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import casting, functional, lstm
from ..dispatch import Call, Choice, choose_cell, choose_layer, environment
from ..kernels.inputs import Direction
from ..modules import check_options, is_proxy, leaf, options_repr
from .declaration import Cell

States = Tensor | tuple[Tensor, ...]


def _refuse_torchscript(module: torch.nn.Module) -> torch.nn.Module:
    raise NotImplementedError(
        f"TorchScript cannot compile {type(module).__name__}: use torch.jit.trace or torch.export;"
        " to_torch(model) gives torch.nn.GRU back"
    )


class Recurrent(torch.nn.RNNBase):
    """Recurrent layers of a cell of your own, as `LSTM` has for the LSTM.

    On NVIDIA GPUs the kernels of the LSTM run it, with equations generated from the cell's function; on a CPU, and for
    backend="reference", the function itself runs.

    Args:
        cell: a `Cell`, with G gates.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.LSTM.
            Parameters have torch.nn.LSTM's names and initial values, with G blocks of H rows, one for each gate in the cell's
            order. The cell's parameter a is `weight_a_l0` [H] in layer 0, and `weight_a_l0_reverse` in its reverse direction.
        precision, backend, recompute: as in `LSTM`.

    Inputs:
        input, resets, lengths: as in `LSTM`.
        hx, reset_state: (h, c) for a cell with a state c, (h, c, n) for one with c and n; h for one without. Shapes are those
            of `LSTM`.
        return_states: also return the state of every step of the last layer; h where the cell has no other state.

    Outputs: output [T, B, D * H], hx after the last step, and with return_states a tensor shaped like output, or a tuple of
    these for a cell with several states.

    Raises as `LSTM` does; TypeError if cell is not a `Cell`.
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
        # torch.nn.RNNBase has no other number of gates: take its parameters' names and widths, on meta.
        super().__init__("LSTM", *sizes, device="meta", dtype=dtype)
        self.cell, self.precision, self.backend, self.recompute = cell, precision, backend, recompute
        for name, p in list(self.named_parameters()):
            shape = (p.shape[0] // 4 * len(cell.gates), *p.shape[1:])
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        for name in self._names_of_units():
            setattr(self, name, torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)))
        self._init_flat_weights()
        self.reset_parameters()

    def _names_of_units(self) -> list[str]:
        """Return the names of the parameters [H], in the order of layers, directions and the cell's parameters."""
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        places = itertools.product(range(self.num_layers), suffixes, self.cell.parameters)
        return [f"weight_{name}_l{layer}{suffix}" for layer, suffix, name in places]

    def unit_parameters(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names_of_units()]

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        if isinstance(hidden, Tensor):
            return torch.nn.RNNBase.check_forward_args(self, input, hidden, batch_sizes)
        for state in self.cell.separate(hidden[1]):
            torch.nn.LSTM.check_forward_args(self, input, (hidden[0], state), batch_sizes)  # type: ignore[arg-type]

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        return _base(hx).permute_hidden(self, hx, permutation)

    def flatten_parameters(self) -> None:
        """Do nothing: only cuDNN needs flat parameters, and it has no such cell."""

    def extra_repr(self) -> str:
        text = f"{self.cell}, {super().extra_repr()}" + options_repr(self)
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
            reset_state=_both(self.cell, reset_state, self.hidden_size),
            lengths=lengths,
            return_cell_states=return_states,
        )
        h, last = hidden
        every = [_separate(self.cell, t) for t in states]
        return output, (h, *self.cell.separate(last)) if self.cell.states else h, *every

    def choice(self, device: torch.device, dtype: torch.dtype, plain: bool) -> Choice:
        """Return the backend for a call on such tensors, and why. plain: without resets, lengths and states of every step."""
        call = Call(False, False, self.precision)
        return _reason(choose_layer(self.backend, device.type, dtype, environment(device), call))

    __prepare_scriptable__ = _refuse_torchscript


class RecurrentCell(torch.nn.RNNCellBase):
    """One step of a cell of your own, as `LSTMCell` has for the LSTM.

    Args:
        cell: a `Cell`, with G gates.
        input_size, hidden_size, bias, device, dtype: as in torch.nn.LSTMCell, with a block of H rows for each gate.
        precision, backend: as in `LSTMCell`.

    Inputs: input [B, I] or [I]; hx: (h, c), or h for a cell without another state, each [B, H] or [H]; zeros when None.
    The cell's parameter a is `weight_a` [H].
    Outputs: hx after the step, of the same shapes. Twice differentiable.

    Raises as `LSTMCell` does; TypeError if cell is not a `Cell`.
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
        for name in cell.parameters:
            setattr(self, f"weight_{name}", torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)))
        if cell.parameters:
            self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.cell}, {super().extra_repr()}" + options_repr(self)

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        if is_proxy(input):
            return leaf(self, input, hx)
        given = _both(self.cell, hx)
        states = {"hidden": hx} if isinstance(hx, Tensor) else {f"hx[{k}]": t for k, t in enumerate(hx or ())}
        for name, t in {"input": input, **states}.items():
            if t.dim() not in (1, 2):
                raise ValueError(f"{type(self).__name__}: Expected {name} to be 1D or 2D, got {t.dim()}D instead")
        pair = self._zeros(input) if given is None else given
        weights = self.cell.placed(Direction(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))
        batched = functional.cell_inputs(input, pair, *weights[:4])
        for state in self.cell.separate(batched.c):
            functional.check_cell(batched._replace(c=state), dtypes=False)
        of_units = [getattr(self, f"weight_{name}") for name in self.cell.parameters]
        batched = batched._replace(c=self.cell.carry(batched.h, batched.c, of_units))
        draws = bool(self.cell.masks) and self.training
        h, carried = functional.step(batched, self.precision, self.backend, self.cell.key, draws)
        after = [h, *self.cell.separate(self.cell.kept(carried))]
        if input.dim() == 1:
            after = [state.squeeze(0) for state in after]
        return tuple(after) if self.cell.states else after[0]

    def _zeros(self, input: Tensor) -> tuple[Tensor, Tensor]:
        h = input.new_zeros(*input.shape[:-1], self.hidden_size)
        return h, self.cell.stacked([h] * max(len(self.cell.states), 1))

    def choice(self, device: torch.device, dtype: torch.dtype, plain: bool) -> Choice:
        """Return the backend for a call, as `Recurrent.choice`."""
        return _reason(choose_cell(self.backend, device.type, dtype, environment(device)))

    __prepare_scriptable__ = _refuse_torchscript


def _reason(choice: Choice) -> Choice:
    """Return the choice with the reason worded for a declared cell."""
    if choice.backend in ("reference", "torch"):
        return Choice("reference", "the cell's own function, in torch")
    return Choice(choice.backend, "the LSTM's kernels with the cell's equations, not yet measured on a GPU")


def _check_cell(cell: object) -> None:
    if not isinstance(cell, Cell):
        raise TypeError(f"cell must be a function declared by lstm_triton.cell, got {type(cell).__name__}")


def _separate(cell: Cell, states: Any) -> Any:
    """Separate the states of every step: one tensor, or a tuple of several."""
    found: tuple
    if isinstance(states, PackedSequence):
        found = tuple(states._replace(data=t) for t in cell.separate(states.data))
    else:
        found = tuple(cell.separate(states))
    return found[0] if len(found) == 1 else found


def _base(hx: Any) -> Any:
    """Return torch's class that checks this state: RNNBase for h alone, LSTM for h and another."""
    return torch.nn.RNNBase if isinstance(hx, Tensor) else torch.nn.LSTM


def _both(cell: Cell, hx: Any, hidden_size: int | None = None) -> Any:
    """Return h and the other states as `Cell.stacked`; h itself where the cell has no other state.

    hidden_size: H, for states that are broadcast.
    """
    if hx is None:
        return None
    if cell.states:
        n, names = len(cell.states), ", ".join(cell.states)
        if isinstance(hx, Tensor) or len(hx) != n + 1 or not all(isinstance(t, Tensor) for t in hx):
            number = {1: "two", 2: "three", 3: "four"}.get(n, str(n + 1))
            of = f"a state {names}" if n == 1 else f"states {names}"
            raise TypeError(f"{cell.name} has {of}: hx must be a tuple of {number} Tensors (h, {names})")
        h, *states = hx
        if n == 1:
            return hx
        if hidden_size is not None:
            states = [t.expand(*t.shape[:-1], hidden_size) if t.dim() else t.expand(hidden_size) for t in states]
            states = list(torch.broadcast_tensors(*states))
        for name, t in zip(cell.states[1:], states[1:]):
            if t.shape != states[0].shape:
                raise RuntimeError(
                    f"the states {cell.states[0]} and {name} must have the same size, got {list(states[0].shape)}"
                    f" and {list(t.shape)}"
                )
            casting.check_alike(cell.states[0], states[0], [(name, t)])
        return h, cell.stacked(states)
    if not isinstance(hx, Tensor):
        raise TypeError(f"{cell.name} has no state besides h: it must be a Tensor, not {type(hx).__name__}")
    return hx, hx
