"""Providers of a case: this package in each of its ways, torch's own modules, torch.compile; others' kernels are in `peers`.

A provider is a function of the problem that makes a model, or raises Unavailable and says why it cannot serve. Everything else
(modes, gradients, graphs, checks, timing) is the same code for all.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import reference

from .cases import Case
from .problem import Problem, State, torch_lstm

Run = Callable[
    [Tensor, State], tuple[Tensor, State]
]  # as torch.nn.LSTM: of x and the initial state, y and the final one
OURS, CUDNN, TORCH_CELL = "lstm_triton auto", "torch.nn.LSTM", "torch.nn.LSTMCell"


class Unavailable(RuntimeError):
    """The provider cannot serve here; the message says why."""


@dataclass
class Model:
    """A case as one provider computes it.

    step: as torch.nn.LSTMCell, for a cell. weights: its parameters by torch.nn.LSTM's names; to_torch_gradient: maps a gradient
    to torch's layout where that differs.
    """

    run: Run
    weights: Mapping[str, Tensor]
    backend: str | None = None
    backend_reason: str | None = None
    algorithm: str | None = None
    remarks: list[str] = field(default_factory=list)
    takes_initial_state: bool = True
    step: Callable[[Tensor, State], State] | None = None
    to_torch_gradient: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


Provider = Callable[[Problem], Model]


def load(module: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """Put the problem's weights into a module or cell; returns its parameters by the layer's names."""
    known = problem.weights
    parameters = {name if name in known else f"{name}_l0": p for name, p in module.named_parameters()}
    training = problem.case.mode == "train"
    module.train(training).requires_grad_(training)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(known[name])
    return dict(parameters)


def _cells(problem: Problem, what: str, cell: Callable[[Tensor, State], State], most: int) -> Run:
    """The case by a cell, called once or for every step."""
    case, resets = problem.case, problem.resets
    if not case.is_simple:
        raise Unavailable(f"{what} in a loop: one layer, one direction, padded batch rows")
    if case.length > most:
        raise Unavailable(f"{what} in a loop is run up to {most} steps")

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        (h, c), outputs = (s[0] for s in state), []
        for t, x_t in enumerate(x.unbind(0)):
            if resets is not None:
                keep = ~resets[t, :, None]
                h, c = h * keep, c * keep
            h, c = cell(x_t, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])

    return run


def ours(problem: Problem, backend: str = "auto", recompute: bool = False) -> Model:
    """This package, its backend left to choose or forced."""
    case, in_cells = problem.case, problem.case.form != "layer"
    if in_cells and (recompute or backend in ("triton-persistent", "triton-stepwise", "cudnn")):
        raise Unavailable("a cell has one way in Triton: lstm_triton auto, triton or reference")
    if not in_cells and backend == "reference" and case.length > 256:
        raise Unavailable("plain PyTorch step by step: run up to 256 steps")
    options: dict[str, Any] = dict(device=problem.device, dtype=problem.x.dtype, backend=backend)
    options["precision"] = case.precision or None
    module: Any
    if in_cells:
        module = lstm_triton.LSTMCell(case.input_size, case.hidden_size, **options)
        run = _cells(problem, "lstm_triton.LSTMCell", module, 2**31)
    else:
        options |= dict(bidirectional=case.bidirectional, proj_size=case.proj_size, recompute=recompute)
        module = lstm_triton.LSTM(case.input_size, case.hidden_size, case.layers, **options)
        lengths = problem.lengths.to(problem.device) if problem.lengths is not None else None
        run = functools.partial(module, resets=problem.resets, lengths=lengths)
        run = _packed(module, problem) if case.rows == "packed" else run
    try:
        segmented = problem.resets is not None or case.rows == "lengths"
        said = lstm_triton.explain(module, steps=case.length, segments=segmented, batch=case.batch)
    except RuntimeError as error:  # a forced backend that cannot serve
        raise Unavailable(str(error)) from None
    _, chosen, reason = said.split(": ", 2)
    algorithm = cudnn_algorithm(problem) if chosen == "cudnn" else None
    step = module if in_cells else None
    return Model(run, load(module, problem), chosen, reason.rstrip("."), algorithm, step=step)


def _packed(lstm: nn.Module, problem: Problem) -> Run:
    """Packed in every call and its result padded again, as users of padded batches do: both count, for every provider."""
    lengths, T = problem.lengths, problem.case.length

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = lstm(pack_padded_sequence(x, lengths), state)  # type: ignore[arg-type]
        return pad_packed_sequence(y, total_length=T)[0], state

    return run


def cudnn_algorithm(problem: Problem) -> str | None:
    """cuDNN's algorithm for the case on this GPU, by torch's rules."""
    if problem.device.type != "cuda":
        return None
    p = torch.cuda.get_device_properties(problem.device)
    return algorithm(problem.case, (p.major, p.minor), p.multi_processor_count)


def algorithm(case: Case, capability: tuple[int, int], sms: int) -> str:
    """The algorithm by the rules of torch 2.11 to 2.13, which decides it for every call and does not tell.

    The forward of a training step and its backward are chosen apart: both are named where they differ.
    """

    def chosen(small: int) -> str:
        if case.proj_size or case.rows != "padded":  # batch rows with lengths are packed for torch.nn.LSTM
            return "STANDARD"
        if case.hidden_size <= small and case.dtype != "float64":
            return "PERSIST_STATIC_SMALL_H"
        fast = case.dtype == "float16" and case.is_simple and sms >= 98 and capability != (8, 6)
        fast &= case.hidden_size <= 1024 and case.hidden_size % 128 == 0 and case.input_size % 128 == 0
        fast &= case.batch % 8 == 0 and case.batch <= 128
        return "PERSIST_STATIC" if fast else "STANDARD"

    forward, backward = chosen(192), chosen(128)
    both = case.mode == "train" and forward != backward
    return f"{forward} forward, {backward} backward" if both else forward


def torchs_lstm(problem: Problem) -> Model:
    """torch.nn.LSTM: cuDNN on a GPU, torch's CPU kernels elsewhere. With resets or lengths, as its users work around it."""
    case, resets, remarks = problem.case, problem.resets, []
    if case.form == "loop":
        raise Unavailable("torch.nn.LSTM takes whole sequences; step by step it is torch.nn.LSTMCell")
    _no_tf32x3(case, "cuDNN")
    if resets is not None and (case.bidirectional or case.rows != "padded"):
        raise Unavailable("a loop over steps runs in one direction, over padded batch rows")
    lstm = torch_lstm(case, problem.device, problem.x.dtype)
    weights = load(lstm, problem)
    lstm.flatten_parameters()
    run: Run = lstm if case.rows == "padded" else _packed(lstm, problem)
    if problem.device.type == "cuda" and case.dtype == "bfloat16":
        remarks.append("torch does not flatten bfloat16 weights for cuDNN: each call copies them")
    if case.rows == "lengths":
        remarks.append("no lengths in torch.nn.LSTM: packed and padded again")
    if resets is not None:
        remarks.append("no resets in torch.nn.LSTM: one call per step, the states masked between them")

    def loop(x: Tensor, state: State) -> tuple[Tensor, State]:
        outputs = []
        for x_t, reset in zip(x.split(1), resets if resets is not None else ()):
            y, state = run(x_t, (state[0] * ~reset[:, None], state[1] * ~reset[:, None]))
            outputs.append(y)
        return torch.cat(outputs), state

    serve = run if resets is None else loop
    return Model(serve, weights, algorithm=cudnn_algorithm(problem), remarks=remarks)


def _no_tf32x3(case: Case, who: str) -> None:
    if case.precision == "tf32x3":
        raise Unavailable(f"{who} has no tf32x3")


def torchs_cell(problem: Problem, compiled: bool = False) -> Model:
    """torch.nn.LSTMCell, or torch.compile of the plain-PyTorch cell, once or called for every step."""
    case = problem.case
    _no_tf32x3(case, "torch")
    cell = nn.LSTMCell(case.input_size, case.hidden_size, device=problem.device, dtype=problem.x.dtype)
    if not compiled:
        return Model(_cells(problem, TORCH_CELL, cell, 2048), load(cell, problem), step=cell)
    torch.compiler.reset()  # or the cases of a long run exhaust its count of recompilations
    function = torch.compile(reference.lstm_cell, fullgraph=True, dynamic=False)

    def step(x: Tensor, hx: State) -> State:
        return function(x, *hx, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)

    run = _cells(problem, "the compiled cell", step, 256)
    return Model(run, load(cell, problem), "inductor", "fullgraph, static shapes", step=step)
