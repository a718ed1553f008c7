"""The launch configurations that `--tune` tries, each as a provider: neighbours of the shipped one in every field."""

import dataclasses
import functools
import importlib
import itertools
from typing import Any

import torch

from lstm_triton.kernels.device import device_limits

from . import providers
from .cases import Case
from .problem import Problem

# The kernel's launcher finds its configuration under this name in this module of lstm_triton.kernels.
PLACES = {
    "cell forward": ("cell", "cell_forward_config"),
    "cell backward": ("cell_backward", "cell_backward_config"),
    "sequence forward": ("layer", "sequence_forward_config"),
    "sequence backward": ("layer_backward", "sequence_backward_config"),
}
_FIXED = ("persistent", "programs", "groups", "max_registers")  # follow from the others, or decide the way of launching


def provider(name: str) -> providers.Provider:
    """The provider "tune <kernel> <number of the candidate>"."""
    kernel, _, number = name.removeprefix("tune ").rpartition(" ")
    return functools.partial(_tuned, kernel=kernel, number=int(number))


def _tuned(problem: Problem, kernel: str, number: int) -> providers.Model:
    config = candidates(kernel, problem.case, device_limits(problem.device))[number]
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

    def configure(*arguments: Any, stepwise: bool = False) -> Any:
        return shipped(*arguments, stepwise=True) if stepwise else config

    setattr(module, name, configure)


def candidates(kernel: str, case: Case, limits: tuple[int, ...]) -> list[Any]:
    """The shipped configuration, then all that differ from it by a factor of 2 in one or two fields and are launched the same
    way. limits: those of the device, its SMs in front. What does not compile or fit says so when it is tried.
    """
    from lstm_triton.kernels.sequence_config import DeviceLimits

    dtype, precision, configure = getattr(torch, case.dtype), case.precision or "ieee", _place(kernel)[2]
    sequence = kernel.startswith("sequence")
    if sequence:
        shipped = configure(case.batch, case.hidden_size, case.directions, dtype, precision, DeviceLimits(*limits))
    else:
        shipped = configure(case.batch, case.input_size, case.hidden_size, dtype, precision, limits[0])
    fields = {n: v for n, v in dataclasses.asdict(shipped).items() if isinstance(v, int) and n not in _FIXED}
    steps = [(name, max(int(value * factor), 1)) for name, value in fields.items() for factor in (0.5, 2)]
    found = [shipped]
    for changes in itertools.chain(itertools.combinations(steps, 1), itertools.combinations(steps, 2)):
        tried = dataclasses.replace(shipped, **dict(changes))
        if sequence:
            groups = -(-case.batch // tried.block_b) * case.directions
            tried = dataclasses.replace(tried, programs=-(-case.hidden_size // tried.block_h), groups=groups)
        if tried not in found and not (sequence and tried.persistent and tried.programs * tried.groups > limits[0]):
            found.append(tried)
    return found
