"""The cells besides the LSTM, by name. This module needs no triton."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class CellEquations(NamedTuple):
    """One step of a cell, in torch and as the source of two @triton.jit functions, `cells.forward_of` and `cells.backward_of`.

    step: (z0, z1, z2, z3, state before, masks) -> (h, state), of pre-activations [B, H] and a state [B, states * H] as in
        `interleave`; masks [n, B, H], or None for their expectations.
    states: the number of states per unit. probabilities: that each of the n masks is 1.
    """

    step: Callable[..., tuple[Tensor, Tensor]]
    source: str
    states: int
    probabilities: tuple[float, ...] = ()


generated: dict[str, CellEquations] = {}


def step_of(name: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return `CellEquations.step` of the cell of this name; None for the LSTM.

    Raises RuntimeError if no cell of this name is declared in this process.
    """
    if name == "lstm":
        return None
    if name not in generated:
        raise RuntimeError(f"the cell {name!r} is not declared in this process: import the module that declares it")
    return generated[name].step


def states_of(name: str) -> int:
    """Return the number of states per unit that the kernels carry."""
    return 1 if name == "lstm" else generated[name].states


def probabilities_of(name: str) -> tuple[float, ...]:
    """Return the probabilities of the masks that each step of the cell draws in training."""
    return () if name == "lstm" else generated[name].probabilities
