"""Bytes: what autograd holds between forward and backward, and what the device holds at its peak."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .problem import Problem

if TYPE_CHECKING:
    from .measure import Built


def held(built: "Built", problem: Problem) -> dict[str, int]:
    """Bytes of one training step.

    saved: in tensors that autograd keeps for backward, each storage once, without inputs and weights. On a GPU also, above what
    there was before: after_forward, and peak over forward and backward, which take in what no tensor shows.
    """
    model = built.model
    training = problem.case.mode == "train"
    x = problem.x.detach().clone().requires_grad_(training)
    h0, c0 = problem.h0.clone(), problem.c0.clone()
    if not model.takes_initial_state:
        h0, c0 = torch.zeros_like(h0), torch.zeros_like(c0)
    given = {_storage(t) for t in (x, h0, c0, *model.weights.values())}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if _storage(t) not in given:
            saved[_storage(t)] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = model.run(x, h0, c0)
    # saved tensors stay alive with the outputs, so that no address is counted for two of them
    total = sum(saved.values())
    outputs_bytes = sum(t.untyped_storage().nbytes() for t in outputs if _storage(t) not in saved)
    del outputs
    found = {"saved": total, "outputs": outputs_bytes}
    if problem.device.type == "cuda":
        found |= _on_gpu(built, problem, x, h0, c0)
    return found


def _on_gpu(built: "Built", problem: Problem, x: Tensor, h0: Tensor, c0: Tensor) -> dict[str, int]:
    built.call()  # compiled, workspaces allocated
    torch.cuda.synchronize(problem.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(problem.device)
    torch.cuda.reset_peak_memory_stats(problem.device)
    outputs = built.model.run(x, h0, c0)
    after_forward = torch.cuda.memory_allocated(problem.device) - before
    if problem.case.mode == "train":
        leaves = [x, *(w for w in built.model.weights.values() if w.requires_grad)]
        torch.autograd.grad(outputs[0], leaves, problem.dy.to(outputs[0].dtype), allow_unused=True)
    torch.cuda.synchronize(problem.device)
    peak = torch.cuda.max_memory_allocated(problem.device) - before
    return {"after_forward": after_forward, "peak": peak}


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
