"""The cells besides the LSTM, by name; no triton here."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class CellEquations(NamedTuple):
    """One step of a cell, twice: in torch, and as the source of two @triton.jit functions, `cells.forward_of` and backward_of.

    step: (z0, z1, z2, z3, state before, masks) -> (h, state), of pre-activations [B, H] and a state [B, states * H] as in
        `states`; masks [n, B, H], or None for their expectations.
    states: of each unit. probabilities: with which each of the n masks is 1.
    """

    step: Callable[..., tuple[Tensor, Tensor]]
    source: str
    states: int
    probabilities: tuple[float, ...] = ()


generated: dict[str, CellEquations] = {}


def step_of(name: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`CellEquations.step`; None for the LSTM."""
    if name == "lstm":
        return None
    if name not in generated:
        raise RuntimeError(f"the cell {name!r} is not declared in this process: import the module that declares it")
    return generated[name].step


def states_of(name: str) -> int:
    """How many states of a unit the kernels carry."""
    return 1 if name == "lstm" else generated[name].states


def probabilities_of(name: str) -> tuple[float, ...]:
    """Those of the masks that each step of the cell draws in training."""
    return () if name == "lstm" else generated[name].probabilities
