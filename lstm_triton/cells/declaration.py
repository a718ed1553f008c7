"""`cell`: a recurrent cell as a plain torch function, and what follows from it.

The kernels know four pre-activations z = x W_ih^T + h W_hh^T + b of a unit and one state of it that they carry unrounded from
step to step. A cell with fewer gates leaves rows of the weights zero; where it asks for the input's and the recurrent part of a
gate apart, each is a pre-activation of its own.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.cell_equations import CellEquations, generated
from ..kernels.inputs import Direction
from . import derive, operations

PRE_ACTIVATIONS = 4
_PARTS = ("input", "recurrent")


class CellError(TypeError):
    """A function that cannot be a cell; says what in it, and in which line."""


class Named:
    """Tensors as attributes; one that does not exist is an error that says which do."""

    def __init__(self, kind: str, tensors: Mapping[str, Any]) -> None:
        self._kind, self._tensors = kind, tensors

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._tensors:
            raise AttributeError(f"{self._kind} are {', '.join(self._tensors) or 'none'}, not {name!r}")
        return self._tensors[name]


class _Recorded(Mapping):
    """A mapping that remembers the keys that were asked for."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors, self.used = tensors, dict[str, None]()

    def __getitem__(self, name: str) -> Any:
        self.used[name] = None
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class PreActivation(NamedTuple):
    """What a kernel computes for each unit: x W_ih^T + b_ih and h W_hh^T + b_hh of a gate, their sum or one of the two."""

    gate: str
    part: str  # "sum", "input", "recurrent"


class Cell:
    """A recurrent cell: gates, states, and the function that gives the new ones. Made by `cell`.

    Args:
        function: of (z, s): z.f is the pre-activation x W_ih^T + b_ih + h W_hh^T + b_hh of a gate f, [B, H]; z.input.f and
            z.recurrent.f are its two parts; s.c is the state c before the step, s.h the output of the step before. Returns
            the new h and a dict of the new states. Made of pointwise operations of torch.
        gates, states: their names, of one letter each in a string, or in a sequence of strings.

    Raises:
        CellError: an operation that is not pointwise or not known, a branch that depends on values, a state that is missing or
            one too many, more pre-activations than the kernels hold; with the operation and the line.
    """

    def __init__(self, function: Callable, gates: Sequence[str], states: Sequence[str] = ()) -> None:
        functools.update_wrapper(self, function)
        self.function, self.gates, self.states = function, tuple(gates), tuple(states)
        self.name = getattr(function, "__name__", "cell")
        names = (*self.gates, *self.states)
        if len(set(names)) < len(names) or not all(n.isidentifier() for n in names) or {"h", *_PARTS} & set(names):
            raise CellError(f"{self.name}: gates and states need names of their own, other than h, input, recurrent")
        self._record()
        self._derive()

    def __call__(self, z: Any, s: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.function(z, s)

    def __reduce__(self) -> str:
        """Pickled by name, as functions are, so that modules with a cell can be copied and saved."""
        return self.__dict__["__qualname__"]

    def __repr__(self) -> str:
        return f"cell {self.name}(gates={self.gates}, states={self.states})"

    def _fail(self, what: str) -> CellError:
        return CellError(f"{self.name}: {what}")

    def _record(self) -> None:
        """Call the function once on tensors without memory: which parts of z and s it reads, and whether it may."""
        with FakeTensorMode() as mode:
            example = mode.from_tensor(torch.zeros(2, 3))
            gates = _Recorded(dict.fromkeys(self.gates, example))
            parts = {part: _Recorded(gates.tensors) for part in _PARTS}
            tensors = _Z(gates, Named("gates", parts["input"]), Named("gates", parts["recurrent"]))
            states = _Recorded(dict.fromkeys((*self.states, "h"), example))
            with _PointwiseOnly(self):
                found = self.function(tensors, Named("states", states))
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
        carried = [*self.states, *(["h"] if "h" in states.used else [])]
        if len(carried) > 1:
            raise self._fail(f"the kernels carry one state from step to step, not {' and '.join(carried)}")
        # Where nothing else is carried, h is: nobody reads it.
        self.carried = carried[0] if carried else "h"

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

    def step(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(h, the new carried state) from the pre-activations that a kernel has, zeros behind them, and the carried state."""
        *pre, state = tensors
        by_part: dict[str, dict[str, Tensor]] = {"sum": {}, "input": {}, "recurrent": {}}
        for (gate, part), t in zip(self.pre_activations, pre):
            by_part[part][gate] = t
        for gate, t in by_part["input"].items():
            by_part["sum"][gate] = t + by_part["recurrent"][gate]
        z = _Z(by_part["sum"], *(Named("gates", by_part[part]) for part in _PARTS))
        h, states = self.function(z, Named("states", {self.carried: state}))
        return h, states.get(self.carried, h)

    def placed(self, weights: Direction) -> Direction:
        """Weights with a block of H rows for each gate -> with one for each pre-activation of the kernels, zeros among them."""
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
        pre = [f"z{k}" for k in range(PRE_ACTIVATIONS)]
        try:
            (h, state), gradients = derive.joint_graph(self.step, [*pre, "before"], ["dh", "d_state"])
        except NotImplementedError as error:
            raise self._fail(f"its derivative needs {error}, which the kernels do not have") from None
        inputs = {v.name: v for v in derive.ancestors([h, state, *gradients]) if v.operation is None}
        at_hand = [inputs.get("before"), state]
        saved = derive.to_save(gradients, ("dh", "d_state"), at_hand)
        # No more than there are pre-activations, which would do.
        padded = [*saved, *[None] * (PRE_ACTIVATIONS - len(saved))]
        forward = {name: inputs.get(name) for name in (*pre, "before")}
        backward = {
            **{f"saved{k}": value for k, value in enumerate(padded)},
            "before": inputs.get("before"),
            "state": state if isinstance(state, derive.Value) else None,
            "dh": inputs.get("dh"),
            "d_state": inputs.get("d_state"),
        }
        self.source = (
            derive.source("forward", "The values to save, the new state and h.", forward, [*padded, state, h])
            + "\n\n"
            + derive.source(
                "backward", "The gradients of the pre-activations and of the state before.", backward, gradients
            )
        )
        self.key = f"{self.name}_{hashlib.blake2b(self.source.encode(), digest_size=8).hexdigest()}"
        generated[self.key] = CellEquations(self.step, self.source)

    def triton_source(self) -> str:
        """The two device functions that the kernels run: of one step, forward and backward."""
        return self.source


class _Z(Named):
    """All gates' pre-activations: their sums, and the two parts."""

    def __init__(self, sums: Mapping[str, Tensor], input: Named, recurrent: Named) -> None:
        super().__init__("gates", sums)
        self.input, self.recurrent = input, recurrent


class _PointwiseOnly(TorchDispatchMode):
    """Inside, an operation that a kernel could not compute raises CellError with its name and its line."""

    def __init__(self, of: Cell) -> None:
        super().__init__()
        self._cell = of

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":  # asks for a device or a size
            return func(*args, **(kwargs or {}))
        where = _line()
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise self._cell._fail(f"{where}: a branch, or a number, that depends on values")
        if func not in operations.ALLOWED:
            raise self._cell._fail(f"{where}: {func} is not a pointwise operation that the kernels have")
        found = func(*args, **(kwargs or {}))
        shapes = {tuple(t.shape) for t in (found if isinstance(found, tuple) else (found,))}
        if not shapes <= {(2, 3), (), (0,)}:
            raise self._cell._fail(f"{where}: {func} gives a tensor of another size than a gate's")
        return found


def _line() -> str:
    """Where the innermost call outside torch and this package stands."""
    frame: Any = sys._getframe(2)
    ours = (__name__.rpartition(".")[0], "torch")
    while frame is not None and frame.f_globals.get("__name__", "").startswith(ours):
        frame = frame.f_back
    if frame is None:
        return "somewhere"
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def cell(*, gates: Sequence[str], states: Sequence[str] = ()) -> Callable[[Callable], Cell]:
    """Make a plain torch function a recurrent cell, for `Recurrent` and `RecurrentCell`; see `Cell`.

    @lstm_triton.cell(gates="fgo", states="c")
    def coupled(z, s):
        f, g, o = z.f.sigmoid(), z.g.tanh(), z.o.sigmoid()
        c = f * s.c + (1 - f) * g
        return o * c.tanh(), {"c": c}
    """
    return lambda function: Cell(function, gates, states)
