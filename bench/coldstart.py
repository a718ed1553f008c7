"""The first call of a new process: with an empty cache of compiled kernels, and with a warm one."""

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from . import child
from .cases import Case, Task

if TYPE_CHECKING:
    from .measure import Context, Emit

_TIMEOUT_S = 300


def measure(task: Task, context: "Context", emit: "Emit", skip: Collection[tuple[str, str]]) -> None:
    """A row for each provider: seconds to import, of the first call (for this package with an empty and with a warm
    cache of kernels) and of the second.
    """
    from . import null_driver
    from .measure import brief, names_of

    for name in names_of(task, context.device.type, context.names):
        if (name, "eager") in skip:
            continue
        context.stage(name, "eager", "cold start")
        label = null_driver.LABEL if context.device.type != "cuda" and null_driver.serves(name) else None
        try:
            with tempfile.TemporaryDirectory(prefix="lstm-triton-cold-") as cache:
                empty = _child(task.case, name, context.device.type, cache)
                values = {f"empty_{k}": v for k, v in empty.items()}
                if name.startswith("lstm_triton"):
                    warm = _child(task.case, name, context.device.type, cache)
                    values |= {f"warm_{k}": v for k, v in warm.items()}
            emit(context.rows.make(task, name, "eager", "ok", None, values=values, label=label))
        except Exception as error:
            emit(context.rows.make(task, name, "eager", "failed", brief(error)))


def _child(case: Case, provider: str, device_type: str, cache: str) -> dict[str, float]:
    environ = child.environment(more={"TRITON_CACHE_DIR": cache})
    request = json.dumps({"case": case.to_json(), "provider": provider, "device": device_type})
    command = child.command("coldstart", request)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the new process failed without a word"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str]) -> int:
    """In the new process: print the seconds as JSON."""
    request: dict[str, Any] = json.loads(arguments[0])
    begin = time.perf_counter()
    import torch

    from . import measure as measuring
    from . import null_driver, problem, providers

    imported = time.perf_counter()
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.zeros(1, device=device)  # CUDA itself starts before the clock does
        torch.cuda.synchronize()
    with_driver = device.type != "cuda" and null_driver.serves(request["provider"])
    with null_driver.active(null_driver.NullDriver()) if with_driver else contextlib.nullcontext():
        case = Case.from_json(request["case"])
        built = measuring.build(providers.all_providers()[request["provider"]], problem.make(case, device))
        times = []
        torch.set_grad_enabled(case.mode == "train")
        for _ in range(2):
            start = time.perf_counter()
            built.timed()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    print(json.dumps({"import_s": imported - begin, "first_call_s": times[0], "second_call_s": times[1]}))
    return 0
