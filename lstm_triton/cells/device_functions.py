"""Write the step of a cell as two Triton functions: forward, with the values to save, and backward from these."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import derive
from .derive import Value, ancestors
from .operations import EXPRESSIONS, aten


def device_functions(
    step: Callable[..., tuple], n_pre: int, n_carried: int, probabilities: Sequence[float] = ()
) -> str:
    """Return the source of the @triton.jit functions `forward` and `backward` of `kernels.cells`.

    Args:
        step: (*pre-activations, *states before, *masks) -> (h, *states after), pointwise.
        n_pre, n_carried: the numbers of pre-activations and states. probabilities: that each mask is 1.

    Raises:
        NotImplementedError: an unknown operation in the derivative, with its name.
    """
    pre, masks = [f"z{k}" for k in range(n_pre)], [f"mask{k}" for k in range(len(probabilities))]
    before, after, d_after = ([f"{name}{k}" for k in range(n_carried)] for name in ("before", "state", "d_state"))
    (h, *states), gradients = derive.joint_graph(step, [*pre, *before, *masks], ["dh", *d_after])
    gradients = gradients[: n_pre + n_carried]  # a mask has no gradient
    inputs = {v.name: v for v in ancestors([h, *states, *gradients]) if v.operation is None}

    def of_inputs(names: Sequence[str]) -> list[Value | None]:
        return [inputs.get(name) for name in names]

    drawn = {inputs[name]: p for name, p in zip(masks, probabilities)}
    saved = derive.to_save(gradients, ("dh", *d_after), [*of_inputs(before), *states, *drawn])
    # At most n_pre values, because saving the pre-activations would be enough.
    padded = [*saved, *[None] * (n_pre - len(saved))]
    forward = {**dict(zip(pre, of_inputs(pre))), "before": of_inputs(before)}
    backward = {
        **{f"saved{k}": value for k, value in enumerate(padded)},
        "before": of_inputs(before),
        "state": [state if isinstance(state, Value) else None for state in states],
        "dh": inputs.get("dh"),
        "d_state": of_inputs(d_after),
    }
    d_pre, d_before = gradients[:n_pre], gradients[n_pre:]
    cotangents = [value for value in of_inputs(["dh", *d_after]) if value is not None]
    held = [v for v in (*saved, *of_inputs(before), *states) if isinstance(v, Value)]
    d_pre = derive.zero_where_nothing_comes_back(
        d_pre, cotangents, held, {mask: (0.0, p, 1.0) for mask, p in drawn.items()}
    )
    first, second = (
        _source("forward", "The values to save, the new states and h.", forward, drawn, [*padded, states, h]),
        _source(
            "backward",
            "The gradients of the pre-activations and of the states before.",
            backward,
            drawn,
            [*d_pre, d_before],
        ),
    )
    return first + "\n\n" + second


def _source(
    name: str, doc: str, parameters: dict[str, Any], masks: Mapping[Value, float], outputs: Sequence[Any]
) -> str:
    """Return the source of a @triton.jit function of these parameters, tiles of one shape. A number is a tile too.

    A list stands for the states of a unit in one tile, as in `kernels.interleave`. masks: the probability of each.
    """
    lines, names = _named(parameters)
    counter, like = itertools.count(), next(iter(parameters))
    flat = [value for output in outputs for value in (output if isinstance(output, list) else [output])]
    needed = ancestors(flat, frozenset(names))
    for number, (value, probability) in enumerate(masks.items(), 1):
        if value in needed:
            names[value] = value.name
            lines.append(f"{value.name} = mask({like}, at, {number}, {probability!r})")

    def written(argument: Any, operation: Any) -> str:
        if isinstance(argument, Value):
            return names[argument]
        number = float(argument)
        # Outside of arithmetic Triton takes a number as float32 first.
        is_exact = operation not in (aten.maximum.default, aten.minimum.default, aten.where.self)
        if is_exact or torch.tensor(number, dtype=torch.float32).item() == number:
            return repr(number)
        return f"tl.full({like}.shape, {number!r}, {like}.dtype)"

    for value in needed:
        if value not in names:
            arguments = [written(a, value.operation) for a in value.args]
            names[value] = f"v{next(counter)}"
            lines.append(f"{names[value]} = {EXPRESSIONS[value.operation].format(*arguments)}")

    def returned_as(output: Any) -> str:
        if isinstance(output, list):
            tiles = ", ".join(map(returned_as, output))
            return tiles if len(output) == 1 else f"interleave(({tiles}))"
        if isinstance(output, Value):
            return names[output]
        return f"tl.zeros_like({like})" + (f" + {float(output)}" if output else "")

    returned = map(returned_as, outputs)
    body = [f'"""{doc}"""', *lines, f"return {', '.join(returned)}"]
    return "\n".join(
        ["@triton.jit", f"def {name}({', '.join(parameters)}, at):", *(f"    {line}" for line in body), ""]
    )


def _named(parameters: dict[str, Any]) -> tuple[list[str], dict[Value, str]]:
    """Return lines that split the states of a unit, and the names of the input values."""
    lines, names = [], dict[Value, str]()
    for parameter, value in parameters.items():
        if not isinstance(value, list):
            names |= {} if value is None else {value: parameter}
        elif len(value) == 1:
            names |= {} if value[0] is None else {value[0]: parameter}
        elif any(v is not None for v in value):
            parts = [f"{parameter}{k}" for k in range(len(value))]
            lines.append(f"{', '.join(parts)} = deinterleave({parameter}, {len(parts)})")
            names |= {v: part for v, part in zip(value, parts) if v is not None}
    return lines, names
