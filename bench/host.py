"""What a call costs besides device time: host microseconds and what they go into, the first call of a process, memory."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lstm_triton import dispatch
from lstm_triton.kernels.launch import Launcher

from . import null_driver, timing
from .built import Built
from .cases import Case
from .process import Process

BATCHES, CALLS = 25, 100  # and a tenth of the calls where the run asks for haste
_TIMEOUT_S = 300


@contextlib.contextmanager
def conditions(provider: str, device: torch.device) -> Iterator[str | None]:
    """Within, calls can be made; gives the label of what is made. Without a GPU: one thread, kernels on a driver that launches
    nothing.
    """
    if device.type == "cuda":
        yield None
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if null_driver.serves(provider):
            with null_driver.active(null_driver.NullDriver()):
                yield null_driver.LABEL
        else:
            yield "no GPU: with the CPU's own arithmetic, on one row"
    finally:
        torch.set_num_threads(threads)


def overhead(built: Built, provider: str, device: torch.device, calls: int) -> dict[str, float]:
    """total_us of a call, and for this package of it launch_us (each kernel launch timed again by itself), dispatch_us (the
    choice of a backend) and checks_us (the rest: module, checks, autograd, allocation); launches.
    """
    with torch.set_grad_enabled(built.training):

        def host_us(call: Callable[[], Any]) -> float:
            return timing.median_us(call, timing.HostClock(device), BATCHES, calls)

        total = host_us(built.call)
        if not provider.startswith("lstm_triton"):
            return {"total_us": total}
        launches: list[tuple[Any, tuple, dict]] = []
        original = Launcher.__call__

        def recording(self: Any, *arguments: Any, **options: Any) -> Any:
            launches.append((self, arguments, options))
            return original(self, *arguments, **options)

        with mock.patch.object(Launcher, "__call__", recording):
            built.call()
        launch = sum(host_us(functools.partial(s, *a, **o)) for s, a, o in launches)
    backend, dtype = provider.split()[1], built.inputs[0].dtype
    if built.problem.case.form == "cell":
        choice = host_us(lambda: dispatch.cell_backend(backend, device, dtype))
    else:
        choice = host_us(lambda: dispatch.layer_backend(backend, device, dtype, True, False, None))
    rest = max(total - launch - choice, 0.0)
    parts = {"launch_us": launch, "dispatch_us": choice, "checks_us": rest, "launches": float(len(launches))}
    return {"total_us": total} | parts


def cold_start(case: Case, provider: str, device: torch.device) -> tuple[dict[str, float], str | None]:
    """Seconds to import, of the first call (for this package with an empty and with a warm cache of kernels) and of the
    second, in new processes; and the label of it.
    """
    with tempfile.TemporaryDirectory(prefix="lstm-triton-cold-") as cache:
        values = {f"empty_{name}": seconds for name, seconds in _new_process(case, provider, device, cache).items()}
        if provider.startswith("lstm_triton"):
            values |= {f"warm_{name}": seconds for name, seconds in _new_process(case, provider, device, cache).items()}
    without_gpu = device.type != "cuda" and null_driver.serves(provider)
    return values, null_driver.LABEL if without_gpu else None


def _new_process(case: Case, provider: str, device: torch.device, cache: str) -> dict[str, float]:
    child = Process("worker:first_calls", (case, provider, device.type), None, {"TRITON_CACHE_DIR": cache})
    try:
        return child.receive(_TIMEOUT_S)
    finally:
        child.end()


def held(built: Built) -> dict[str, int]:
    """Bytes of one training step.

    saved: in tensors that autograd keeps for backward, each storage once, without inputs and weights. On a GPU also, above what
    there was before: after_forward, and peak over forward and backward, which take in what no tensor shows.
    """
    given = {_storage(t) for t in (*built.inputs, *built.model.weights.values())}
    saved: dict[int, int] = {}

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
