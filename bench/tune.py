"""`--tune`: try launch configurations beside the shipped ones, and print what would be worth pasting. Nothing is changed.

Each candidate's results are compared with float64 before it is timed, in turns with the shipped configuration. Candidates
run in a process of their own: one that hangs or corrupts the device is written off, the next go on in a new process.
"""

import dataclasses
import datetime
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from . import accuracy, child, measure, problem, providers, timing
from .cases import Case

KERNELS = ("cell forward", "cell backward", "sequence forward", "sequence backward")
_SILENCE_S = 90.0
WORTH = 0.02  # a gain below this is noise, or not worth a number in the source


@dataclasses.dataclass(frozen=True)
class Result:
    """One candidate. us: microseconds per call; shipped_us: of the shipped configuration in the same rounds."""

    candidate: dict[str, Any]
    reason: str | None
    us: float | None = None
    shipped_us: float | None = None

    @property
    def gain(self) -> float:
        return self.shipped_us / self.us - 1 if self.us and self.shipped_us else 0.0


def run(device: str, hidden: Any, batch: Any, dtypes: Sequence[str] | None, budget_s: float | None) -> int:
    """Sweep; exit code 2 without a GPU."""
    if device == "cpu":
        print(
            "lstm-triton bench --tune: needs an NVIDIA GPU; a CPU says nothing about launch configurations",
            file=sys.stderr,
        )
        return 2
    deadline = None if budget_s is None else time.monotonic() + budget_s
    best: list[tuple[str, Case, Result]] = []
    for kernel in KERNELS:
        for case in cases(kernel, hidden, batch, dtypes):
            if deadline is not None and time.monotonic() >= deadline:
                break
            results = sweep_in_processes(kernel, case, device, deadline)
            good = [r for r in results if r.us is not None]
            print(f"{kernel}, {case.describe()}: {len(good)} of {len(results)} candidates right", flush=True)
            if good and max(r.gain for r in good) >= WORTH:
                best.append((kernel, case, max(good, key=lambda r: r.gain)))
    print(table(best, torch.cuda.get_device_name(torch.device(device)), datetime.date.today().isoformat()))
    return 0


def cases(kernel: str, hidden: Any, batch: Any, dtypes: Sequence[str] | None) -> list[Case]:
    """The problems of a sweep; hidden and batch are tests of a size, or None."""
    mode = "train" if kernel.endswith("backward") else "forward"
    form, length = ("cell", 1) if kernel.startswith("cell") else ("layer", 128)
    found = []
    for H in (768, 512, 1024, 256, 128, 2048):
        for B in (16, 64, 1, 256):
            for dtype in dtypes or ("bfloat16", "float16", "float32"):
                if (hidden is None or hidden(H)) and (batch is None or batch(B)):
                    precision = "tf32" if dtype == "float32" else ""
                    found.append(Case("tune", H, B, length, form=form, mode=mode, dtype=dtype, precision=precision))
    return found


def candidates(kernel: str, case: Case, limits: tuple[int, ...]) -> list[Any]:
    """Legal configurations, the shipped one first. limits: multiprocessors, shared memory of one program in bytes."""
    from lstm_triton.kernels import config, sequence_config

    dtype = getattr(torch, case.dtype)
    precision = case.precision or "ieee"
    B, I, H = case.batch, case.input_size, case.hidden_size
    found: list[Any] = []
    if kernel == "cell forward":
        shipped: Any = config.cell_forward_config(B, I, H, dtype, precision, limits[0])
        for warps, stages, b, h, k in _product((4, 8), (2, 3, 4, 6), (16, 32, 64), (4, 8, 16, 32), (32, 64, 128)):
            if (b + 4 * h) * k * dtype.itemsize * stages <= limits[1]:
                found.append(config.CellForwardConfig(warps, stages, b, h, k))
    elif kernel == "cell backward":
        shipped = config.cell_backward_config(B, I, H, dtype, precision, limits[0])
        for warps, stages, b, h, n in _product((4, 8), (2, 3), (16, 32, 64), (8, 16, 32), (32, 64)):
            found.append(config.CellBackwardConfig(warps, stages, b, h, n))
    else:
        forward = kernel == "sequence forward"
        configure = sequence_config.sequence_forward_config if forward else sequence_config.sequence_backward_config
        shipped = configure(B, H, case.directions, dtype, precision, sequence_config.DeviceLimits(*limits))
        found += list(_sequence(case, forward, shipped, limits, dtype.itemsize))
    return [shipped, *(c for c in dict.fromkeys(found) if c != shipped)]


def _sequence(case: Case, forward: bool, shipped: Any, limits: tuple[int, ...], itemsize: int) -> Iterator[Any]:
    """Variants of the shipped configuration that are launched the same way, and fit the device."""
    B, H, D = case.batch, case.hidden_size, case.directions
    inner = H if forward else 4 * H
    warps_and_split = ((4, 1), (8, 1)) if forward else ((8, 8), (4, 4))
    for (warps, split), b, h, k in _product(
        warps_and_split, (16, 32, 64), (8, 16, 32, 64, 128), (16, 32, 64, 128, 256)
    ):
        if h > max(H, 8) * 2 or split * k > 2 * inner:
            continue
        programs, groups = -(-H // h), -(-B // b) * D
        chunks = -(-inner // (split * k))
        weights = (4 if forward else 1) * h * chunks * split * k * itemsize
        chunk = b * split * k * itemsize
        # As many at once as have room in shared memory, and by twice what the shipped ones ask of registers.
        at_once = max(min((limits[1] - weights) // chunk, 512 * 32 * warps // chunk, chunks), 1)
        if shipped.persistent and (programs * groups > limits[0] or weights + at_once * chunk > limits[1]):
            continue
        for in_flight in sorted({1, -(-at_once // 2), at_once}) if shipped.persistent else {1}:
            yield dataclasses.replace(
                shipped, num_warps=warps, block_b=b, block_h=h, split_k=split, block_k=k, in_flight=in_flight,
                programs=programs, groups=groups,
            )  # fmt: skip


def _product(*choices: Sequence[Any]) -> Iterator[tuple]:
    return itertools.product(*choices)


def _place(kernel: str) -> tuple[Any, str]:
    """The module and the name under which a kernel's launcher finds its configuration."""
    from lstm_triton.kernels import cell, cell_backward, layer, layer_backward

    return {
        "cell forward": (cell, "cell_forward_config"),
        "cell backward": (cell_backward, "cell_backward_config"),
        "sequence forward": (layer, "sequence_forward_config"),
        "sequence backward": (layer_backward, "sequence_backward_config"),
    }[kernel]


@contextmanager
def using(kernel: str) -> Iterator[Callable[[Any], None]]:
    """use(config) inside: from then on every launch of `kernel` that may take any configuration takes this one."""
    module, name = _place(kernel)
    original = getattr(module, name)

    def use(config: Any) -> None:
        def configure(*arguments: Any, stepwise: bool = False) -> Any:
            return original(*arguments, stepwise=True) if stepwise else config

        setattr(module, name, configure)

    try:
        yield use
    finally:
        setattr(module, name, original)


def sweep(
    kernel: str, case: Case, device: torch.device, clock: timing.Clock, tell: Callable[[int, Result | None], None],
    first: int = 0, limits: tuple[int, ...] | None = None, seconds: float = 0.3,
) -> None:  # fmt: skip
    """Try the candidates from number `first` on; tell(k, None) before the k-th, tell(k, result) after it."""
    from lstm_triton.kernels.launch import device_limits

    found = candidates(kernel, case, limits or device_limits(device))
    with measure.precision(case):
        given = problem.make(case, device)
        truth = problem.truth(given)
        torchs: providers.Provider = providers.TorchLSTM() if case.form == "layer" else providers.TorchCell()
        yardstick = accuracy.errors(measure.build(torchs, given).call(), truth)
        built = measure.build(providers.Ours("triton"), given)
        for k, candidate in enumerate(found):
            if k < first:
                continue
            tell(k, None)
            tell(k, _try(kernel, case, built, truth, yardstick, candidate, found[0], clock, seconds))


def _try(kernel, case, built, truth, yardstick, candidate, shipped, clock, seconds) -> Result:
    data = dataclasses.asdict(candidate)
    with using(kernel) as use:
        try:
            use(candidate)
            if reason := accuracy.why_wrong(case, accuracy.errors(built.call(), truth), yardstick):
                return Result(data, reason)

            def call_with(config: Any) -> Callable[[], Any]:
                def call() -> None:
                    use(config)
                    built.timed()

                return call

            with torch.set_grad_enabled(case.mode == "train"):
                calls = {"candidate": call_with(candidate), "shipped": call_with(shipped)}
                both = timing.interleaved(calls, clock, seconds)
        except Exception as error:
            measure.reraise_fatal(error.__cause__ or error)
            return Result(data, measure.brief(error.__cause__ or error))
    us = {name: s.to_json(1, clock)["p50_us"] for name, s in both.items()}
    return Result(data, None, us["candidate"], us["shipped"])


def sweep_in_processes(kernel: str, case: Case, device: str, deadline: float | None) -> list[Result]:
    """`sweep` in processes that are replaced when they die; what was being tried then counts as failed."""
    results: list[Result] = []
    first = 0
    while True:
        request = json.dumps({"kernel": kernel, "case": case.to_json(), "device": device, "first": first})
        command = child.command("tune", request)
        process = subprocess.Popen(command, env=child.environment(), stdout=subprocess.PIPE, text=True)
        trying, finished = _listen(process, results, deadline)
        if finished or trying is None:
            return results
        results.append(Result({}, f"candidate {trying}: the process died or hung"))
        first = trying + 1


def _listen(process: Any, results: list[Result], deadline: float | None) -> tuple[int | None, bool]:
    """(what was being tried at the end, whether all were); at the deadline the process is ended, and that is all."""
    trying = None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    left = None if deadline is None else max(deadline - time.monotonic(), 0.1)
    budget = threading.Timer(left, end) if left is not None else None
    if budget:
        budget.start()
    silence = threading.Timer(_SILENCE_S, process.kill)
    silence.start()
    finished = False
    for line in process.stdout:
        silence.cancel()
        silence = threading.Timer(_SILENCE_S, process.kill)
        silence.start()
        event = json.loads(line)
        finished = event.get("finished", False)
        if "result" in event:
            results.append(Result(**event["result"]))
            trying = None
        elif "trying" in event:
            trying = event["trying"]
    silence.cancel()
    if budget:
        budget.cancel()
    process.wait()
    return (None, True) if late.is_set() else (trying, finished)


def table(best: Sequence[tuple[str, Case, Result]], gpu: str, date: str) -> str:
    """What to paste, as comments beside the numbers of kernels/config.py and kernels/sequence_config.py."""
    if not best:
        return f"No candidate beats a shipped configuration by {WORTH:.0%} on {gpu}."
    lines = [f"Gains over the shipped configurations, {gpu}, {date}:", ""]
    for kernel, case, result in best:
        values = ", ".join(f"{name}={value}" for name, value in result.candidate.items() if value is not None)
        shape = f"H {case.hidden_size}, B {case.batch}, {case.dtype_name}"
        lines.append(
            f"# {kernel}, {shape}: {gpu}, {date}, {result.gain:+.1%} ({result.shipped_us:.4g} -> {result.us:.4g} us)"
        )
        lines.append(f"#   {values}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """In a process of its own: one sweep, told as JSON lines."""
    request = json.loads(arguments[0])
    device = torch.empty(0, device=request["device"]).device  # with its index

    def tell(k: int, result: Result | None) -> None:
        print(json.dumps({"trying": k} if result is None else {"result": dataclasses.asdict(result)}), flush=True)

    case = Case.from_json(request["case"])
    sweep(request["kernel"], case, device, timing.clock(device, False), tell, request["first"])
    print(json.dumps({"finished": True}), flush=True)
    return 0
