"""The launch configurations that `--tune` tries, each as a provider."""

import dataclasses
import functools
import importlib
import itertools
from typing import Any

import torch

from lstm_triton.kernels.device import device_figures
from lstm_triton.kernels.figures import DeviceFigures

from . import providers
from .cases import Case
from .problem import Problem

# The kernel's launcher finds its configuration under this name in this module of lstm_triton.kernels.
PLACES = {
    "cell forward": ("cell", "cell_forward_config"),
    "cell backward": ("cell_backward", "cell_backward_config"),
    "sequence forward": ("search", "choose"),
    "sequence backward": ("search", "choose"),
}
_FIXED = ("max_registers",)


def provider(name: str) -> providers.Provider:
    """The provider "tune <kernel> <number of the candidate>"."""
    kernel, _, number = name.removeprefix("tune ").rpartition(" ")
    return functools.partial(_tuned, kernel=kernel, number=int(number))


def _tuned(problem: Problem, kernel: str, number: int) -> providers.Model:
    config = candidates(kernel, problem.case, device_figures(problem.device))[number]
    model = providers.ours(problem, "triton")
    model.backend_reason = ", ".join(f"{n}={v}" for n, v in dataclasses.asdict(config).items() if v is not None)

    def with_config(function: Any, *arguments: Any) -> Any:
        _use(kernel, config)
        return function(*arguments)

    model.run = functools.partial(with_config, model.run)
    model.step = model.step and functools.partial(with_config, model.step)
    return model


@functools.cache
def _place(kernel: str) -> tuple[Any, str, Any]:
    """The module and the name where a kernel's launcher finds the shipped configuration, and that."""
    module = importlib.import_module(f"lstm_triton.kernels.{PLACES[kernel][0]}")
    return module, PLACES[kernel][1], getattr(module, PLACES[kernel][1])


def _use(kernel: str, config: Any) -> None:
    """From now on every launch of `kernel` that may take any configuration takes this one."""
    module, name, shipped = _place(kernel)

    def configure(problem: Any, *arguments: Any) -> Any:
        others = name == "choose" and (problem.stepwise or kernel != f"sequence {problem.way}")
        return shipped(problem, *arguments) if others else config

    setattr(module, name, configure)


def candidates(kernel: str, case: Case, device: DeviceFigures) -> list[Any]:
    """Of a sequence, the candidates of the search, the cheapest by its model in front.

    Of a cell, the shipped configuration, then all that differ from it by a factor of 2 in one or two fields; what does not
    compile or fit says so when it is tried.
    """
    dtype, precision = getattr(torch, case.dtype), case.precision or "ieee"
    if kernel.startswith("sequence"):
        from lstm_triton.kernels import search, sequence_config

        sizes = case.batch, case.hidden_size, case.directions
        found = search.candidates(sequence_config.Problem(kernel.split()[1], *sizes, dtype, precision), device)
        return [c for c in found if c.persistent == found[0].persistent]
    shipped = _place(kernel)[2](case.batch, case.input_size, case.hidden_size, dtype, precision, device.sms)
    fields = {n: v for n, v in dataclasses.asdict(shipped).items() if isinstance(v, int) and n not in _FIXED}
    steps = [(name, max(int(value * factor), 1)) for name, value in fields.items() for factor in (0.5, 2)]
    pairs = itertools.chain(itertools.combinations(steps, 1), itertools.combinations(steps, 2))
    return list(dict.fromkeys([shipped, *(dataclasses.replace(shipped, **dict(changes)) for changes in pairs)]))
