"""The graph of a pointwise function and of its derivatives, from as few saved values as possible.

torch traces the function and its vector-Jacobian product as one graph. Values that this graph computes from the inputs alone
can be saved by the forward or computed again by the backward. A minimum cut between the inputs and the values that the
backward uses finds which ones to save: the fewest, and among equally few the latest.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from .operations import CLAMP, CONSTANTS, DECOMPOSITIONS, EXPRESSIONS, POWER, SAME, aten


class Value:
    """A value of the graph: an input, or an operation on other values and numbers. Equal values are one object."""

    def __init__(self, name: str, operation: Any = None, args: tuple = (), is_float: bool = True) -> None:
        self.name, self.operation, self.args, self.is_float = name, operation, args, is_float

    @property
    def operands(self) -> list["Value"]:
        return [a for a in self.args if isinstance(a, Value)]


def _number(operation: Any, args: Sequence[Any]) -> torch.Tensor:
    """Compute an operation on single numbers, in float64."""
    first, *others = (a if isinstance(a, torch.Tensor) else torch.tensor(a, dtype=torch.float64) for a in args)
    return operation(first, *(t.item() if operation._overloadname == "Scalar" else t for t in others))


class _Graph:
    """Interns values, so that equal operations are one value."""

    def __init__(self) -> None:
        self._values: dict[tuple, Value] = {}

    def apply(self, operation: Any, *args: Any, is_float: bool = True) -> Any:
        if operation is aten.where.self and not isinstance(args[0], Value):
            return args[1] if args[0] else args[2]
        if not any(isinstance(a, Value) for a in args):  # Triton's functions do not take numbers alone
            return _number(operation, args).item()
        key = (operation, *args)
        if key not in self._values:
            self._values[key] = Value(f"t{len(self._values)}", operation, args, is_float)
        return self._values[key]

    def of_node(self, node: Any, args: Sequence[Any]) -> Any:
        """Return the value, or number, of a node of torch's graph with these arguments."""
        operation, kwargs = node.target, dict(node.kwargs)
        if operation in SAME:
            return args[0]
        if operation in CONSTANTS:
            return CONSTANTS[operation](node)
        if operation is POWER:
            return self._power(*args)
        if operation in (CLAMP, aten.clamp_min.default, aten.clamp_max.default):
            return self._clamp(operation, args, kwargs)
        if (alpha := kwargs.pop("alpha", 1)) != 1:
            args = (args[0], self.apply(aten.mul.Tensor, args[1], float(alpha)))
        if operation not in EXPRESSIONS or kwargs:
            raise NotImplementedError(f"{operation} {kwargs or ''}".strip())
        if operation in (aten.mul.Tensor, aten.mul.Scalar) and 1 in args:
            return args[0] if args[1] == 1 else args[1]
        return self.apply(operation, *args, is_float=node.meta["val"].dtype.is_floating_point)

    def _power(self, base: Value, exponent: float) -> Any:
        """Return a power as a product of the base, or of its square root."""
        factor, times = (
            (base, abs(exponent)) if exponent % 1 == 0 else (self.apply(aten.sqrt.default, base), abs(2 * exponent))
        )
        power = factor
        for _ in range(int(times) - 1):
            power = self.apply(aten.mul.Tensor, power, factor)
        return power if exponent > 0 else self.apply(aten.reciprocal.default, power)

    def _clamp(self, operation: Any, args: Sequence[Any], kwargs: dict) -> Any:
        value, *bounds = args
        low, high = (*bounds, kwargs.get("max"))[:2] if operation is CLAMP else (bounds[0], None)
        if operation is aten.clamp_max.default:
            low, high = high, low
        for bound, limit in ((low, aten.maximum.default), (high, aten.minimum.default)):
            if bound is not None:
                value = self.apply(limit, value, float(bound))
        return value


def joint_graph(function: Callable, names: Sequence[str], cotangents: Sequence[str]) -> tuple[list, list]:
    """Return the outputs of function(*names) and the gradients of its inputs, as values or numbers.

    Raises NotImplementedError, with the name, for an unknown operation.
    """

    def joint(inputs, gradients):
        outputs, vjp, *_ = torch.func.vjp(function, *inputs)
        return *outputs, *vjp(gradients)

    def example(names: Sequence[str]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full((2, 3), 0.5, dtype=torch.float64) for _ in names)

    functional = torch.func.functionalize(joint, remove="mutations_and_views")
    traced = make_fx(functional, DECOMPOSITIONS, tracing_mode="fake")(example(names), example(cotangents))
    traced.graph.eliminate_dead_code()
    graph, values = _Graph(), {}
    inputs = iter([*names, *cotangents])
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = Value(next(inputs))
        elif node.op == "get_attr":  # torch.tensor(2.0)
            values[node] = getattr(traced, node.target).item()
        elif node.op == "call_function":
            arguments = [values[a] if isinstance(a, torch.fx.Node) else a for a in node.args]
            values[node] = graph.of_node(node, arguments)
        elif node.op == "output":
            found = [values[n] for n in node.args[0]]
    return found[: -len(names)], found[-len(names) :]


def ancestors(values: Iterable[Any], stop: frozenset[Value] = frozenset()) -> list[Value]:
    """Return all values that these depend on, themselves included, operands first, and none beyond those of `stop`."""
    order: dict[Value, None] = {}

    def visit(value: Any) -> None:
        if not isinstance(value, Value) or value in order:
            return
        if value not in stop:
            for operand in value.operands:
                visit(operand)
        order[value] = None

    for value in values:
        visit(value)
    return list(order)


def zero_where_nothing_comes_back(
    gradients: Sequence[Any],
    cotangents: Sequence[Value],
    others: Sequence[Value],
    masks: Mapping[Value, Sequence[float]] = MappingProxyType({}),
) -> list[Any]:
    """Return the gradients, made 0 where all cotangents are 0.

    By the chain rule they are 0 there; but where cotangents and others are all 0, as past the end of a tensor, a division may
    give NaN. masks: with the values that each mask may have there.
    """
    given = frozenset([*cotangents, *others, *masks])

    def all_finite(of_masks: Iterable[float]) -> bool:
        at_zero = dict.fromkeys(given, torch.zeros((), dtype=torch.float64))
        at_zero |= {mask: torch.tensor(value, dtype=torch.float64) for mask, value in zip(masks, of_masks)}
        for value in ancestors(gradients, given):
            if value not in given:
                arguments = [at_zero[a] if isinstance(a, Value) else a for a in value.args]
                at_zero[value] = _number(value.operation, arguments)
        return all(at_zero[g].isfinite() for g in gradients if isinstance(g, Value))

    if all(map(all_finite, itertools.product(*masks.values()))):
        return list(gradients)
    none, *rest = (Value("none", aten.eq.Scalar, (d, 0.0)) for d in cotangents)
    for other in rest:
        none = Value("none", aten.bitwise_and.Tensor, (none, other))
    return [Value("gradient", aten.where.self, (none, 0.0, g)) if isinstance(g, Value) else g for g in gradients]


def to_save(gradients: Sequence[Any], cotangents: Sequence[str], at_hand: Sequence[Any]) -> list[Value]:
    """Return the fewest values that determine the gradients, together with the cotangents and the values at hand."""
    import networkx  # type: ignore[import-untyped]  # a dependency of torch

    needed = ancestors(gradients, frozenset(v for v in at_hand if isinstance(v, Value)))
    of_cotangents: set[Value] = set()
    for value in needed:
        if value.name in cotangents or not of_cotangents.isdisjoint(value.operands):
            of_cotangents.add(value)
    flow = networkx.DiGraph()
    flow.add_nodes_from(("inputs", "backward"))
    for value in needed:
        if value in of_cotangents:
            for operand in value.operands:
                if operand not in of_cotangents and operand not in at_hand:
                    flow.add_edge((operand, "out"), "backward")
        elif value not in at_hand:
            # An edge without a capacity is never cut, so truth values are not saved.
            flow.add_edge((value, "in"), (value, "out"), **({"capacity": 1} if value.is_float else {}))
            if value.operation is None:
                flow.add_edge("inputs", (value, "in"))
            for operand in value.operands:
                if operand not in at_hand:
                    flow.add_edge((operand, "out"), (value, "in"))
    for gradient in gradients:
        if isinstance(gradient, Value) and gradient not in of_cotangents and gradient not in at_hand:
            flow.add_edge((gradient, "out"), "backward")
    _, (before, after) = networkx.minimum_cut(flow, "inputs", "backward")
    return [value for value in needed if (value, "in") in before and (value, "out") in after]
