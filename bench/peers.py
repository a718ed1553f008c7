"""Other projects' LSTM kernels, where they are installed: torchrl, haste, FlashRNN.

Each adapter follows the project's public signature. Whether it is right is not taken on trust: its results are compared with
float64 before anything is timed, as everyone's are.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .problem import Problem
from .providers import Model, Outputs, Unavailable


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = package.partition(".")[0]
        missing = getattr(error, "name", None) or ""
        if missing.partition(".")[0] == top:
            raise Unavailable(f"{package} is not installed") from None
        raise Unavailable(f"{package} cannot be imported: {error}") from None


def _simple(case: Case, name: str, resets: bool = False) -> None:
    if case.form == "loop" or case.layers > 1 or case.bidirectional or case.proj_size or case.rows != "padded":
        raise Unavailable(f"{name}: whole padded sequences, one layer, one direction, no projection")
    if case.resets and not resets:
        raise Unavailable(f"{name} has no resets")


def _leaves(problem: Problem) -> dict[str, Tensor]:
    training = problem.case.mode == "train"
    return {name: w.detach().clone().requires_grad_(training) for name, w in problem.weights.items()}


def _on_gpu(problem: Problem, name: str) -> None:
    if problem.device.type != "cuda":
        raise Unavailable(f"{name} runs on GPUs only")


@dataclass(frozen=True)
class TorchRL:
    """torchrl's Triton LSTM: batch-major, a state to reset to stored for every step."""

    name: str = "torchrl"

    def make(self, problem: Problem) -> Model:
        _simple(problem.case, self.name, resets=True)
        module = _module("torchrl.modules.tensordict_module._rnn_triton", "torchrl")
        _on_gpu(problem, self.name)
        if not getattr(module, "_has_triton", False):
            raise Unavailable("this torchrl found no Triton")
        if problem.case.dtype == "float16":
            raise Unavailable("torchrl computes in float32 or bfloat16")
        weights = _leaves(problem)
        is_init = torch.zeros_like(problem.x[..., 0], dtype=torch.bool) if problem.resets is None else problem.resets
        is_init = is_init.t().contiguous()
        w = [weights[name] for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]
        options, remarks = {}, []
        if "input_precision" in inspect.signature(module.lstm_triton).parameters:
            options["input_precision"] = problem.case.precision or "ieee"
        else:  # older ones leave it to Triton
            remarks.append("this torchrl lets no one choose the precision of its recurrent products")

        def run(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
            states = []
            for s in (h0[0], c0[0]):  # [:, 0] is where the sequence starts, the others what a reset gives
                at_steps = s.new_zeros(x.shape[1], x.shape[0], s.shape[-1])
                start = torch.where(is_init[:, :1], 0.0, s)
                states.append(torch.cat((start[:, None], at_steps[:, 1:]), dim=1))
            x = x.transpose(0, 1).contiguous()
            h, _, h_n, c_n = module.lstm_triton(x, *states, *w, is_init, x.dtype, **options)
            return h.transpose(0, 1), h_n[None], c_n[None]

        return Model(run, weights, remarks=remarks)


@dataclass(frozen=True)
class Haste:
    """haste_pytorch.LSTM: no initial state, gates in the order i, g, f, o, float32."""

    name: str = "haste"

    def make(self, problem: Problem) -> Model:
        case = problem.case
        _simple(case, self.name)
        module = _module("haste_pytorch", "haste_pytorch")
        _on_gpu(problem, self.name)
        if case.dtype != "float32":
            raise Unavailable("haste's module computes in float32")
        lstm = module.LSTM(case.input_size, case.hidden_size).to(problem.device)
        lstm.train(case.mode == "train")

        def to_haste(w: Tensor) -> Tensor:
            i, f, g, o = w.chunk(4)
            return torch.cat((i, g, f, o))

        def from_haste(w: Tensor) -> Tensor:  # exchanging two gates twice
            return to_haste(w.t() if w.dim() == 2 else w)

        with torch.no_grad():
            lstm.kernel.copy_(to_haste(problem.weights["weight_ih_l0"]).t())
            lstm.recurrent_kernel.copy_(to_haste(problem.weights["weight_hh_l0"]).t())
            lstm.bias.copy_(to_haste(problem.weights["bias_ih_l0"] + problem.weights["bias_hh_l0"]))
        for p in lstm.parameters():
            p.requires_grad_(case.mode == "train")

        def run(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
            y, (h_n, c_n) = lstm(x)
            return y, h_n.view_as(h0), c_n.view_as(c0)

        weights = {"weight_ih_l0": lstm.kernel, "weight_hh_l0": lstm.recurrent_kernel, "bias_ih_l0": lstm.bias}
        return Model(run, weights, takes_initial_state=False, to_torch_gradient=dict.fromkeys(weights, from_haste))


@dataclass(frozen=True)
class FlashRNN:
    """FlashRNN with one head, its fused CUDA kernels: a dense recurrence. The product with the input is torch's."""

    name: str = "flashrnn"

    def make(self, problem: Problem) -> Model:
        case = problem.case
        _simple(case, self.name)
        module = _module("flashrnn", "flashrnn")
        _on_gpu(problem, self.name)
        weights = _leaves(problem)
        H = case.hidden_size

        def run(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
            T, B, _ = x.shape
            wx = torch.nn.functional.linear(x.transpose(0, 1), weights["weight_ih_l0"]).view(B, T, 4, 1, H)
            r = weights["weight_hh_l0"].view(4, 1, H, H)
            b = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).view(4, 1, H)
            states, _ = module.flashrnn(wx, r, b, function="lstm", backend="cuda_fused", dtype=case.dtype)
            h, c = states[0][:, :, 0], states[1][:, :, 0]  # [B, T, H]
            return h.transpose(0, 1), h[None, :, -1], c[None, :, -1]

        return Model(run, weights, "cuda_fused", "one head: the same dense recurrence", takes_initial_state=False)


PEERS = (TorchRL(), Haste(), FlashRNN())
