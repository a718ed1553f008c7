"""The providers by name, and the choice of those that a task compares."""

import functools
import importlib.util

from . import peers, providers, roofs
from .cases import Case, Task
from .providers import CUDNN, OURS, TORCH_CELL

BACKENDS = ("auto", "triton-persistent", "triton-stepwise", "triton", "cudnn", "reference")


def all_providers() -> dict[str, providers.Provider]:
    """Every provider by name; the order is that of the tables."""
    found: dict[str, providers.Provider] = {}
    found |= {f"lstm_triton {b}": functools.partial(providers.ours, backend=b) for b in BACKENDS}
    for b in ("auto", "triton"):
        found[f"lstm_triton {b} recompute"] = functools.partial(providers.ours, backend=b, recompute=True)
    found |= {CUDNN: providers.torchs_lstm, TORCH_CELL: providers.torchs_cell}
    return found | {"torch.compile": functools.partial(providers.torchs_cell, compiled=True)} | peers.PEERS


def provider(name: str) -> providers.Provider:
    return all_providers()[name]


def torchs(case: Case) -> str:
    """torch's own provider of a case, beside which the others are judged."""
    return CUDNN if case.form == "layer" else TORCH_CELL


def chosen_for(task: Task, device_type: str) -> list[str]:
    """The providers of a task by default: those worth comparing. Which of them can serve, they say themselves."""
    case, kind, gpu = task.case, task.kind, device_type == "cuda"
    if kind in ("overhead", "cold-start"):
        return ["lstm_triton triton" if gpu else OURS, torchs(case)]
    if task.interpreter:
        stepwise = ["lstm_triton triton-stepwise"] if case.form == "layer" else []
        return [*stepwise, "lstm_triton triton", torchs(case)]
    if kind == "memory":
        kernels = ["lstm_triton triton", "lstm_triton triton recompute"] if gpu else []
        return [OURS, *kernels, "lstm_triton auto recompute", CUDNN]
    plain = ["lstm_triton reference"] if kind == "accuracy" or (not gpu and case.length <= 64) else []
    if case.form in ("cell", "loop"):
        return [OURS, TORCH_CELL, *plain]  # torch.compile where a suite asks for it: it compiles for seconds
    # Not "lstm_triton triton", which takes one of the first two.
    forced = ["lstm_triton triton-persistent", "lstm_triton triton-stepwise"] if gpu else []
    if gpu and not case.resets and case.rows != "lengths":
        forced.append("lstm_triton cudnn")
    loop = [TORCH_CELL] if case.is_simple and (case.resets or case.length <= 64) else []
    others = (["torchrl"] if case.resets else list(peers.PEERS)) if gpu and case.is_simple else []
    # One that is not installed is named at the first hidden size of the headline, not in every case.
    others = [name for name in others if case.hidden_size == 768 or importlib.util.find_spec(peers.PACKAGES[name])]
    return [OURS, *forced, CUDNN, *loop, *plain, *others]


def names_of(task: Task, device_type: str, names: tuple[str, ...] | None) -> list[str]:
    """The providers of a task, in order: those asked for, by default its own. Roofs and the anchor know no choice."""
    if task.kind == "roof":
        return [name for name in roofs.PARTS if name != "barriers" or device_type == "cuda"]
    if names is not None and task.kind != "anchor":
        return list(names)
    return chosen_for(task, device_type) if task.providers is None else list(task.providers)
