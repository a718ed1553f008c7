"""Kernels as PyTorch operators: one declaration gives the torch.library operators, their fakes, and autograd.

Eager calls go straight to the launchers. Only where something has to see the operator do calls pass through the dispatcher,
which takes several microseconds: while compiling or tracing, under a dispatch mode, with tensor subclasses or lazily negated
tensors. The reference computes what no kernel does: second derivatives, torch.func.vmap and jvp, forward-mode AD.
"""

import contextlib
import functools
import itertools
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from . import reference
from .kernels.device import matmul_precision, torch_products
from .kernels.inputs import Records
from .library import Schema, define, present
from .modes import any_requires_grad, is_jit_tracing, sees_operators, takes_reference


@dataclass(eq=False)
class Operator:
    """An operator that launches kernels, from tensors and options to tensors; as often differentiable as its reference.

    A call returns the outputs. Inference does not pass through autograd. Compiled, traced and exported programs hold the
    operators lstm_triton::name and lstm_triton::name_backward.

    reference: (inputs, options) -> the differentiable outputs, by differentiable operations of torch.
    forward, backward: the launchers, or "module:function" of `kernels`, imported at the first call, because Triton may be
        missing elsewhere. forward(inputs, options, save) returns the outputs, with those that the backward takes if save is
        set. backward(gradients, inputs, saved, needs, options) returns a dict with the gradients of the inputs whose names are
        in needs, each with storage of its own. Without them the reference computes these.
    save: outputs -> saved.
    fake: the forward launcher for fake tensors; without it the reference gives the outputs. fake_backward: (inputs, saved) ->
        the gradients that are not contiguous, fake.
    read_for: inputs that the backward launcher reads for the gradient of one other input only, or (None) for none. Where that
        is not needed, in-place updates between forward and backward are no error, as in torch.
    recurrent: whether products follow torch's setting for recurrent layers, not that for matrix products.
    """

    name: str
    records: Records
    reference: Callable[[Any, Any], Sequence[Tensor]]
    forward: Callable | str | None = None
    backward: Callable | str | None = None
    save: Callable[[Any], Any] = lambda outputs: ()
    fake: Callable[[Any, Any, bool], Any] | None = None
    fake_backward: Callable[[Any, Any], dict[str, Tensor]] = lambda inputs, saved: {}
    read_for: Mapping[str, str | None] = field(default_factory=dict)
    recurrent: bool = False

    def __post_init__(self) -> None:
        inputs, options, outputs, gradients, saved = self.records
        self.names, self._n_gradients = inputs._fields, len(gradients._fields)
        # Subclasses give the names that torch shows as grad_fn.
        class_name = "".join(part.title() for part in self.name.split("_")).replace("Lstm", "LSTM")
        functions: list[Any] = [type(name, (_Function,), {}) for name in (class_name, f"{class_name}Gradient")]
        self._first, self._second = functions
        self.operator = define(
            Schema(self.name, (inputs, options), "bool save", len(outputs._fields)),
            lambda *arguments: self.launch(*arguments),
            self.fake or self.by_reference,
            functools.partial(self._first.apply, self._save_first),
        )
        self._of_backward = Schema(
            f"{self.name}_backward", (gradients, inputs, saved, options), "bool[] needs", len(self.names)
        )
        record = functools.partial(self._second.apply, self._save_second)
        self.backward_operator = define(self._of_backward, self._gradients, self._fake_gradients, record)

    launch = functools.cached_property(lambda self: _imported(self.forward or self.by_reference))
    launch_backward = functools.cached_property(lambda self: _imported(self.backward or self._backward_by_reference))

    def __call__(self, inputs: Any, options: Any) -> Sequence[Any]:
        """Return the outputs for NamedTuples of inputs and options; outputs that are not needed are None or empty."""
        watched = sees_operators(*inputs)
        if takes_reference(watched=watched):
            return self.by_reference(inputs, options)
        save = torch.is_grad_enabled() and any_requires_grad(inputs)
        if watched:  # a trace holds for calls with gradients too, and torch.compile does not see those of torch.func
            save = save or is_jit_tracing() or torch._C._are_functorch_transforms_active()
            return present(self.operator(*inputs, *options, save))
        if save:
            return self._first.apply(self._save_first, self.launch, (inputs, options, True), *inputs)
        return self.launch(inputs, options, False)

    # ---- by the reference, whose products have the dtype and precision of the kernels' ----

    def kernels_products(self, dtype: torch.dtype, precision: str | None) -> contextlib.AbstractContextManager:
        return torch_products(dtype, matmul_precision(dtype, precision, recurrent=self.recurrent))

    def by_reference(self, inputs: Any, options: Any, save: bool = False) -> Sequence[Tensor | None]:
        """Return the outputs, those that only a backward takes as None."""
        with self.kernels_products(inputs[0].dtype, options.precision):
            found = self.reference(inputs, options)
        return *found, *(None,) * (len(self.records.outputs._fields) - len(found))

    def gradients_by_reference(self, grads: Sequence, inputs: Sequence, options: Any) -> list[Tensor | None]:
        """Return the gradient of each input; differentiable."""
        with self.kernels_products(inputs[0].dtype, options.precision):
            return reference.back_through(lambda *t: self.reference(self.records.inputs(*t), options), grads, inputs)

    def _backward_by_reference(self, grads, inputs, saved, needs, options) -> dict[str, Tensor]:
        found = zip(self.names, self.gradients_by_reference(grads, inputs, options))
        return {name: g.clone() for name, g in found if name in needs and g is not None}

    # ---- autograd, the same for eager calls and for the operators ----

    def _save_first(self, ctx, outputs: Sequence, inputs: Sequence, options: Any, save: bool) -> None:
        ctx.derivative, ctx.options, ctx.is_saved = self._first_derivative, options, save
        ctx.mark_non_differentiable(*[t for t in outputs[self._n_gradients :] if t is not None])
        if save:
            needs = set(itertools.compress(self.names, ctx.needs_input_grad[-len(inputs) :]))
            unread = {name for name, other in self.read_for.items() if other not in needs}
            named = zip(self.names, inputs)
            ctx.unread = {k: (t, _version(t)) for k, (name, t) in enumerate(named) if name in unread and t is not None}
            read = (None if k in ctx.unread else t for k, t in enumerate(inputs))
            ctx.save_for_backward(*read, *self.save(self.records.outputs._make(outputs)))

    def _first_derivative(self, ctx, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if not ctx.is_saved:
            raise RuntimeError(f"lstm_triton::{self.name} was called with save=False and cannot be differentiated")
        grads, needs, options = grads[: self._n_gradients], ctx.needs_input_grad[-len(self.names) :], ctx.options
        if all(g is None for g in grads):
            return (None,) * len(self.names)
        tensors, by_reference, recorded = list(ctx.saved_tensors), takes_reference(*grads), torch.is_grad_enabled()
        for k, (t, version) in ctx.unread.items():
            if (by_reference or recorded) and _version(t) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation:"
                    f" {self.names[k]} of lstm_triton::{self.name} is at version {_version(t)}; expected version"
                    f" {version} instead"
                )
            tensors[k] = t
        if recorded:  # what is saved besides the inputs is detached, because it follows from them
            tensors[len(needs) :] = (None if t is None else t.detach() for t in tensors[len(needs) :])
        arguments = self._of_backward.grouped((*grads, *tensors, *options, needs))
        if by_reference:
            found = self.gradients_by_reference(grads, tensors[: len(needs)], options)
        elif sees_operators(*grads, *tensors):
            found = self.backward_operator(*grads, *tensors, *options, needs)
        elif recorded:
            found = self._second.apply(self._save_second, self._gradients, arguments, *grads, *tensors)
        else:
            return self._gradients(*arguments)
        return [g if needed else None for g, needed in zip(found, needs)]

    def _gradients(self, gradients, inputs, saved, options, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Return the inputs' gradients by the backward launcher."""
        names = frozenset(itertools.compress(self.names, needs))
        found = self.launch_backward(gradients, inputs, saved, names, options)
        return tuple(found[name] if name in names else None for name in self.names)

    def _fake_gradients(self, gradients, inputs, saved, options, needs: Sequence[bool]) -> list[Tensor | None]:
        found = self.fake_backward(inputs, saved)
        given = zip(self.names, inputs, needs)
        return [
            (found[name] if name in found else t.new_empty(t.shape)) if needed else None for name, t, needed in given
        ]

    def _save_second(self, ctx, outputs, gradients, inputs, saved, options, needs: Sequence[bool]) -> None:
        ctx.derivative, ctx.options, ctx.needs = self._second_derivative, options, needs
        ctx.save_for_backward(*gradients, *inputs)

    def _second_derivative(self, ctx, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the first derivative's gradients and inputs, and None for its saved tensors."""
        n, options, tensors = self._n_gradients, ctx.options, ctx.saved_tensors
        grads = [g if needed else None for g, needed in zip(grads, ctx.needs)]
        with self.kernels_products(tensors[n].dtype, options.precision):
            found = reference.back_through(
                lambda *t: self.gradients_by_reference(t[:n], t[n:], options), grads, tensors
            )
        return found + [None] * len(self.records.saved._fields)


def _imported(launcher: Callable | str) -> Callable:
    return pkgutil.resolve_name(f"{__package__}.kernels.{launcher}") if isinstance(launcher, str) else launcher


def _version(t: Tensor) -> int | None:
    """Return the number of in-place updates of t so far; None for an inference tensor, which does not count them."""
    return None if t.is_inference() else t._version


class _Function(_SingleLevelFunction):
    """A derivative of an operator: run(*arguments), where `tensors` are those of the arguments.

    save(ctx, outputs, *arguments) prepares for the next derivative, and sets ctx.derivative.

    Unlike torch.autograd.Function it looks up no signature, which takes several times as long as the rest, and it does not
    take torch.func's transforms apart: within these the dispatcher does that.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def forward(ctx, save, run, arguments, *tensors):
        outputs = run(*arguments)
        ctx.set_materialize_grads(False)
        save(ctx, outputs, *arguments)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *ctx.derivative(ctx, grads)
