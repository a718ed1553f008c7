"""The operators lstm_triton::... of torch.library: their schemas, and what they do on which device."""

import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("lstm_triton", "DEF")

_SCHEMA_TYPES = {Tensor: "Tensor", bool: "bool", float: "float", str: "str", torch.dtype: "ScalarType"}


def schema(record: Any, prefix: str = "") -> list[str]:
    """The fields of a NamedTuple as arguments of an operator."""
    arguments = []
    for name, annotation in typing.get_type_hints(record).items():
        (kind,) = (t for t in (*typing.get_args(annotation), annotation) if t in _SCHEMA_TYPES)
        optional = "?" if type(None) in typing.get_args(annotation) else ""
        arguments.append(f"{_SCHEMA_TYPES[kind]}{optional} {prefix}{name}")
    return arguments


def define(name, arguments, n_outputs, run, fake, backward, setup):
    """A new operator: its schema, what it does on real and on fake tensors, its autograd."""
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
    """As an operator returns them: no None, and a single one as it is."""
    outputs = tuple(like.new_empty(0) if t is None else t for t in outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def present(outputs: Any) -> tuple[Tensor | None, ...]:
    """The inverse; nothing but None is returned in this shape."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return tuple(None if t is None or t.shape == (0,) else t for t in outputs)
