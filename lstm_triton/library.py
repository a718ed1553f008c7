"""The operators lstm_triton::... of torch.library: their schemas, and their implementations by device."""

import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("lstm_triton", "DEF")

_SCHEMA_TYPES = {Tensor: "Tensor", bool: "bool", float: "float", str: "str", torch.dtype: "ScalarType"}


def schema(record: Any, prefix: str = "") -> list[str]:
    """Return the fields of a NamedTuple as arguments of an operator."""
    arguments = []
    for name, annotation in typing.get_type_hints(record).items():
        (kind,) = (t for t in (*typing.get_args(annotation), annotation) if t in _SCHEMA_TYPES)
        optional = "?" if type(None) in typing.get_args(annotation) else ""
        arguments.append(f"{_SCHEMA_TYPES[kind]}{optional} {prefix}{name}")
    return arguments


def define(name, arguments, n_outputs, run, fake, backward, setup):
    """Define an operator: its schema, its implementations for real and for fake tensors, its autograd."""
    qualified, returned = f"lstm_triton::{name}", ", ".join(["Tensor"] * n_outputs)
    library.define(f"{name}({', '.join(arguments)}) -> ({returned})")
    implements(name)(run)
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=library)
    return getattr(torch.ops.lstm_triton, name).default


def implements(name: str):
    """Register for the devices where kernels run: NVIDIA GPUs, and the CPU for Triton's interpreter."""

    def register(function):
        for key in ("CUDA", "CPU"):
            library.impl(name, function, key)
        return function

    return register


def results(outputs: Sequence[Tensor | None], like: Tensor) -> Any:
    """Return outputs as an operator returns them: without None, and a single one by itself."""
    outputs = tuple(like.new_empty(0) if t is None else t for t in outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def present(outputs: Any) -> tuple[Tensor | None, ...]:
    """Undo `results`."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return tuple(None if t is None or t.shape == (0,) else t for t in outputs)
