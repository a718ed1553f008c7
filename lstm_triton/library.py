"""The operators lstm_triton::... of torch.library: their schemas, and their implementations by device."""

import itertools
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

library = torch.library.Library("lstm_triton", "DEF")

_SCHEMA_TYPES = {Tensor: "Tensor", bool: "bool", float: "float", str: "str", torch.dtype: "ScalarType"}


class Schema(NamedTuple):
    """The schema of an operator that takes the fields of NamedTuples and one more argument, and returns tensors.

    A field that is named like an earlier one gets the prefix saved_.
    """

    name: str
    records: Sequence[Any]
    last: str
    n_results: int

    def __str__(self) -> str:
        arguments: dict[str, str] = {}
        for record in self.records:
            for name, annotation in typing.get_type_hints(record).items():
                (kind,) = (t for t in (*typing.get_args(annotation), annotation) if t in _SCHEMA_TYPES)
                optional = "?" if type(None) in typing.get_args(annotation) else ""
                arguments["saved_" * (name in arguments) + name] = _SCHEMA_TYPES[kind] + optional
        named = [*(f"{kind} {name}" for name, kind in arguments.items()), self.last]
        return f"{self.name}({', '.join(named)}) -> ({', '.join(['Tensor'] * self.n_results)})"

    def grouped(self, flat: Iterable) -> list[Any]:
        """Return the NamedTuples and the last argument."""
        rest = iter(flat)
        return [*(record._make(itertools.islice(rest, len(record._fields))) for record in self.records), *rest]


def define(schema: Schema, run: Callable, fake: Callable, record: Callable) -> Any:
    """Define an operator: its implementations for real and for fake tensors, and its autograd.

    run, fake: (*arguments), which are grouped, -> the results, None for those that are not needed.
    record: (run, arguments, *tensors) -> the results of run(*arguments), by the `apply` of a _SingleLevelFunction;
        torch.library.register_autograd would make a Function that torch.func does not take.
    """
    library.define(str(schema))
    operator = getattr(torch.ops.lstm_triton, schema.name).default
    n_tensors = sum("Tensor" in str(a.type) for a in operator._schema.arguments)

    def flat(function):
        return lambda *arguments: _without_none(function(*schema.grouped(arguments)), arguments)

    implements(schema.name)(flat(run))
    torch.library.register_fake(f"lstm_triton::{schema.name}", flat(fake), lib=library)

    def autograd(keys, *arguments):
        recording = torch.is_grad_enabled()

        def below(*_):
            # Autograd functions turn the grad mode off, but an outer torch.func.grad may have to record this call too.
            with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(recording):
                return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

        if not recording or not torch._C._any_requires_grad(*arguments):
            return below()
        with enable_single_level_autograd_function():
            found = record(lambda *_: present(below()), schema.grouped(arguments), *arguments[:n_tensors])
        return _without_none(found, arguments)

    library.impl(schema.name, autograd, "Autograd", with_keyset=True)
    return operator


def implements(name: str):
    """Register for the devices where kernels run: NVIDIA GPUs, and the CPU for Triton's interpreter."""

    def register(function):
        for key in ("CUDA", "CPU"):
            library.impl(name, function, key)
        return function

    return register


def _without_none(outputs: Iterable[Tensor | None], arguments: Iterable) -> Any:
    """Return outputs as an operator returns them: without None, and a single one by itself."""
    like = next(t for t in arguments if t is not None)
    outputs = tuple(like.new_empty(0) if t is None else t for t in outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def present(outputs: Any) -> tuple[Tensor | None, ...]:
    """Return the outputs of an operator, with None for those that are not needed, which it returns empty."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return tuple(None if t is None or t.shape == (0,) else t for t in outputs)
