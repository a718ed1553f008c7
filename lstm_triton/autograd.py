"""Kernels as PyTorch operators: one declaration gives the torch.library operators, their fakes, and autograd.

Eager calls go straight to the launchers. Only where something has to see the operator do calls pass through the dispatcher,
which takes several microseconds: while compiling or tracing, under a dispatch mode, with tensor subclasses or lazily negated
tensors. The reference computes what no kernel does: second derivatives, torch.func.vmap and jvp, forward-mode AD.
"""

import contextlib
import functools
import itertools
import pkgutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .kernels.device import matmul_precision, torch_products
from .kernels.inputs import Records
from .library import define, present, results, schema
from .modes import any_requires_grad, is_jit_tracing, sees_operators, takes_reference


@dataclass(eq=False)
class Operator:
    """An operator that launches kernels, from tensors and options to tensors; as often differentiable as its reference.

    A call returns the outputs. Inference does not pass through autograd. Compiled, traced and exported programs hold the
    operators lstm_triton::name and lstm_triton::name_backward.

    forward, backward: the launchers, or "module:function" of `kernels`, imported at the first call, because Triton may be
    missing
        elsewhere. forward(inputs, options, save) returns the outputs, with those that the backward takes if save is set.
        backward(gradients, inputs, saved, needs, options) returns a dict with the gradients of the inputs whose names are in
        needs, each with storage of its own.
    save: outputs -> saved.
    fake: the forward launcher for fake tensors. fake_backward: (inputs, saved) -> the gradients that are not contiguous, fake.
    reference: (inputs, options) -> the differentiable outputs, by differentiable operations of torch.
    unread: names of the inputs whose gradients are needed -> names of the inputs that the backward launcher does not read.
        In-place updates of these between forward and backward are no error, as in torch.
    recurrent: whether products follow torch's setting for recurrent layers, not that for matrix products.
    """

    name: str
    records: Records
    forward: Callable | str
    backward: Callable | str
    save: Callable[[Any], Any]
    fake: Callable[[Any, Any, bool], Any]
    reference: Callable[[Any, Any], Sequence[Tensor]]
    fake_backward: Callable[[Any, Any], dict[str, Tensor]] = lambda inputs, saved: {}
    unread: Callable[[frozenset[str]], set[str]] = lambda needs: set()
    recurrent: bool = False

    def __post_init__(self) -> None:
        inputs, _, outputs, gradients, saved = self.records
        self.names, self._n_gradients, self._n_inputs = inputs._fields, len(gradients._fields), len(inputs._fields)
        tensors, options = schema(inputs), schema(self.records.options)
        fake = functools.partial(self._run, launch=self.fake)
        both = self._operator_backward, self._setup
        self.operator = define(
            self.name, [*tensors, *options, "bool save"], len(outputs._fields), self._run, fake, *both
        )
        tensors = [*schema(gradients), *tensors, *schema(saved, "saved_")]
        both = self._operator_second, self._setup_second
        given = f"{self.name}_backward", [*tensors, "bool[] needs", *options], self._n_inputs
        self.backward_operator = define(*given, self._run_backward, self._run_backward_fake, *both)
        # Subclasses give the names that torch shows as grad_fn.
        class_name = "".join(part.title() for part in self.name.split("_")).replace("Lstm", "LSTM")
        self._first: Any = type(class_name, (_First,), {})
        self._second: Any = type(f"{class_name}Gradient", (_Second,), {})

    @functools.cached_property
    def launch(self) -> Callable:
        return _imported(self.forward)

    @functools.cached_property
    def launch_backward(self) -> Callable:
        return _imported(self.backward)

    def __call__(self, inputs: Any, options: Any) -> Sequence[Any]:
        """Return the outputs for NamedTuples of inputs and options; outputs that are not needed are None or empty."""
        sees = sees_operators(*inputs)
        if takes_reference(watched=sees):
            with self.reference_precision(inputs[0].dtype, options.precision):
                found = self.reference(inputs, options)
                return *found, *(None,) * (len(self.records.outputs._fields) - len(found))
        recorded = torch.is_grad_enabled() and any_requires_grad(inputs)
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
        return outputs if torch.compiler.is_compiling() else present(outputs)

    def reference_precision(self, dtype: torch.dtype, precision: str | None) -> contextlib.AbstractContextManager:
        """Let torch's products, which the reference uses, have the dtype and precision of the kernels' products."""
        return torch_products(dtype, matmul_precision(dtype, precision, recurrent=self.recurrent))

    def reference_gradients(self, tensors: Sequence[Tensor | None], options: Any) -> list[Tensor | None]:
        """Return the gradient of each input by the reference, from gradients and inputs; differentiable."""
        grads, inputs = tensors[: self._n_gradients], tensors[self._n_gradients :]
        return reference.back_through(lambda *t: self.reference(self.records.inputs(*t), options), grads, inputs)

    def input_gradients(self, tensors: Sequence[Tensor | None], needs: Sequence[bool], options, watched: bool) -> tuple:
        """Return the inputs' gradients by the backward launcher, from gradients, inputs and saved. watched: by the operator."""
        if watched:
            found = self.backward_operator(*tensors, needs, *options)
            return tuple(g if needed else None for g, needed in zip(found, needs))
        names = frozenset(itertools.compress(self.names, needs))
        of_inputs = self.launch_backward(*self.split(tensors), names, options)
        return tuple(of_inputs[name] if name in names else None for name in self.names)

    # ---- autograd, the same for eager calls and for the operators ----

    def save_first(
        self, ctx, options, save: bool, inputs: Sequence, outputs: Any, unread: Collection[str] = ()
    ) -> None:
        ctx.operator, ctx.options, ctx.is_saved = self, options, save
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[t for t in outputs[self._n_gradients :] if t is not None])
        if save:
            named = zip(self.names, inputs)
            ctx.unread = {k: (t, _version(t)) for k, (name, t) in enumerate(named) if name in unread and t is not None}
            read = (None if k in ctx.unread else t for k, t in enumerate(inputs))
            ctx.save_for_backward(*read, *self.save(self.records.outputs._make(outputs)))

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
                    f" {self.names[k]} of lstm_triton::{self.name} is at version {_version(t)}; expected version"
                    f" {version} instead"
                )
            tensors[k] = t
        if takes_reference(*grads):
            tensors = tensors[: self._n_inputs]
            with self.reference_precision(tensors[0].dtype, options.precision):
                found = self.reference_gradients((*grads, *tensors), options)
        elif not torch.is_grad_enabled():
            return self.input_gradients((*grads, *tensors), needs, options, sees_operators(*grads, *tensors))
        else:
            # Saved tensors are detached, because they follow from the inputs.
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
        """Return the gradients of the first derivative's gradients and inputs, and None for its saved tensors."""
        tensors, options = ctx.saved_tensors, ctx.options
        grads = [g if needed else None for g, needed in zip(grads, ctx.needs)]
        with self.reference_precision(tensors[self._n_gradients].dtype, options.precision):
            found = reference.back_through(lambda *t: self.reference_gradients(t, options), grads, tensors)
        return found + [None] * len(self.records.saved._fields)

    # ---- torch.library's form of it: arguments are flat, and as the schemas have them ----

    def split(self, tensors):
        """Split the backward's tensors into gradients, inputs and saved."""
        first, last = self._n_gradients, self._n_gradients + self._n_inputs
        records = self.records
        of_backward = records.saved._make(tensors[last:])
        return records.gradients._make(tensors[:first]), records.inputs._make(tensors[first:last]), of_backward

    def _backward_arguments(self, arguments):
        """Return tensors, needs and options."""
        n = self._n_gradients + self._n_inputs + len(self.records.saved._fields)
        needs, *options = arguments[n:]
        return arguments[:n], needs, self.records.options(*options)

    def _run(self, *arguments, launch=None):
        n = self._n_inputs
        *options, save = arguments[n:]
        inputs = self.records.inputs(*arguments[:n])
        return results((launch or self.launch)(inputs, self.records.options(*options), save), inputs[0])

    def _setup(self, ctx, inputs, output):
        *options, save = inputs[self._n_inputs :]
        self.save_first(ctx, self.records.options(*options), save, inputs[: self._n_inputs], present(output))

    def _operator_backward(self, ctx, *grads):
        found = self.first_derivative(ctx, grads, ctx.needs_input_grad[: self._n_inputs])
        return *found, *(None,) * (len(self.records.options._fields) + 1)

    def _run_backward(self, *arguments):
        tensors, needs, options = self._backward_arguments(arguments)
        return results(self.input_gradients(tensors, needs, options, watched=False), tensors[self._n_gradients])

    def _run_backward_fake(self, *arguments):
        tensors, needs, _ = self._backward_arguments(arguments)
        _, inputs, saved = self.split(tensors)
        found = self.fake_backward(inputs, saved)
        return tuple(
            inputs[0].new_empty(0) if not needed else found[name] if name in found else t.new_empty(t.shape)
            for name, t, needed in zip(self.names, inputs, needs)
        )

    def _setup_second(self, ctx, inputs, output):
        tensors, needs, options = self._backward_arguments(inputs)
        self.save_second(ctx, options, needs, tensors)

    def _operator_second(self, ctx, *grads):
        return *self.second_derivative(ctx, grads), *(None,) * (len(self.records.options._fields) + 1)


def _imported(launcher: Callable | str) -> Callable:
    return pkgutil.resolve_name(f"{__package__}.kernels.{launcher}") if isinstance(launcher, str) else launcher


def _version(t: Tensor) -> int | None:
    """Return the number of in-place updates of t so far; None for an inference tensor, which does not count them."""
    return None if t.is_inference() else t._version


class _First(torch.autograd.Function):
    """The outputs of an operator, by a launcher, from tensors in the order of its inputs."""

    @staticmethod
    def forward(ctx, operator, launch, options, *inputs):
        outputs = launch(operator.records.inputs._make(inputs), options, True)
        needs = frozenset(itertools.compress(operator.names, ctx.needs_input_grad[3:]))
        operator.save_first(ctx, options, True, inputs, outputs, operator.unread(needs))
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *ctx.operator.first_derivative(ctx, grads, ctx.needs_input_grad[3:])


class _Second(torch.autograd.Function):
    """The gradients of an operator's inputs, as a function of its own: differentiating it goes through the reference."""

    @staticmethod
    def forward(ctx, operator, options, needs, *tensors):
        operator.save_second(ctx, options, needs, tensors)
        return operator.input_gradients(tensors, needs, options, sees_operators(*tensors))

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *ctx.operator.second_derivative(ctx, grads)


# torch.func needs forward and setup_context as two methods. Elsewhere that form would look up the signature of forward on every
# call, which takes several times as long as the rest.


class _FirstOfTransform(torch.autograd.Function):
    @staticmethod
    def forward(operator, launch, options, *inputs):
        return launch(operator.records.inputs._make(inputs), options, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        operator, _, options, *tensors = inputs
        operator.save_first(ctx, options, True, tensors, output)

    backward = _First.backward


class _SecondOfTransform(torch.autograd.Function):
    @staticmethod
    def forward(operator, options, needs, *tensors):
        return operator.input_gradients(tensors, needs, options, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        operator, options, needs, *tensors = inputs
        operator.save_second(ctx, options, needs, tensors)

    backward = _Second.backward
