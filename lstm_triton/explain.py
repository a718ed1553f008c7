"""`explain`: what a module's backend comes to on a call, and why."""

from typing import Any

import torch

from . import dispatch, hooks
from .dispatch import CUDNN_MAX_STEPS, Call, Choice, choose_cell, choose_layer, choose_readout
from .kernels.device import matmul_precision
from .lstm import LSTM
from .modules import LSTMCell, SoftmaxReadout


def _launches(module: LSTM, device: torch.device, dtype: torch.dtype, steps: int, batch: int) -> str:
    from .kernels.layer import training_plans
    from .kernels.sequence_config import Problem

    if batch == 0:
        return "with B = 0 no launch"
    precision = matmul_precision(dtype, module.precision, recurrent=True)
    directions = 2 if module.bidirectional else 1
    problem = Problem("forward", batch, module.hidden_size, directions, dtype, precision, recompute=module.recompute)
    plans = training_plans(problem, steps, device)
    forward, backward = plans["forward"].persistent, plans["backward"].persistent
    if forward == backward:
        return f"with B = {batch} " + ("all steps in one launch" if forward else "one launch per step")
    once, stepwise = ("forward", "backward") if forward else ("backward", "forward")
    return f"with B = {batch} all steps in one launch {once}, one launch per step {stepwise}"


def explain(
    module: Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    steps: int = 1,
    segments: bool = False,
    batch: int = 1,
) -> str:
    """What the module's backend ("auto" unless you chose another) comes to on a call, and why, in one sentence.

    Args:
        module: an `LSTM`, `LSTMCell`, `SoftmaxReadout`, or a converted torch.nn.LSTM or torch.nn.LSTMCell. A model that holds
            some gives a line for each, and for each LSTM that has not been converted.
        device, dtype: those of the tensors; by default those of the module's parameters.
        steps, segments, batch: for an `LSTM`: the length of the sequence; whether the call has resets, lengths or cell
            states; its rows, on which it depends whether the kernels run all steps in one launch.

    Raises:
        TypeError: a module that is and holds none of these. RuntimeError: a forced backend that cannot serve, with the reason.
    """
    kind: Any = hooks.kind(module)
    if kind is None:
        return _explain_parts(module, device=device, dtype=dtype, steps=steps, segments=segments, batch=batch)
    weight = next(module.parameters(), torch.empty(0))
    device = weight.device if device is None else torch.device(device)
    dtype = weight.dtype if dtype is None else dtype
    if kind is LSTM:
        recompute = module.recompute and device.type == "cuda"
        call = Call(not segments and not recompute, steps > CUDNN_MAX_STEPS, module.precision, module.proj_size > 0)
        sizes = (module.input_size, module.hidden_size)
        choice = choose_layer(module.backend, device.type, dtype, dispatch.environment(device), call)
        if choice.backend == "triton":
            choice = Choice("triton", f"{choice.reason}; {_launches(module, device, dtype, max(steps, 2), batch)}")
    elif kind is LSTMCell:
        sizes = (module.input_size, module.hidden_size)
        choice = choose_cell(module.backend, device.type, dtype, dispatch.environment(device))
    elif kind is not SoftmaxReadout:
        sizes = (module.input_size, module.hidden_size)
        choice = kind.choice(module, device, dtype, not segments)
    else:
        sizes = (module.in_features, module.out_features)
        choice = choose_readout(module.backend, device.type, dtype, dispatch.environment(device))
    name = type(module).__name__
    return f"{name}({sizes[0]}, {sizes[1]}) on {device}, {dtype}: {choice.backend}: {choice.reason}."


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
        known = "LSTM, LSTMCell and SoftmaxReadout, and models with these"
        raise TypeError(f"explain() knows {known}, got {type(model).__name__}")
    return "\n".join(lines)
