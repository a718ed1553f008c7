"""`tune`: measure which backend and tiles run a call of an `LSTM` or a `Recurrent` fastest on this device, and record it.

cuDNN, one launch per step and a few configurations of the kernels are timed in turns, in a process of their own (`trial`).
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from . import dispatch, hooks, lstm, measurements, shapes
from .measurements import Row
from .process import Died, Process
from .shapes import Shape
from .trial import WAYS, Contender

_CANDIDATES = 5  # configurations forward, and as many backward, besides those that the cost model chooses
SERVE = "lstm_triton.trial:serve"  # what the measuring process runs
_ENVIRONMENT = {"LSTM_TRITON_TUNE": None, "LSTM_TRITON_TUNED": os.path.join(os.devnull, "none")}  # of that process
_SILENCE_S = 180.0  # the measuring process times out after such a silence; the first compilations take a minute


def tune(
    module: torch.nn.Module, *inputs: Any, budget_s: float = 60.0, quiet: bool = False, **kwargs: Any
) -> list[str]:
    """Measure what runs each `LSTM`, `GRU` and `Recurrent` in `module(*inputs, **kwargs)` fastest; backend="auto" then uses it.

    The module is called once to record the calls of these. Calls of the same sizes on random numbers are then measured:
    forward and backward if gradients are enabled and parameters need them, else the forward. The results are kept in a file
    (`lstm-triton info` says where) for this device and these versions.

    Args:
        budget_s: seconds for each call. An interrupt (Ctrl-C) ends it early, and keeps what has been measured.
        quiet: report no progress on standard error.

    Returns:
        A line for each call: the fastest backend, microseconds per call, and the speed relative to cuDNN.

    Raises:
        RuntimeError: no GPU that runs the kernels; nothing could be measured; a cell that another process cannot import.
        TypeError: a module without an `LSTM`, `GRU` or `Recurrent`.
    """
    found: dict[tuple[Shape, int, torch.device], None] = {}

    def note(part: Any, args: tuple, kwargs: dict) -> None:
        shape, steps, device = shapes.of_call(part, *args, **kwargs)
        cell = hooks.cell_of(part)
        found[shape if cell is None else shape._replace(cell=cell.key), steps, device] = None

    parts = [part for part in module.modules() if hooks.kind(part) is lstm.LSTM or hooks.cell_of(part)]
    if not parts:
        raise TypeError(f"tune() measures LSTM, GRU and Recurrent, and models with these, got {type(module).__name__}")
    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts]
    try:
        module(*inputs, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [str(tune_shape(*call, budget_s, quiet)) for call in found]


def tune_shape(shape: Shape, steps: int, device: torch.device, budget_s: float = 60.0, quiet: bool = False) -> Row:
    """Measure one call as `tune` does, add the result to the user's file and return it."""
    if why := dispatch.why_no_kernels(device, getattr(torch, shape.dtype)):
        raise RuntimeError(f"nothing to tune: {why}")
    begin, trials, forward = time.monotonic(), list[Trial](), None

    def say(text: str) -> None:
        if not quiet:
            print(f"{time.monotonic() - begin:4.0f} of {budget_s:.0f} s  {text}", file=sys.stderr, flush=True)

    cell = _cell(shape)
    if cell is not None and cell.__module__ == "__main__":
        raise RuntimeError(
            f"measured is in a process of its own: move the cell {cell.name} to a module that can be imported"
        )
    request, ways = dict(shape=shape, steps=steps, device=str(device), cell=cell), WAYS if shape.train else WAYS[:1]
    try:
        for part, way in enumerate(ways, 1):
            trials.append(Trial())
            trials[-1].measure(
                request, contenders(shape, steps, device, way, forward), begin + budget_s * part / len(ways), say
            )
            for name, microseconds in trials[-1].times.items():
                say(f"{name}: {microseconds:.1f} us")
            forward = trials[-1].configurations().get("forward")
    except KeyboardInterrupt:
        say("interrupted")
    trial = next((t for t in reversed(trials) if t.times), None)
    if trial is None:
        raise RuntimeError(f"nothing could be measured: {trials[0].faults or 'the budget is too short'}")
    fastest = min(trial.times, key=trial.times.__getitem__)
    configs = (trial.configurations().get(way) for way in WAYS)
    times = trial.times[fastest], trial.times.get("cudnn")
    row = Row(measurements.machine(device), shape, steps, fastest.partition(",")[0], *times, *configs)
    measurements.add(row)
    return row


def _cell(shape: Shape) -> Any:
    """Return the `cells.Cell`; None for an LSTM."""
    if shape.cell == "lstm":
        return None
    from .cells.declaration import declared

    return declared[shape.cell]


def _is_gru(cell: Any) -> bool:
    from .cells import GRU

    return cell is GRU.cell


def _tune_first_call(shape: Shape, steps: int, device: torch.device) -> None:
    """Run `tune_shape` once for each shape and length, and never while a CUDA graph is captured."""
    if device.type == "cuda" and (shape, steps) not in _tried and not torch.cuda.is_current_stream_capturing():
        _tried.add((shape, steps))
        print(tune_shape(shape, steps, device), file=sys.stderr)


_tried: set[tuple[Shape, int]] = set()
if os.environ.get("LSTM_TRITON_TUNE") == "1":
    measurements.tune_first_call = _tune_first_call


def contenders(
    shape: Shape, steps: int, device: torch.device, way: str, forward: dict | None = None
) -> dict[str, Contender]:
    """Return what to measure, by name: cuDNN, one launch per step, the cost model's choice, and for T > 1 other configurations
    of the kernel of this way: the cheapest by the model, no two with the same tile and warps.

    forward: the configuration of the forward for contenders that differ in the backward.
    """
    from .kernels.device import device_figures
    from .kernels.search import candidates

    cell, is_plain = _cell(shape), shape.features in ("", "packed") and not shape.recompute
    has_cudnn = is_plain and (cell is None or _is_gru(cell))
    found = {"cudnn": Contender("cudnn")} if has_cudnn else {}
    found |= {"triton-stepwise": Contender("triton-stepwise"), "triton": Contender("triton", forward)}
    tiles: dict[tuple[int, int, int], dict] = {}
    for c in candidates(measurements.problem_of(shape, way), device_figures(device)):
        if c.persistent and steps > 1:
            tiles.setdefault((c.block_b, c.block_h, c.num_warps), asdict(c))
    for (block_b, block_h, num_warps), config in list(tiles.items())[:_CANDIDATES]:
        name = f"triton, {way} tile {block_b} x {block_h}, {num_warps} warps"
        found[name] = Contender("triton", config) if way == "forward" else Contender("triton", forward, config)
    return found


class Trial:
    """Results of contenders by name: microseconds per call, configurations, and faults, why others were left out."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.configs: dict[str, dict[str, dict]] = {}
        self.faults: dict[str, str] = {}

    def configurations(self) -> dict[str, dict]:
        """Return the configurations, forward and backward, of the fastest contender that ran all steps in one launch."""
        ours = [name for name in self.times if name.partition(",")[0] == "triton"]
        best = min(ours, key=self.times.__getitem__, default=None)
        return {way: c for way, c in self.configs.get(best or "", {}).items() if c["persistent"]}

    def measure(self, request: dict, left: dict[str, Contender], deadline: float, say: Callable[[str], None]) -> None:
        """Let processes measure the contenders `left` until all are measured or left out, or the deadline has passed."""
        while left and time.monotonic() < deadline:
            doing, child = None, Process(SERVE, None, _ENVIRONMENT)
            limited = request | dict(contenders=left, seconds=(deadline - time.monotonic()) / 2)
            try:
                for event in child.ask(limited, _SILENCE_S, deadline):
                    doing = event.get("doing", doing)
                    self.times |= event.get("times", {})
                    if "configs" in event:
                        self.configs[event["name"]] = event["configs"]
                        say(f"{event['name']}: right")
                    elif "fault" in event:
                        self._out(left, event["name"], event["fault"], say)
                return
            except TimeoutError:
                return
            except Died:
                if doing is None:
                    raise RuntimeError("the process that measures did not start; its error is above") from None
                self._out(left, doing, "it crashed or hung", say)
            finally:
                child.end()

    def _out(self, left: dict[str, Contender], name: str, why: str, say: Callable[[str], None]) -> None:
        self.faults[name] = why
        self.times.pop(name, None)
        left.pop(name)
        say(f"{name}: {why}")
