"""Random cells: pointwise expressions of gates and states, from a grammar, of values that stay in bounds."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F

# Each bounds what it is given, or keeps it.
_SMOOTH = torch.sigmoid, torch.tanh, F.softplus, F.logsigmoid, F.gelu, F.silu
_KINKED = torch.relu, torch.abs, torch.sin, F.elu, F.hardtanh, F.softsign
UNARY: dict[str, Callable] = {
    **{f.__name__: f for f in (*_SMOOTH, *_KINKED)},
    "exp": lambda x: torch.exp(-x.abs()),
    "log1p": lambda x: torch.log1p(x * x),
    "sqrt": lambda x: torch.sqrt(1 + x * x),
    "clamp": lambda x: x.clamp(min=-0.7),
    "square": lambda x: x**2 / (1 + x**2),
    "negative": lambda x: -x,
}
BINARY: dict[str, Callable] = {
    "plus": lambda x, y: x + y,
    "minus": lambda x, y: 1 - x - y,
    "times": lambda x, y: x * y,
    "over": lambda x, y: x / (1 + y.abs()),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where(x > y, x, 0.5 * y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
}
# At a kink rounding may choose another derivative; sin takes local memory on a GPU.
_SPECIAL = {*(f.__name__ for f in _KINKED), "exp", "clamp", "over", "maximum", "minimum", "where"}


def random_cell(rng: random.Random, smooth: bool = False) -> tuple[Callable, str, str, str, dict[str, float], str]:
    """(function, gates, states, parameters, masks, what it computes in words): at most four pre-activations, eight states and
    parameters and three masks."""
    unary, binary = ([f for f in of if not (smooth and f in _SPECIAL)] for of in (UNARY, BINARY))
    gates = "abde"[: rng.randint(1, 4)]
    states, parameters = rng.choice(["", "c", "c", "cn", "cmn"]), rng.choice(["", "", "p", "pqr"])
    masks = {name: rng.choice([0.0, 0.2, 0.5]) for name in rng.choice(["", "", "u", "uvw"])}
    has_parts = len(gates) < 4 and rng.random() < 0.5
    uses_h = rng.random() < 0.5

    def expression(leaves: list[str], depth: int) -> tuple:
        if depth == 0 or rng.random() < 0.1:
            return (rng.choice(leaves),)
        if rng.random() < 0.5:
            return rng.choice(unary), expression(leaves, depth - 1)
        return rng.choice(binary), expression(leaves, depth - 1), expression(leaves, depth - 1)

    leaves = [f"z.{gate}" for gate in gates] + [f"s.{state}" for state in states] + ["s.h"] * uses_h
    leaves += [f"p.{name}" for name in parameters] + [f"m.{name}" for name in masks]
    leaves += ["z.input." + gates[0], "z.recurrent." + gates[0]] if has_parts else []
    trees = {name: expression(leaves, 3) for name in ("h", *states)}

    def evaluate(tree: tuple, given: dict):
        name, *operands = tree
        values = [evaluate(operand, given) for operand in operands]
        if values:
            return (UNARY if len(values) == 1 else BINARY)[name](*values)
        value = given[name[0]]
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        return value

    def function(z, s, *others):
        given = {"z": z, "s": s} | dict(zip("p" * bool(parameters) + "m" * bool(masks), others))
        # Each gate, parameter and mask takes part, whatever the trees have drawn.
        parts = [getattr(given[kind], name) for kind, names in (("z", gates), ("p", parameters)) for name in names]
        kept = 1.0
        for name in masks:
            kept = kept * (1 - 0.5 * getattr(given["m"], name))
        h = torch.tanh(evaluate(trees["h"], given) + 0.1 * kept * sum(parts))
        return h, {name: torch.tanh(evaluate(trees[name], given) + 0.5 * getattr(s, name)) for name in states}

    return function, gates, states, parameters, masks, str(trees)
