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
    """Rows of the fused kernels, of what torch has instead, and of torch's other form.

    values: total_us, of it launch_us (all kernel launches), dispatch_us (the choice of backend) and checks_us (the rest:
    module, checks, autograd, allocation), launches.
    """
    from .measure import brief, build, precision, reraise_fatal

    case, everyone = task.case, providers.all_providers()
    with_driver = context.device.type != "cuda"
    ours = "lstm_triton triton"
    names = [ours, *([providers.TORCH_CELL] if case.form == "cell" else [providers.CUDNN])]
    for name in names:
        if (name, "eager") in skip:
            continue
        context.stage(name, "eager", "host time")
        label = null_driver.LABEL if with_driver and name == ours else None
        if with_driver and name != ours:
            label = "no GPU: with the CPU's own arithmetic, on one row"
        driver = null_driver.active() if with_driver and name == ours else contextlib.nullcontext()
        try:
            training = torch.set_grad_enabled(case.mode == "train")
            with precision(case), driver, _few_threads(with_driver), training:
                problem = problems.make(case, context.device)
                built = build(everyone[name], problem)
                calls = CALLS if context.seconds >= 0.3 else CALLS // 10
                values = {"total_us": host_us(built.timed, context.device, calls)}
                if name == ours:
                    values |= split(built, context.device, case.form, values["total_us"], calls)
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


def split(built: "Built", device: torch.device, form: str, total: float, calls: int) -> dict[str, float]:
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
        choice = host_us(lambda: dispatch.cell_backend("triton", device, dtype), device, calls)
    else:
        choice = host_us(lambda: dispatch.layer_backend("triton", device, dtype, True, False, None), device, calls)
    return {
        "launch_us": launch,
        "dispatch_us": choice,
        "checks_us": max(total - launch - choice, 0.0),
        "launches": float(len(launches)),
    }
