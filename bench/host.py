"""Costs of a call besides device time: host microseconds and their parts, the first call of a process, memory."""

import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lstm_triton import dispatch, process, timing
from lstm_triton.kernels.launch import Launcher

from . import problem, providers
from .cases import Case
from .checks import Built

BATCHES, CALLS = 25, 100  # and a tenth of the calls where the run asks for haste
_TIMEOUT_S = 300


def overhead(built: Built, provider: str, calls: int) -> dict[str, float]:
    """total_us of a call, and for this package of it launch_us (each kernel launch timed again by itself), dispatch_us (the
    choice of a backend) and checks_us (the rest: module, checks, autograd, allocation); launches.
    """
    device, launches, original = built.problem.device, list[Callable[[], Any]](), Launcher.__call__

    def host_us(call: Callable[[], Any]) -> float:
        return timing.median_us(call, timing.Clock(device, host=True), BATCHES, calls)

    def recording(self: Any, *arguments: Any, **options: Any) -> Any:
        launches.append(functools.partial(self, *arguments, **options))
        return original(self, *arguments, **options)

    with torch.set_grad_enabled(built.training):
        found = {"total_us": host_us(built.call)}
        if not provider.startswith("lstm_triton"):
            return found
        with mock.patch.object(Launcher, "__call__", recording):
            built.call()
        found["launch_us"] = sum(map(host_us, launches))
    chosen = functools.partial(dispatch.layer_backend, plain=True, long=False, precision=None)
    if built.problem.case.form == "cell":
        chosen = dispatch.cell_backend
    found["dispatch_us"] = host_us(functools.partial(chosen, provider.split()[1], device, built.inputs[0].dtype))
    found["checks_us"] = max(found["total_us"] - found["launch_us"] - found["dispatch_us"], 0.0)
    return found | {"launches": float(len(launches))}


def cold_start(case: Case, provider: str, device: torch.device) -> dict[str, float]:
    """Seconds to import, of the first call (for this package with an empty and with a warm cache of kernels) and of the
    second, in new processes.
    """
    values: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="lstm-triton-cold-") as cache:
        for kind in ("empty", "warm") if provider.startswith("lstm_triton") else ("empty",):
            found = _new_process(case, provider, device, cache)
            values |= {f"{kind}_{name}": seconds for name, seconds in found.items()}
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
    with torch.set_grad_enabled(built.training):
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
    given, saved = {_storage(t) for t in (*built.inputs, *built.model.weights.values())}, dict[int, int]()

    def pack(t: Tensor) -> Tensor:
        if _storage(t) not in given:
            saved[_storage(t)] = t.untyped_storage().nbytes()
        return t

    with torch.set_grad_enabled(built.training), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = built.forward()
    # saved tensors stay alive with the outputs, so that no address is counted for two of them
    outside = {_storage(t): t.untyped_storage().nbytes() for t in outputs if _storage(t) not in saved}
    found = {"saved": sum(saved.values()), "outputs": sum(outside.values())}
    del outputs
    return found | (_held_on_gpu(built) if built.problem.device.type == "cuda" else {})


def _held_on_gpu(built: Built) -> dict[str, int]:
    device = built.problem.device
    with torch.set_grad_enabled(built.training):
        built.call()  # compiled, workspaces allocated
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        outputs = built.forward()
        after_forward = torch.cuda.memory_allocated(device) - before
        if built.training:
            torch.autograd.grad(outputs[0], list(built.leaves.values()), built.dy)
    torch.cuda.synchronize(device)
    return {"after_forward": after_forward, "peak": torch.cuda.max_memory_allocated(device) - before}


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
