"""The launch configurations that `--tune` tries, each as a provider."""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

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


def provider(name: str) -> providers.Provider:
    """The provider "tune <kernel> <number of the candidate>"."""
    kernel, _, number = name.removeprefix("tune ").rpartition(" ")
    return functools.partial(_tuned, kernel=kernel, number=int(number))


def _tuned(problem: Problem, kernel: str, number: int) -> providers.Model:
    from lstm_triton.kernels.device import device_limits

    config = candidates(kernel, problem.case, device_limits(problem.device))[number]
    model = providers.ours(problem, "triton")
    model.backend_reason = ", ".join(f"{n}={v}" for n, v in dataclasses.asdict(config).items() if v is not None)

    def with_config(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            _use(kernel, config)
            return function(*arguments)

        return call

    model.run, model.step = with_config(model.run), model.step and with_config(model.step)
    return model


@functools.cache
def _place(kernel: str) -> tuple[Any, str, Any]:
    """The module and the name where a kernel's launcher finds the shipped configuration, and that."""
    module_name, name = PLACES[kernel]
    module = importlib.import_module(f"lstm_triton.kernels.{module_name}")
    return module, name, getattr(module, name)


def _use(kernel: str, config: Any) -> None:
    """From now on every launch of `kernel` that may take any configuration takes this one."""
    module, name, shipped = _place(kernel)

    def configure(*arguments: Any, stepwise: bool = False) -> Any:
        return shipped(*arguments, stepwise=True) if stepwise else config

    setattr(module, name, configure)


def candidates(kernel: str, case: Case, limits: tuple[int, ...]) -> list[Any]:
    """Legal configurations, the shipped one first. limits: those of the device, SMs and bytes of shared memory in front."""
    from lstm_triton.kernels import config, sequence_config

    dtype, precision, shipped = getattr(torch, case.dtype), case.precision or "ieee", _place(kernel)[2]
    B, I, H, product = case.batch, case.input_size, case.hidden_size, itertools.product
    found: list[Any] = []
    if kernel == "cell forward":
        first = shipped(B, I, H, dtype, precision, limits[0])
        for warps, stages, b, h, k in product((4, 8), (2, 3, 4, 6), (16, 32, 64), (4, 8, 16, 32), (32, 64, 128)):
            if (b + 4 * h) * k * dtype.itemsize * stages <= limits[1]:
                found.append(config.CellForwardConfig(warps, stages, b, h, k))
    elif kernel == "cell backward":
        first = shipped(B, I, H, dtype, precision, limits[0])
        found = [config.CellBackwardConfig(*c) for c in product((4, 8), (2, 3), (16, 32, 64), (8, 16, 32), (32, 64))]
    else:
        first = shipped(B, H, case.directions, dtype, precision, sequence_config.DeviceLimits(*limits))
        found = list(_sequence(case, kernel == "sequence forward", first, limits, dtype.itemsize))
    return [first, *(c for c in dict.fromkeys(found) if c != first)]


def _sequence(case: Case, forward: bool, shipped: Any, limits: tuple[int, ...], itemsize: int) -> Iterator[Any]:
    """Variants of the shipped configuration that are launched the same way, and fit the device."""
    B, H, inner = case.batch, case.hidden_size, case.hidden_size if forward else 4 * case.hidden_size
    warps_and_split = ((4, 1), (8, 1)) if forward else ((8, 8), (4, 4))
    sizes = itertools.product(warps_and_split, (16, 32, 64), (8, 16, 32, 64, 128), (16, 32, 64, 128, 256))
    for (warps, split), b, h, k in sizes:
        if h > max(H, 8) * 2 or split * k > 2 * inner:
            continue
        programs, groups, chunks = -(-H // h), -(-B // b) * case.directions, -(-inner // (split * k))
        weights, chunk = (4 if forward else 1) * h * chunks * split * k * itemsize, b * split * k * itemsize
        # As many at once as have room in shared memory, and by twice what the shipped ones ask of registers.
        at_once = max(min((limits[1] - weights) // chunk, 512 * 32 * warps // chunk, chunks), 1)
        if shipped.persistent and (programs * groups > limits[0] or weights + at_once * chunk > limits[1]):
            continue
        for in_flight in sorted({1, -(-at_once // 2), at_once}) if shipped.persistent else {1}:
            tile = dict(num_warps=warps, block_b=b, block_h=h, split_k=split, block_k=k, in_flight=in_flight)
            yield dataclasses.replace(shipped, **tile, programs=programs, groups=groups)
