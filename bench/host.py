"""Costs of a call besides its time: the first call of a process, and memory."""

import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from lstm_triton import process

from . import problem, providers
from .cases import Case
from .checks import Built

_TIMEOUT_S = 300


def cold_start(case: Case, provider: str, device: torch.device) -> dict[str, float]:
    """Seconds to import, of the first call (for this package with an empty and with a warm cache of kernels) and of the
    second, in new processes.
    """
    values: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="lstm-triton-cold-") as cache:
        for kind in ("empty", "warm") if provider.startswith("lstm_triton") else ("empty",):
            values |= {f"{kind}_{name}": s for name, s in _new_process(case, provider, device, cache).items()}
    return values


def _new_process(case: Case, provider: str, device: torch.device, cache: str) -> dict[str, float]:
    environment = {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": None}
    child = process.Process(f"{__name__}:first_calls", (case, provider, device.type), environment)
    try:
        return child.receive(_TIMEOUT_S)
    finally:
        child.end()


def first_calls(connection: Any, request: tuple[Case, str, str]) -> None:
    """In a new process: send import_s, first_call_s and second_call_s of (case, provider, kind of device)."""
    case, provider, device_type = request
    synchronize = torch.cuda.synchronize if device_type == "cuda" else lambda: None
    built = Built(providers.PROVIDERS[provider], problem.make(case, torch.device(device_type)))
    synchronize()  # CUDA itself starts before the clock does
    times = [time.perf_counter()]
    with torch.set_grad_enabled(built.problem.training):
        for _ in range(2):
            built.call()
            synchronize()
            times.append(time.perf_counter())
    first, second = times[1] - times[0], times[2] - times[1]
    connection.send({"import_s": process.imports_s, "first_call_s": first, "second_call_s": second})


def held(built: Built) -> dict[str, int]:
    """Bytes of one training step.

    saved: in tensors that autograd keeps for backward, each storage once, without inputs and weights. On a GPU also, above what
    there was before: after_forward, and peak over forward and backward, which take in what no tensor shows.
    """
    device = built.problem.device
    with torch.set_grad_enabled(built.problem.training):
        given, saved = _storages((*built.inputs, *built.model.weights.values())), dict[int, int]()

        def pack(t: Tensor) -> Tensor:
            saved.update(_storages([t]).items() - given.items())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = built.forward()
        # saved tensors stay alive with the outputs, so that no address is counted for two of them
        found = {
            "saved": sum(saved.values()),
            "outputs": sum(dict(_storages(outputs).items() - saved.items()).values()),
        }
        del outputs
        if device.type == "cuda":
            built.call()  # compiled, workspaces allocated
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            outputs = built.forward()
            found["after_forward"] = torch.cuda.memory_allocated(device) - before
            if built.leaves:
                torch.autograd.grad(outputs[0], list(built.leaves.values()), built.dy)
            torch.cuda.synchronize(device)
            found["peak"] = torch.cuda.max_memory_allocated(device) - before
    return found


def _storages(tensors: Any) -> dict[int, int]:
    """Bytes by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
