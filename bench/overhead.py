"""What a call costs the host: in all, in choosing a backend, in launching."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from . import null_driver, providers, stats
from . import problem as problems
from .cases import Task

if TYPE_CHECKING:
    from .measure import Built, Context, Emit

BATCHES, CALLS = 25, 100  # and a tenth of the calls where the run asks for haste


def measure(task: Task, context: "Context", emit: "Emit", skip: Collection[tuple[str, str]]) -> None:
    """A row for each provider.

    values: total_us, of it launch_us (all kernel launches), dispatch_us (the choice of backend) and checks_us (the rest:
    module, checks, autograd, allocation), launches.
    """
    from .measure import brief, build, names_of, precision, reraise_fatal

    case, everyone = task.case, providers.all_providers()
    without_gpu = context.device.type != "cuda"
    for name in names_of(task, context.device.type, context.names):
        if (name, "eager") in skip:
            continue
        context.stage(name, "eager", "host time")
        with_driver = without_gpu and null_driver.serves(name)
        label = null_driver.LABEL if with_driver else None
        if without_gpu and not with_driver:
            label = "no GPU: with the CPU's own arithmetic, on one row"
        driver = null_driver.active(null_driver.NullDriver()) if with_driver else contextlib.nullcontext()
        try:
            training = torch.set_grad_enabled(case.mode == "train")
            with precision(case), driver, _few_threads(without_gpu), training:
                problem = problems.make(case, context.device)
                built = build(everyone[name], problem)
                calls = CALLS if context.seconds >= 0.3 else CALLS // 10
                values = {"total_us": host_us(built.timed, context.device, calls)}
                provider = everyone[name]
                if isinstance(provider, providers.Ours):
                    values |= split(built, context.device, case.form, provider.backend, values["total_us"], calls)
            emit(context.rows.make(task, name, "eager", "ok", None, built.model, values=values, label=label))
        except providers.Unavailable as error:
            emit(context.rows.make(task, name, "eager", "skipped", str(error)))
        except Exception as error:
            emit(context.rows.make(task, name, "eager", "failed", brief(error)))
            reraise_fatal(error)


@contextlib.contextmanager
def _few_threads(wanted: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def host_us(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Median host microseconds of a call, the device left to catch up between batches of `calls`."""
    times = []
    for batch in range(BATCHES + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if batch >= 2:  # the first ones compile
            times.append((time.perf_counter() - begin) * 1e6 / calls)
    return stats.percentile(times, 50)


def split(built: "Built", device: torch.device, form: str, backend: str, total: float, calls: int) -> dict[str, float]:
    """Of one call: each of its launches timed again by itself, and the choice of the backend."""
    from lstm_triton import dispatch
    from lstm_triton.kernels.launch import Launcher

    launches: list[tuple[Any, tuple, dict]] = []
    original = Launcher.__call__

    def recording(self: Any, *arguments: Any, **options: Any) -> Any:
        launches.append((self, arguments, options))
        return original(self, *arguments, **options)

    with mock.patch.object(Launcher, "__call__", recording):
        built.timed()
    launch = sum(host_us(lambda s=s, a=a, o=o: s(*a, **o), device, calls) for s, a, o in launches)  # type: ignore[misc]
    dtype = next(iter(built.model.weights.values())).dtype
    if form == "cell":
        choice = host_us(lambda: dispatch.cell_backend(backend, device, dtype), device, calls)
    else:
        choice = host_us(lambda: dispatch.layer_backend(backend, device, dtype, True, False, None), device, calls)
    return {
        "launch_us": launch,
        "dispatch_us": choice,
        "checks_us": max(total - launch - choice, 0.0),
        "launches": float(len(launches)),
    }
