"""Kernels as PyTorch operators: one declaration gives the torch.library operators, their fakes, and autograd.

In eager mode the launchers are called directly; the dispatcher, several microseconds a call, is passed through only where
something has to see the operator: while compiling or tracing, under a dispatch mode, with tensor subclasses or lazily negated
tensors. Where no kernel can serve (second derivatives, torch.func.vmap and jvp, forward-mode AD) the reference does.
"""

import contextlib
import functools
import itertools
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .kernels.device import matmul_precision, torch_products
from .modes import is_jit_tracing, sees_operators, takes_reference

library = torch.library.Library("lstm_triton", "DEF")

_SCHEMA_TYPES = {Tensor: "Tensor", bool: "bool", float: "float", str: "str", torch.dtype: "ScalarType"}


def _schema(record: Any, prefix: str = "") -> list[str]:
    """The fields of a NamedTuple as arguments of an operator."""
    arguments = []
    for name, annotation in typing.get_type_hints(record).items():
        (kind,) = (t for t in (*typing.get_args(annotation), annotation) if t in _SCHEMA_TYPES)
        optional = "?" if type(None) in typing.get_args(annotation) else ""
        arguments.append(f"{_SCHEMA_TYPES[kind]}{optional} {prefix}{name}")
    return arguments


def implements(name: str):
    """Register for the devices where kernels run: NVIDIA GPUs, and the CPU for Triton's interpreter."""

    def register(function):
        for key in ("CUDA", "CPU"):
            library.impl(name, function, key)
        return function

    return register


class Operator:
    """An operator, from tensors and options to tensors, that launches kernels; differentiable as often as its reference.

    Calling it gives the outputs. Inference does not pass through autograd. The operators are lstm_triton::name and
    lstm_triton::name_backward; compiled, traced and exported programs hold these.

    Args:
        name: of the operator.
        inputs, options, outputs, gradients, saved: NamedTuples: tensors; what is no tensor; tensors; the gradients of the
            first outputs, which are the differentiable ones; what of the outputs the backward takes.
        launchers: imports and returns two functions. The first, of (inputs, options, save), returns the outputs, where save
            asks for what the backward takes. The second, of (gradients, inputs, saved, needs, options), returns a dict with
            the gradients of the inputs whose names are in needs, each with storage of its own.
        save: outputs -> saved.
        fake: the first launcher for tensors without memory; fake_backward: likewise for the second one those gradients that
            are not contiguous, of (inputs, saved).
        reference: (inputs, options) -> the differentiable outputs, in differentiable operations of torch.
        unread: the names of the inputs whose gradients are needed -> those of the inputs that the second launcher does not
            read. In-place updates of these between forward and backward are no error, as in torch.
        recurrent: whether products follow torch's setting for recurrent layers, not that for matrix products.
    """

    def __init__(  # noqa: PLR0913
        self,
        name: str,
        *,
        inputs: Any,
        options: Any,
        outputs: Any,
        gradients: Any,
        saved: Any,
        launchers: Callable[[], tuple[Callable, Callable]],
        save: Callable[[Any], Any],
        fake: Callable[[Any, Any, bool], Any],
        fake_backward: Callable[[Any, Any], dict[str, Tensor]] = lambda inputs, saved: {},
        reference: Callable[[Any, Any], Sequence[Tensor]],
        unread: Callable[[frozenset[str]], set[str]] = lambda needs: set(),
        recurrent: bool = False,
    ) -> None:
        self.name, self.inputs, self.options, self.outputs = name, inputs, options, outputs
        self.gradients, self.saved, self.save, self.launchers = gradients, saved, save, launchers
        self.reference, self.unread, self.recurrent = reference, unread, recurrent
        self._n_gradients, self._n_inputs = len(gradients._fields), len(inputs._fields)

        arguments = [*_schema(inputs), *_schema(options), "bool save"]
        returned = ", ".join(["Tensor"] * len(outputs._fields))
        library.define(f"{name}({', '.join(arguments)}) -> ({returned})")
        arguments = [
            *_schema(gradients),
            *_schema(inputs),
            *_schema(saved, "saved_"),
            "bool[] needs",
            *_schema(options),
        ]
        returned = ", ".join(["Tensor"] * self._n_inputs)
        library.define(f"{name}_backward({', '.join(arguments)}) -> ({returned})")
        self.operator = getattr(torch.ops.lstm_triton, name).default
        self.backward_operator = getattr(torch.ops.lstm_triton, f"{name}_backward").default

        def run(launch, *arguments):
            *tensors, save = arguments
            n = self._n_inputs
            outputs = launch(self.inputs(*tensors[:n]), self.options(*tensors[n:]), save)
            return _results(outputs, like=tensors[0])

        def run_backward(*arguments):
            grads, tensors, saved, needs, options = self._backward_arguments(arguments)
            names = frozenset(itertools.compress(inputs._fields, needs))
            found = self.launch_backward(grads, tensors, saved, names, options)
            return _results([found[name] if name in names else None for name in inputs._fields], like=tensors[0])

        def run_backward_fake(*arguments):
            _, tensors, saved, needs, _ = self._backward_arguments(arguments)
            found = fake_backward(tensors, saved)
            return tuple(
                tensors[0].new_empty(0) if not needed else found[field] if field in found else t.new_empty(t.shape)
                for field, t, needed in zip(self.inputs._fields, tensors, needs)
            )

        qualified = f"lstm_triton::{name}"
        implements(name)(lambda *arguments: run(self.launch, *arguments))
        implements(f"{name}_backward")(run_backward)
        torch.library.register_fake(qualified, functools.partial(run, fake), lib=library)
        torch.library.register_fake(f"{qualified}_backward", run_backward_fake, lib=library)
        torch.library.register_autograd(qualified, self._operator_backward, setup_context=self._setup, lib=library)
        torch.library.register_autograd(
            f"{qualified}_backward", self._operator_second, setup_context=self._setup_second, lib=library
        )
        # Subclasses only for their names, which torch shows as grad_fn.
        class_name = "".join(part.title() for part in name.split("_")).replace("Lstm", "LSTM")
        self._first: Any = type(class_name, (_First,), {})
        self._second: Any = type(f"{class_name}Gradient", (_Second,), {})

    @functools.cached_property
    def launch(self) -> Callable:
        """The forward launcher: imported where it is first called, as elsewhere there may be no triton."""
        return self.launchers()[0]

    @functools.cached_property
    def launch_backward(self) -> Callable:
        return self.launchers()[1]

    def __call__(self, inputs: Any, options: Any) -> Sequence[Any]:
        """The outputs for two of its NamedTuples; those that nobody needs are None or empty."""
        sees = sees_operators(*inputs)
        if takes_reference(watched=sees):
            with self.reference_precision(inputs[0].dtype, options.precision):
                return *self.reference(inputs, options), *(None,) * (len(self.outputs._fields) - self._n_gradients)
        recorded = torch.is_grad_enabled() and _any_requires_grad(inputs)
        if not sees:
            if recorded:
                return self._first.apply(self, self.launch, options, *inputs)
            return self.launch(inputs, options, False)
        traced = is_jit_tracing()
        if not recorded or traced or torch.compiler.is_compiling():
            return self._through_dispatcher(inputs, options, recorded or traced)
        function = _FirstOfTransform if torch._C._are_functorch_transforms_active() else self._first
        return function.apply(self, self._through_dispatcher, options, *inputs)

    def _through_dispatcher(self, inputs: Any, options: Any, save: bool) -> Sequence[Any]:
        outputs = self.operator(*inputs, *options, save)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return outputs if torch.compiler.is_compiling() else _present(outputs)

    def reference_precision(self, dtype: torch.dtype, precision: str | None) -> contextlib.AbstractContextManager:
        """Inside, torch's own products, those of the reference, are in the dtype and precision of the kernels'."""
        return torch_products(dtype, matmul_precision(dtype, precision, recurrent=self.recurrent))

    def reference_gradients(self, tensors: Sequence[Tensor | None], options: Any) -> list[Tensor | None]:
        """Of each input, by the reference, from gradients and inputs; differentiable."""
        grads, inputs = tensors[: self._n_gradients], tensors[self._n_gradients :]
        return reference.back_through(lambda *t: self.reference(self.inputs(*t), options), grads, inputs)

    # ---- autograd, the same for eager calls and for the operators ----

    def save_first(
        self,
        ctx,
        options,
        save: bool,
        inputs: Sequence[Tensor | None],
        outputs: Any,
        unread: Collection[str] = (),
    ) -> None:
        ctx.operator, ctx.options, ctx.is_saved = self, options, save
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[t for t in outputs[self._n_gradients :] if t is not None])
        if save:
            named = zip(self.inputs._fields, inputs)
            ctx.unread = {k: (t, _version(t)) for k, (name, t) in enumerate(named) if name in unread and t is not None}
            read = (None if k in ctx.unread else t for k, t in enumerate(inputs))
            ctx.save_for_backward(*read, *self.save(self.outputs._make(outputs)))

    def first_derivative(self, ctx, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> Sequence[Tensor | None]:
        if not ctx.is_saved:
            raise RuntimeError(f"lstm_triton::{self.name} was called with save=False and cannot be differentiated")
        grads = grads[: self._n_gradients]
        if all(g is None for g in grads):
            return (None,) * self._n_inputs
        tensors, options = list(ctx.saved_tensors), ctx.options
        reads_all = takes_reference(*grads) or torch.is_grad_enabled()
        for k, (t, version) in ctx.unread.items():
            if reads_all and _version(t) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation:"
                    f" {self.inputs._fields[k]} of lstm_triton::{self.name} is at version {_version(t)}; expected version"
                    f" {version} instead"
                )
            tensors[k] = t
        if takes_reference(*grads):
            tensors = tensors[: self._n_inputs]
            with self.reference_precision(tensors[0].dtype, options.precision):
                found = self.reference_gradients((*grads, *tensors), options)
        elif not torch.is_grad_enabled():
            return _Second.forward(None, self, options, needs, *grads, *tensors)
        else:
            # Nothing is differentiated through what was saved: it follows from the inputs.
            saved = (None if t is None else t.detach() for t in tensors[self._n_inputs :])
            transformed = torch._C._are_functorch_transforms_active()
            function = _SecondOfTransform if transformed else self._second
            found = function.apply(self, options, tuple(needs), *grads, *tensors[: self._n_inputs], *saved)
        return [g if needed else None for g, needed in zip(found, needs)]

    def save_second(self, ctx, options, needs: Sequence[bool], tensors: Sequence[Tensor | None]) -> None:
        ctx.operator, ctx.options, ctx.needs = self, options, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: self._n_gradients + self._n_inputs])

    def second_derivative(self, ctx, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Those of the gradients and the inputs that the first one had, and None for what it had saved."""
        tensors, options = ctx.saved_tensors, ctx.options
        grads = [g if needed else None for g, needed in zip(grads, ctx.needs)]
        with self.reference_precision(tensors[self._n_gradients].dtype, options.precision):
            found = reference.back_through(lambda *t: self.reference_gradients(t, options), grads, tensors)
        return found + [None] * len(self.saved._fields)

    # ---- torch.library's form of it: arguments are flat, and as the schemas have them ----

    def split(self, tensors):
        """The gradients, inputs and saved tensors that the backward takes."""
        first, last = self._n_gradients, self._n_gradients + self._n_inputs
        make = self.gradients._make, self.inputs._make, self.saved._make
        return make[0](tensors[:first]), make[1](tensors[first:last]), make[2](tensors[last:])

    def _backward_arguments(self, arguments):
        n = self._n_gradients + self._n_inputs + len(self.saved._fields)
        needs, *options = arguments[n:]
        return *self.split(arguments[:n]), needs, self.options(*options)

    def _setup(self, ctx, inputs, output):
        *options, save = inputs[self._n_inputs :]
        self.save_first(ctx, self.options(*options), save, inputs[: self._n_inputs], _present(output))

    def _operator_backward(self, ctx, *grads):
        found = self.first_derivative(ctx, grads, ctx.needs_input_grad[: self._n_inputs])
        return *found, *(None,) * (len(self.options._fields) + 1)

    def _setup_second(self, ctx, inputs, output):
        grads, tensors, saved, needs, options = self._backward_arguments(inputs)
        self.save_second(ctx, options, needs, (*grads, *tensors, *saved))

    def _operator_second(self, ctx, *grads):
        return *self.second_derivative(ctx, grads), *(None,) * (len(self.options._fields) + 1)


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def _version(t: Tensor) -> int | None:
    """The number of in-place updates of t so far; an inference tensor does not count them."""
    return None if t.is_inference() else t._version


def _results(outputs: Sequence[Tensor | None], like: Tensor) -> Any:
    """As an operator returns them: no None, and a single one as it is."""
    outputs = tuple(like.new_empty(0) if t is None else t for t in outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def _present(outputs: Any) -> tuple[Tensor | None, ...]:
    """The inverse; nothing but None is returned in this shape."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return tuple(None if t is None or t.shape == (0,) else t for t in outputs)


class _First(torch.autograd.Function):
    """The outputs of an operator by this launcher, from tensors in the order of its inputs."""

    @staticmethod
    def forward(ctx, operator, launch, options, *inputs):
        outputs = launch(operator.inputs._make(inputs), options, True)
        needs = frozenset(itertools.compress(operator.inputs._fields, ctx.needs_input_grad[3:]))
        operator.save_first(ctx, options, True, inputs, outputs, operator.unread(needs))
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *ctx.operator.first_derivative(ctx, grads, ctx.needs_input_grad[3:])


class _Second(torch.autograd.Function):
    """The gradients of an operator's inputs, as a function of its own: differentiating it goes through the reference."""

    @staticmethod
    def forward(ctx, operator, options, needs, *tensors):
        if sees_operators(*tensors):
            found = operator.backward_operator(*tensors, needs, *options)
            found = [g if needed else None for g, needed in zip(found, needs)]
        else:
            fields = operator.inputs._fields
            names = frozenset(itertools.compress(fields, needs))
            of_inputs = operator.launch_backward(*operator.split(tensors), names, options)
            found = [of_inputs[name] if name in names else None for name in fields]
        if ctx is not None:
            operator.save_second(ctx, options, needs, tensors)
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *ctx.operator.second_derivative(ctx, grads)


# torch.func needs forward and setup_context apart. Elsewhere that form looks up the signature of forward on every call, at
# several times the cost of the rest.


class _FirstOfTransform(torch.autograd.Function):
    @staticmethod
    def forward(operator, launch, options, *inputs):
        return launch(operator.inputs._make(inputs), options, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        operator, _, options, *tensors = inputs
        operator.save_first(ctx, options, True, tensors, output)

    backward = _First.backward


class _SecondOfTransform(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return _Second.forward(None, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        operator, options, needs, *tensors = inputs
        operator.save_second(ctx, options, needs, tensors)

    backward = _Second.backward
