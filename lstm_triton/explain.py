"""`explain`: which backend a call of a module would use, and why."""

import inspect
import time
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence

from . import casting, dispatch, hooks, layers, lstm, measurements, shapes
from .dispatch import CUDNN_MAX_STEPS, Call, Choice, choose_cell, choose_layer, choose_readout
from .kernels.device import matmul_precision
from .kernels.inputs import split_weights
from .lstm import LSTM
from .modules import LSTMCell, SoftmaxReadout


def _one_launch(module: Any, device: torch.device, dtype: torch.dtype, steps: int, batch: int) -> str:
    from .kernels.layer import training_plans
    from .kernels.sequence_config import Problem

    if batch == 0:
        return "with B = 0 no launch"
    precision = matmul_precision(dtype, module.precision, recurrent=True)
    directions = 2 if module.bidirectional else 1
    problem = Problem("forward", batch, module.hidden_size, directions, dtype, precision, recompute=module.recompute)
    problem = problem if (cell := shapes.cell_of(module)) is None else problem._replace(cell=cell.key)
    plans = training_plans(problem, steps, device)
    forward, backward = _in_launches(plans["forward"]), _in_launches(plans["backward"])
    if forward == backward:
        return f"with B = {batch} {forward}"
    return f"with B = {batch} {forward} forward, {backward} backward"


def _in_launches(config: Any) -> str:
    if not config.persistent:
        return "one launch per step"
    parts = f" for each of {config.launches} parts of the batch" if config.launches > 1 else ""
    return f"all steps in one launch{parts}"


class Explanation(NamedTuple):
    """The backend that runs a call. plans: for each layer that the kernels run, its configurations forward and backward.
    launches: the number of launches of recurrent kernels forward and backward."""

    subject: str
    choice: Choice
    plans: list[dict[str, Any]]
    launches: dict[str, int]
    details: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.choice.backend}: {self.choice.reason}{self.details}."


def explain_call(module: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Return `explain` for the arguments of a call, in parts."""
    kind: Any = hooks.kind(module)
    if kind is LSTM or hooks.cell_of(module) is not None:
        inspect.signature(kind.forward).bind(module, *args, **kwargs)  # TypeError for what it does not take
        return _explain_layer(module if kind is LSTM else hooks.shared(module, kind), *args, **kwargs)
    if kind is None:
        raise TypeError(
            f"explain() knows the calls of LSTM, Recurrent, their cells and SoftmaxReadout, not of {type(module).__name__}"
        )
    x: Any = args[0] if args else kwargs["input"]
    text = explain(module, device=x.device, dtype=casting.dtype_of(x))
    subject, backend, reason = text.removesuffix(".").split(": ", 2)
    return Explanation(subject, Choice(backend, reason), [], {}, "")


def _choice(module: Any, shape: shapes.Shape, T: int, on: torch.device) -> Choice:
    measured, dtype = measurements.for_call(module.backend, lambda: shape, T, on), getattr(torch, shape.dtype)
    is_plain = shape.features in ("", "packed")
    if shapes.cell_of(module) is not None:
        return Choice(*measured) if measured else module.choice(on, dtype, is_plain)
    plain = is_plain and not (module.recompute and on.type == "cuda")
    asked = Call(plain, dispatch.is_long(T, on), module.precision, module.proj_size > 0, measured)
    return choose_layer(module.backend, on.type, dtype, dispatch.environment(on), asked)


def _explain_layer(module: Any, input: Any, hx: Any = None, **features: Any) -> Explanation:
    """Explain a call of an `LSTM` or a `Recurrent`."""
    is_packed = isinstance(input, PackedSequence)
    module._update_flat_weights()
    (shape, T, on), cell = shapes.of_call(module, input, hx, **features), shapes.cell_of(module)
    choice, dtype = _choice(module, shape, T, on), getattr(torch, shape.dtype)
    subject = _subject(module, (module.input_size, module.hidden_size), on, dtype)
    if not choice.backend.startswith("triton") or shape.batch == 0:
        no_launch = "; with B = 0 no launch" if choice.backend.startswith("triton") else ""
        return Explanation(subject, choice, [], {}, no_launch)
    begin = time.perf_counter()
    x, sizes = torch.empty(0, dtype=dtype, device=on), (T, shape.batch, shape.hidden_size, shape.directions)
    given = {name: features.get(name) is not None for name in ("resets", "lengths")}
    given |= {"lengths": given["lengths"] or is_packed, "random": bool(cell and cell.masks and module.training)}
    states, reset_states = (
        [s] if isinstance(s, torch.Tensor) else list(s or ()) for s in (hx, features.get("reset_state"))
    )
    given |= {"reset_gradients": torch.is_grad_enabled() and any(t.requires_grad for t in reset_states)}
    inputs = [input.data if is_packed else input, *states, *reset_states, *(module.unit_parameters() if cell else ())]
    weights = split_weights(module._flat_weights, module.num_layers, shape.directions)
    plans = []
    for k, layer in enumerate(weights):
        inputs += [w for direction in layer for w in direction if w is not None]
        is_recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        layer_options = lstm.layer_options(module, k, choice.backend, "cells" in shape.features)
        names = [name for name, is_given in given.items() if is_given]
        plans.append(layers.plans(choice.backend, x, sizes, names, layer_options, is_recorded))
    seconds = time.perf_counter() - begin
    launches = {
        way: sum(_launches(plan[way], way, T, module.recompute) for plan in plans if way in plan) for way in plans[-1]
    }
    return Explanation(subject, choice, plans, launches, _details(plans, launches, T, on, seconds))


def _launches(config: Any, way: str, T: int, recompute: bool) -> int:
    if not config.persistent:
        return T
    from .kernels.layer_backward import recomputed_ranges

    return config.launches * (len(recomputed_ranges(T)) if recompute and way == "backward" else 1)


def _details(plans: list[dict[str, Any]], launches: dict[str, int], T: int, on: torch.device, seconds: float) -> str:
    rows = [row for _, row in measurements.rows(on)]
    parts = []
    for way, config in plans[-1].items():
        number = f"{launches[way]} launch{'es' * (launches[way] > 1)}"
        if not hasattr(config, "block_b"):
            parts.append(f"{way} {number} of the cell's kernel for 1 step")
            continue
        source = (
            "measured" if asdict(config) in [getattr(row, way) for row in rows] else "by the model and the compiler"
        )
        tile = f"{config.block_b} rows x {config.block_h} units, chunks of {config.block_k}, {config.num_warps} warps"
        parts.append(f"{way} {number} for {T} steps, {config.programs * config.groups} programs of {tile} ({source})")
    compiled = f"; it took {seconds:.1f} s to compile, once" if seconds > 0.5 else ""
    return "; " + ", ".join(parts) + compiled


def explain(
    module: Any,
    *call: Any,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    steps: int = 1,
    segments: bool = False,
    batch: int = 1,
    **options: Any,
) -> str:
    """Say in one sentence which backend a call would use, and why.

    With the arguments of a call, `explain(module, input, hx, resets=...)`, it also says how many launches of the recurrent
    kernels the call takes, with which configuration, and whether that was measured. For this it may compile kernels, but
    launches none.

    Args:
        module: an `LSTM`, `Recurrent`, `GRU`, a cell of these, a `SoftmaxReadout`, or a converted module of torch's. For a
            model that holds some there is a line for each, and for each module of torch's that is not converted.
        call, options: the arguments of the call, in place of those below. Gradients are recorded if they would be now; the
            backward is explained for gradients of all outputs.
        device, dtype: those of the tensors; by default those of the module's parameters.
        steps, segments, batch: for a layer: T; whether the call has resets, lengths or cell states; B, which decides whether
            the kernels run all steps in one launch.

    Returns:
        "Name(sizes) on device, dtype: backend: reason.", or a line of this form for each module of a model.

    Raises:
        TypeError: a module that neither is nor holds one of these; a model with the arguments of a call.
        RuntimeError: a named backend that cannot run the call, with the reason.
    """
    if call or options:
        return str(explain_call(module, *call, **options))
    kind: Any = hooks.kind(module)
    if kind is None:
        return _explain_parts(module, device=device, dtype=dtype, steps=steps, segments=segments, batch=batch)
    weight = next(module.parameters(), torch.empty(0))
    device = weight.device if device is None else torch.device(device)
    dtype = weight.dtype if dtype is None else dtype
    if kind is LSTM:
        recompute = module.recompute and device.type == "cuda"
        asked = Call(not segments and not recompute, steps > CUDNN_MAX_STEPS, module.precision, module.proj_size > 0)
        sizes = (module.input_size, module.hidden_size)
        choice = choose_layer(module.backend, device.type, dtype, dispatch.environment(device), asked)
        if choice.backend == "triton":
            choice = Choice("triton", f"{choice.reason}; {_one_launch(module, device, dtype, max(steps, 2), batch)}")
    elif kind is LSTMCell:
        sizes = (module.input_size, module.hidden_size)
        choice = choose_cell(module.backend, device.type, dtype, dispatch.environment(device))
    elif kind is not SoftmaxReadout:
        sizes = (module.input_size, module.hidden_size)
        choice = kind.choice(module, device, dtype, not segments)
        if choice.backend == "triton" and hooks.cell_of(module) is not None:
            one_launch = _one_launch(hooks.shared(module, kind), device, dtype, max(steps, 2), batch)
            choice = Choice("triton", f"{choice.reason}; {one_launch}")
    else:
        sizes = (module.in_features, module.out_features)
        choice = choose_readout(module.backend, device.type, dtype, dispatch.environment(device))
    return f"{_subject(module, sizes, device, dtype)}: {choice.backend}: {choice.reason}."


def _subject(module: Any, sizes: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str:
    layers = f", num_layers={module.num_layers}" if getattr(module, "num_layers", 1) > 1 else ""
    return f"{type(module).__name__}({sizes[0]}, {sizes[1]}{layers}) on {device}, {dtype}"


def _explain_parts(model: torch.nn.Module, **call) -> str:
    lines = []
    for name, module in model.named_modules():
        start = f"{name}: " if name else ""
        if hooks.kind(module) is not None:
            lines.append(start + explain(module, **call))
        elif hooks.is_torchs(module):
            reason = hooks.why_not(module) or "not converted"
            lines.append(f"{start}{type(module).__name__}: torch's own: {reason}.")
    if not lines:
        known = "LSTM, Recurrent, their cells and SoftmaxReadout, and models with these"
        raise TypeError(f"explain() knows {known}, got {type(model).__name__}")
    return "\n".join(lines)
