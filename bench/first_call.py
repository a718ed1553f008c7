"""In a new process: the seconds of imports and of the first calls."""

import time
from typing import Any

import torch

from . import choice, host, problem, process
from .built import Built
from .cases import Case


def main(connection: Any, request: tuple[Case, str, str]) -> None:
    """Send import_s, first_call_s and second_call_s of (case, provider, kind of device)."""
    case, provider, device_type = request
    device = torch.device(device_type)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # CUDA itself starts before the clock does
        torch.cuda.synchronize()
    with host.conditions(provider, device):
        built = Built(choice.provider(provider), problem.make(case, device))
        times = []
        torch.set_grad_enabled(built.training)
        for _ in range(2):
            start = time.perf_counter()
            built.call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    connection.send({"import_s": process.imports_s, "first_call_s": times[0], "second_call_s": times[1]})
