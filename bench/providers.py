"""The providers that a task compares on its case: this package in each of its ways, torch's modules, peers.
A provider is a function of the problem that makes a model, or raises Unavailable and says why it cannot serve. Everything else
(modes, gradients, graphs, checks, timing) is the same code for all.
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import dispatch, reference

from . import peers
from .cases import Case, Pair, Task, require
from .problem import Model, Problem, Provider, Run, State, Unavailable, by_steps, load, torch_lstm

MOST_CUDNN_STEPS = 65535
OURS, CUDNN, TORCH_CELL = "lstm_triton auto", "torch.nn.LSTM", "torch.nn.LSTMCell"
KERNELS, REFERENCE = "lstm_triton triton", "lstm_triton reference"


def _cells(problem: Problem, cell: Callable[[Tensor, State], State]) -> Run:
    """Compute the case by a cell, called once or for every step."""
    is_simple = problem.case.is_simple and problem.case.cell == "lstm"
    require({"by cells: one layer of an LSTM, one direction, padded batch rows": is_simple}, Unavailable)
    if problem.case.form != "cell":
        return functools.partial(by_steps, cell, problem.resets)
    return lambda x, state: ((after := cell(x, state))[0], after)


def _packed(lstm: nn.Module, problem: Problem, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Pack in every call and pad the result again, as users of padded batches do: both count, for every provider."""
    y, state = lstm(pack_padded_sequence(x, problem.lengths), state)  # type: ignore[arg-type]
    return pad_packed_sequence(y, total_length=problem.case.length)[0], state


def ours(problem: Problem, backend: str = "auto", recompute: bool = False) -> Model:
    """This package, its backend left to choose or forced."""
    case = problem.case
    options: dict[str, Any] = dict(device=problem.device, dtype=problem.x.dtype, backend=backend)
    options["precision"] = case.precision or None
    if case.form != "layer":
        one_way = not recompute and backend in ("auto", "triton", "reference")
        require({"a cell has one way in Triton: lstm_triton auto, triton or reference": one_way}, Unavailable)
        module: Any = lstm_triton.LSTMCell(case.input_size, case.hidden_size, **options)
        run: Run = _cells(problem, module)
    else:
        kind: Any = functools.partial(lstm_triton.LSTM, proj_size=case.proj_size)
        if case.cell == "gru":  # whose cuDNN has no precision but torch's setting, which is that of the case
            require({"a GRU of the benchmark has torch's precisions": case.precision != "tf32x3"}, Unavailable)
            kind, options["precision"] = lstm_triton.GRU, None
        options |= dict(bidirectional=case.bidirectional, recompute=recompute)
        module = kind(case.input_size, case.hidden_size, case.layers, **options)
        given = dict(resets=problem.resets, lengths=problem.ends, return_cell_states=case.cell_states or None)
        given = {name: value for name, value in given.items() if value is not None}
        run = lambda x, state: module(x, state, **given)[:2]  # noqa: E731
        run = functools.partial(_packed, module, problem) if case.rows == "packed" else run
    segmented = problem.resets is not None or case.rows == "lengths" or case.cell_states
    try:
        said = lstm_triton.explain(module, steps=case.length, segments=segmented, batch=case.batch)
    except RuntimeError as error:  # a forced backend that cannot serve
        raise Unavailable(str(error)) from None
    _, chosen, reason = said.split(": ", 2)
    algorithm = cudnn_algorithm(problem) if chosen == "cudnn" else None
    return Model(problem, run, load(module, problem), chosen, algorithm, [reason.rstrip(".")])


def cudnn_algorithm(problem: Problem) -> str | None:
    """Return cuDNN's algorithm for the case on this GPU, by torch's rules."""
    if problem.device.type != "cuda":
        return None
    p = torch.cuda.get_device_properties(problem.device)
    return algorithm(problem.case, (p.major, p.minor), p.multi_processor_count)


def algorithm(case: Case, capability: tuple[int, int], sms: int) -> str:
    """The algorithm by the rules of torch 2.11 to 2.13, which decides it for every call and does not tell. The forward of a
    training step and its backward are chosen apart: both are named where they differ."""

    def chosen(small: int) -> str:
        if case.proj_size or case.rows != "padded":  # batch rows with lengths are packed for torch.nn.LSTM
            return "STANDARD"
        if case.hidden_size <= small and case.dtype != "float64":
            return "PERSIST_STATIC_SMALL_H"
        fast = case.dtype == "float16" and case.is_simple and sms >= 98 and capability != (8, 6)
        fast &= case.hidden_size <= 1024 and case.hidden_size % 128 == 0 and case.input_size % 128 == 0
        return "PERSIST_STATIC" if fast and case.batch % 8 == 0 and case.batch <= 128 else "STANDARD"

    forward, backward = chosen(192), chosen(128)
    both = case.mode == "train" and forward != backward
    return f"{forward} forward, {backward} backward" if both else forward


def torchs_lstm(problem: Problem) -> Model:
    """torch.nn.LSTM: cuDNN on a GPU, torch's CPU kernels elsewhere. With resets or lengths, as its users work around it."""
    case, resets = problem.case, problem.resets
    one_way = not case.bidirectional and case.rows == "padded"
    rules = {
        "torch.nn.LSTM takes whole sequences; step by step it is torch.nn.LSTMCell": case.form == "layer",
        "torch.nn.LSTM returns no cell states": not case.cell_states,
        "cuDNN has no tf32x3": case.precision != "tf32x3",
        "a loop over steps runs in one direction, over padded batch rows": resets is None or one_way,
    }
    require(rules, Unavailable)
    lstm = torch_lstm(case, problem.device, problem.x.dtype)
    weights = load(lstm, problem)
    lstm.flatten_parameters()
    run = lstm if resets is None else functools.partial(by_steps, lstm, resets, is_cell=False)
    run = functools.partial(_packed, lstm, problem) if case.rows != "padded" else run
    copies = problem.device.type == "cuda" and case.dtype == "bfloat16"
    remarks = {
        "torch does not flatten bfloat16 weights for cuDNN: each call copies them": copies,
        "torch.nn.GRU": case.cell == "gru",
        "no lengths in torch.nn.LSTM: packed and padded again": case.rows == "lengths",
        "no resets in torch.nn.LSTM: one call per step, the states masked between them": resets is not None,
    }
    said = [remark for remark, holds in remarks.items() if holds]
    return Model(problem, run, weights, None, cudnn_algorithm(problem), said)


def torchs_cell(problem: Problem, compiled: bool = False) -> Model:
    """torch.nn.LSTMCell, or torch.compile of the plain-PyTorch cell, once or called for every step."""
    case = problem.case
    require({"torch has no tf32x3": case.precision != "tf32x3"}, Unavailable)
    cell = nn.LSTMCell(case.input_size, case.hidden_size, device=problem.device, dtype=problem.x.dtype)
    if not compiled:
        return Model(problem, _cells(problem, cell), load(cell, problem))
    torch.compiler.reset()  # or the cases of a long run exhaust its count of recompilations
    function = torch.compile(reference.lstm_cell, fullgraph=True, dynamic=False)
    weights = load(cell, problem)
    given: Any = tuple(weights.values())
    run = _cells(problem, lambda x, hx: function(x, *hx, *given))
    return Model(problem, run, weights, "inductor", None, ["fullgraph, static shapes"])


# Everyone, in the order of the tables.
PROVIDERS: dict[str, Provider] = {
    **{f"lstm_triton {name}": functools.partial(ours, backend=name) for name in dispatch.BACKENDS},
    f"{OURS} recompute": functools.partial(ours, recompute=True),
    f"{KERNELS} recompute": functools.partial(ours, backend="triton", recompute=True),
    CUDNN: torchs_lstm,
    TORCH_CELL: torchs_cell,
    "torch.compile": functools.partial(torchs_cell, compiled=True),
    **peers.BY_HAND,
    **peers.PEERS,
}


def torchs(case: Case) -> str:
    """Return torch's own provider of a case, beside which the others are judged."""
    return CUDNN if case.form == "layer" else TORCH_CELL


def true(case: Case) -> Provider:
    """Return who computes the truth: torch's own module, or where that cannot compute the case this package's reference."""
    is_torchs = not case.resets and case.rows == "padded" and case.length <= MOST_CUDNN_STEPS
    return PROVIDERS[torchs(case) if is_torchs else REFERENCE]


def pairs_of(task: Task, device_type: str, names: Sequence[str] | None = None) -> list[Pair]:
    """The providers of a task and how they are run, in order: those asked for (`names`), by default the suite's, or else those
    worth comparing. Which of them can serve, they say themselves. Roofs and the anchor know no choice. "torch" in a suite is
    torch's own provider of the case. On a CPU auto takes the place of the kernels."""
    case, gpu, of_layers = task.case, device_type == "cuda", task.case.form == "layer"
    by_lstms = of_layers and case.is_simple and case.cell == "lstm"
    others = (["torchrl"] if case.resets else list(peers.PEERS)) * (gpu and by_lstms)
    worth = {
        OURS: True,
        "lstm_triton triton-persistent": of_layers,  # not "lstm_triton triton", which takes one of these two
        "lstm_triton triton-stepwise": of_layers,
        "lstm_triton cudnn": of_layers and not case.resets and case.rows != "lengths",
        torchs(case): True,
        TORCH_CELL: not of_layers or (by_lstms and (case.resets or case.length <= 64)),
        REFERENCE: case.length <= (256 if task.kind == "accuracy" else 0 if gpu else 64),
        # One that is not installed is named at the first hidden size of the headline, not in every case.
        **{name: case.hidden_size == 768 or importlib.util.find_spec(peers.PACKAGES[name]) for name in others},
    }
    chosen: Iterable[str] = task.providers or [name for name, is_worth in worth.items() if is_worth]
    if not gpu:
        chosen = [re.sub("lstm_triton (triton|cudnn)[-a-z]*", OURS, name) for name in chosen if name != "exchange"]
    if names is not None and task.kind not in ("roof", "anchor"):
        chosen = names
    chosen = dict.fromkeys(torchs(case) if name == "torch" else name for name in chosen)
    return [(name, execution) for name in chosen for execution in task.executions]
