"""`cell` turns a plain torch function into a recurrent cell for the kernels.

The kernels compute four pre-activations z = x W_ih^T + h W_hh^T + b for each unit, and carry its 1, 2, 4 or 8 states unrounded
from step to step. For a cell with fewer gates the other rows of the weights are zero. If it reads the input part and the
recurrent part of a gate separately, each is a pre-activation of its own. A parameter of each unit is a state that does not
change; its gradient is that of the initial state, summed over the batch. A mask takes no memory: the kernels draw it in each
step.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ..kernels.cell_equations import CellEquations, generated
from ..kernels.inputs import Direction, Segments
from .device_functions import device_functions
from .recording import CellError, Named, PointwiseOnly, PreActivations, Recorded, line_of

PRE_ACTIVATIONS, CARRIED, MASKS = 4, 8, 3
_PARTS = ("input", "recurrent")
_RESERVED = {"h", "ih", "hh", *_PARTS}
_NO_MASKS: Mapping[str, float] = MappingProxyType({})


class PreActivation(NamedTuple):
    """A pre-activation that a kernel computes for each unit: x W_ih^T + b_ih or h W_hh^T + b_hh of a gate, or their sum."""

    gate: str
    part: str  # "sum", "input", "recurrent"


class Cell:
    """A recurrent cell: gates, states, parameters, masks, and the function of one step. `cell` makes one.

    Args:
        function: of (z, s), followed by p if there are parameters and by m if there are masks. z.f is the pre-activation
            x W_ih^T + b_ih + h W_hh^T + b_hh [B, H] of gate f; z.input.f and z.recurrent.f are its two parts. s.c is the state
            c before the step and s.h the h before it; p.a is the parameter a, m.a the mask a. It consists of pointwise
            operations and returns the new h and a dict of the new states, each [B, H].
        gates, states, parameters: their names, as a string of one-letter names or a sequence of strings. A parameter is [H].
        masks: for each name the probability with which an element is 1 and not 0. In training each step, batch row and unit
            draws anew; in evaluation mode a mask is its expectation, the probability.

    Raises:
        CellError: an operation that is not pointwise or unknown; a branch that depends on values; a missing or unknown state;
            more pre-activations, states or masks than the kernels hold. The message names the operation and its line.
    """

    def __init__(
        self,
        function: Callable,
        gates: Sequence[str],
        states: Sequence[str] = (),
        parameters: Sequence[str] = (),
        masks: Mapping[str, float] = _NO_MASKS,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function, self.name = function, getattr(function, "__name__", "cell")
        self.gates, self.states, self.parameters = tuple(gates), tuple(states), tuple(parameters)
        if not isinstance(masks, Mapping):
            raise CellError(f"{self.name}: masks are names with probabilities, such as {{'a': 0.1}}, not {masks!r}")
        self.masks = {name: float(p) for name, p in masks.items()}
        names = (*self.gates, *self.states, *self.parameters)
        if len(set(names)) < len(names) or not all(n.isidentifier() for n in names) or _RESERVED & set(names):
            raise CellError(
                f"{self.name}: gates, states and parameters need names of their own, other than {', '.join(sorted(_RESERVED))}"
            )
        if len(self.masks) > MASKS or not all(0 <= p <= 1 for p in self.masks.values()):
            raise CellError(f"{self.name}: at most {MASKS} masks, of probabilities between 0 and 1, got {self.masks}")
        self._record()
        self._derive()

    def __call__(self, z: Any, s: Any, *others: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.function(z, s, *others)

    def __reduce__(self) -> Any:
        """Pickle by name, as functions are, so that modules with a cell can be saved; else by the function's name."""
        if getattr(sys.modules.get(self.function.__module__), self.name, None) is not self.function:
            return self.__dict__["__qualname__"]
        return Cell, (self.function, self.gates, self.states, self.parameters, self.masks)

    def __deepcopy__(self, memo: dict) -> "Cell":
        return self

    def __str__(self) -> str:
        masks = ", ".join(f"{name}={p}" for name, p in self.masks.items())
        return f"{self.name}({masks})" if masks else self.name

    def __repr__(self) -> str:
        others = {name: getattr(self, name) for name in ("parameters", "masks") if getattr(self, name)}
        text = "".join(f", {name}={value}" for name, value in others.items())
        return f"cell {self.name}(gates={self.gates}, states={self.states}{text})"

    def _fail(self, what: str) -> CellError:
        return CellError(f"{self.name}: {what}")

    def _record(self) -> None:
        """Call the function once on fake tensors, to record which parts of z and s it reads and to check its operations."""
        with FakeTensorMode() as mode:
            example = mode.from_tensor(torch.zeros(2, 3))
            gates = Recorded(dict.fromkeys(self.gates, example))
            parts = {part: Recorded(gates.tensors) for part in _PARTS}
            tensors = PreActivations(gates, Named("gates", parts["input"]), Named("gates", parts["recurrent"]))
            states = Recorded(dict.fromkeys((*self.states, "h"), example))
            parameters = Recorded(dict.fromkeys(self.parameters, example))
            masks = Recorded(dict.fromkeys(self.masks, example))
            given = [Named(*kind) for kind in (("parameters", parameters), ("masks", masks)) if len(kind[1])]
            try:
                with PointwiseOnly(self._fail) as watch:
                    found = self.function(tensors, Named("states", states), *given)
            except (RuntimeError, TypeError, ValueError) as error:
                # torch's operators replace a TypeError, such as CellError, by another one.
                raise watch.refusal or self._fail(f"{line_of(error, self.function)}: {error}") from error
        self._check_results(found)
        self.pre_activations: list[PreActivation] = []
        for gate in self.gates:
            if any(gate in parts[part].used for part in _PARTS):
                self.pre_activations += [PreActivation(gate, part) for part in _PARTS]
            elif gate in gates.used:
                self.pre_activations.append(PreActivation(gate, "sum"))
            else:
                raise self._fail(f"the gate {gate!r} is not used")
        if len(self.pre_activations) > PRE_ACTIVATIONS:
            raise self._fail(f"the kernels hold {PRE_ACTIVATIONS} pre-activations, not {len(self.pre_activations)}")
        for kind, of in (("parameter", parameters), ("mask", masks)):
            if unused := [name for name in of if name not in of.used]:
                raise self._fail(f"the {kind} {unused[0]!r} is not used")
        # Where there is no other state the kernels carry h, whether the function reads it or not.
        own = [*self.states, *(["h"] if "h" in states.used or not self.states else [])]
        self.carried = (*own, *self.parameters)
        if len(self.carried) > CARRIED:
            raise self._fail(
                f"the kernels carry {CARRIED} states and parameters of a unit in registers, not {len(self.carried)}:"
                f" {', '.join(self.carried)}"
            )
        self.n_carried = 1 << (len(self.carried) - 1).bit_length()

    def _check_results(self, found: Any) -> None:
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
            raise self._fail("it must return the new h and a dict of the new states")
        h, states = found
        if missing := [name for name in self.states if name not in states]:
            raise self._fail(f"the new state {missing[0]!r} is missing")
        if unknown := [name for name in states if name not in self.states]:
            raise self._fail(f"it returns a state {unknown[0]!r}, which it does not have")
        for name, t in (("h", h), *states.items()):
            if not isinstance(t, Tensor) or t.shape != (2, 3):
                raise self._fail(f"the new {name} is not a tensor of the size of a gate")

    def step(self, *tensors: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute (h, new carried states) from the four pre-activations of a kernel, padded with zeros, and the carried states.

        masks: [n, B, H]; None for their expectations.
        """
        *pre, carried = tensors
        expected = (torch.full_like(pre[0], p) for p in self.masks.values())
        h, *states = self._step(*pre, *_split(carried, self.n_carried), *(expected if masks is None else masks))
        return h, _join(states)

    def _step(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute `step` with every state and mask as a tensor of its own."""
        of_states = slice(PRE_ACTIVATIONS, PRE_ACTIVATIONS + self.n_carried)
        pre, carried, masks = tensors[:PRE_ACTIVATIONS], tensors[of_states], tensors[of_states.stop :]
        by_part: dict[str, dict[str, Tensor]] = {"sum": {}, "input": {}, "recurrent": {}}
        for (gate, part), t in zip(self.pre_activations, pre):
            by_part[part][gate] = t
        for gate, t in by_part["input"].items():
            by_part["sum"][gate] = t + by_part["recurrent"][gate]
        z = PreActivations(by_part["sum"], *(Named("gates", by_part[part]) for part in _PARTS))
        before = dict(zip(self.carried, carried))
        parameters = {name: before.pop(name) for name in self.parameters}
        given = [Named("parameters", parameters)] if parameters else []
        given += [Named("masks", dict(zip(self.masks, masks)))] if masks else []
        h, states = self.function(z, Named("states", before), *given)
        new = {**parameters, **states, "h": h}
        padding = carried[len(self.carried) :]
        return h, *(new[name] for name in self.carried), *padding

    def carry(self, h: Tensor, state: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Return the carried states [..., H * n_carried], from h, the user's states as `stacked` and the parameters."""
        if self.carried == (self.states or ("h",)) and self.n_carried == len(self.carried):
            return state
        named = {"h": h, **dict(zip(self.states, _split(state, len(self.states) or 1)))}
        named |= {name: p.expand_as(h) for name, p in zip(self.parameters, parameters)}
        padding = [torch.zeros_like(h)] * (self.n_carried - len(self.carried))
        return _join([*(named[name] for name in self.carried), *padding])

    def layer_inputs(
        self, directions: Sequence[Direction], parameters: Sequence[Tensor], rows: slice, hx: Any, segments: Segments
    ) -> tuple[list[Direction], tuple[Tensor, Tensor], Segments]:
        """Return weights, (h0, c0) and segments of a layer as the kernels take them.

        parameters: those of all layers and directions; `rows` selects this layer's.
        """
        placed, (h0, state), n = [self.placed(w) for w in directions], hx, len(self.parameters)
        of_both = [torch.stack(list(parameters[k::n][rows]))[:, None] for k in range(n)]
        c0 = self.carry(h0, state, of_both)
        if segments.resets is not None and c0 is not state:
            T, (D, B, H) = len(segments.resets), h0.shape
            zeros, reset_h, reset_c = h0.new_zeros(1, D, 1, H), segments.reset_h, segments.reset_c
            h = zeros if reset_h is None else reset_h
            own = (
                _split(reset_c, len(self.states) or 1)
                if reset_c is not None
                else [zeros.expand_as(h)] * (len(self.states) or 1)
            )
            reset_c = self.carry(h.expand_as(own[0]), _join(own), of_both).expand(T, D, B, -1)
            segments = segments._replace(reset_c=reset_c)
        return placed, (h0, c0), segments

    def kept(self, carried: Tensor) -> Tensor:
        """Return the user's states, as `stacked`, from the result of `carry`."""
        n = len(self.states) or 1
        return carried if n == self.n_carried else _join(_split(carried, self.n_carried)[:n])

    def stacked(self, states: Sequence[Tensor]) -> Tensor:
        """Join the user's states [..., H] to one [..., H * n], with those of a unit adjacent."""
        return _join(states)

    def separate(self, stacked: Tensor) -> list[Tensor]:
        """Undo `stacked`."""
        n = len(self.states) or 1
        return [stacked] if n == 1 else [t.contiguous() for t in _split(stacked, n)]

    def placed(self, weights: Direction) -> Direction:
        """Reorder weights from a block of H rows for each gate to one for each pre-activation of the kernels, or of zeros."""
        if [p.part for p in self.pre_activations] == ["sum"] * PRE_ACTIVATIONS:
            return weights

        def place(w: Any, without: str) -> Any:
            if w is None:
                return None
            by_gate = dict(zip(self.gates, w.chunk(len(self.gates))))
            zero = torch.zeros_like(next(iter(by_gate.values())))
            blocks = [zero if part == without else by_gate[gate] for gate, part in self.pre_activations]
            return torch.cat(blocks + [zero] * (PRE_ACTIVATIONS - len(blocks)))

        w_ih, w_hh, b_ih, b_hh, *_ = weights
        return Direction(place(w_ih, "recurrent"), place(w_hh, "input"), place(b_ih, "recurrent"), place(b_hh, "input"))

    def _derive(self) -> None:
        try:
            self.source = device_functions(self._step, PRE_ACTIVATIONS, self.n_carried, tuple(self.masks.values()))
        except NotImplementedError as error:
            raise self._fail(f"its derivative needs {error}, which the kernels do not have") from None
        self.key = f"{self.name}_{hashlib.blake2b(self.source.encode(), digest_size=8).hexdigest()}"
        generated[self.key] = CellEquations(self.step, self.source, self.n_carried, tuple(self.masks.values()))
        declared[self.key] = self

    def triton_source(self) -> str:
        """Return the source of the two @triton.jit functions of one step, forward and backward, that the kernels call."""
        return self.source


declared: dict[str, Cell] = {}  # by their names in the kernels


def _split(carried: Tensor, n: int) -> Sequence[Tensor]:
    """Split [..., H * n] into n tensors [..., H], in the order of `kernels.interleave`."""
    return [carried] if n == 1 else carried.unflatten(-1, (-1, n)).unbind(-1)


def _join(states: Sequence[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.stack(tuple(states), -1).flatten(-2)


def cell(
    *,
    gates: Sequence[str],
    states: Sequence[str] = (),
    parameters: Sequence[str] = (),
    masks: Mapping[str, float] = _NO_MASKS,
) -> Callable[[Callable], Cell]:
    """Turn a torch function into a recurrent cell for `Recurrent` and `RecurrentCell`, with `Cell`'s arguments and errors.

    @lstm_triton.cell(gates="fgo", states="c")
    def coupled(z, s):
        f, g, o = z.f.sigmoid(), z.g.tanh(), z.o.sigmoid()
        c = f * s.c + (1 - f) * g
        return o * c.tanh(), {"c": c}
    """
    return lambda function: Cell(function, gates, states, parameters, masks)
