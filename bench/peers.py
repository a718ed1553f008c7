"""Other projects' LSTM kernels, where they are installed: torchrl, haste, FlashRNN, FastLSTM.

Each adapter follows the project's public signature. Whether it is right is not taken on trust: its results are compared with
float64 before anything is timed, as everyone's are.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .problem import Model, Problem, State, Unavailable, load, set_precision

PACKAGES = {"torchrl": "torchrl", "haste": "haste_pytorch", "flashrnn": "flashrnn", "fastlstm": "fastlstm"}


def _module(name: str, problem: Problem, resets: bool = False) -> Any:
    """A peer's module; Unavailable where it is not installed, needs a GPU, or has no such LSTM."""
    top, case = name.partition(".")[0], problem.case
    if case.form == "loop" or not case.is_simple or case.cell == "gru":
        raise Unavailable(f"{top}: whole padded sequences, one layer, one direction, no projection")
    if case.resets and not resets:
        raise Unavailable(f"{top} has no resets")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] == top
        raise Unavailable(f"{top} is not installed" if missing else f"{top} cannot be imported: {error}") from None
    finally:
        set_precision(case)  # fastlstm sets torch's precision when it is imported
    if problem.device.type != "cuda":
        raise Unavailable(f"{top} runs on GPUs only")
    return module


def _leaves(problem: Problem) -> dict[str, Tensor]:
    training = problem.case.mode == "train"
    return {name: w.detach().clone().requires_grad_(training) for name, w in problem.weights.items()}


def torchrl(problem: Problem) -> Model:
    """torchrl's Triton LSTM: batch-major, a state to reset to stored for every step."""
    module = _module("torchrl.modules.tensordict_module._rnn_triton", problem, resets=True)
    if not getattr(module, "_has_triton", False):
        raise Unavailable("this torchrl found no Triton")
    if problem.case.dtype == "float16":
        raise Unavailable("torchrl computes in float32 or bfloat16")
    weights = _leaves(problem)
    resets = torch.zeros_like(problem.x[..., 0], dtype=torch.bool) if problem.resets is None else problem.resets
    is_init = resets.t().contiguous()
    options, remarks = {}, []
    if "input_precision" in inspect.signature(module.lstm_triton).parameters:
        options["input_precision"] = problem.case.precision or "ieee"
    else:  # older ones leave it to Triton
        remarks.append("this torchrl lets no one choose the precision of its recurrent products")

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        states = []
        for s in (state[0][0], state[1][0]):  # [:, 0] is where the sequence starts, the others what a reset gives
            at_steps = s.new_zeros(x.shape[1], x.shape[0], s.shape[-1])
            start = torch.where(is_init[:, :1], 0.0, s)
            states.append(torch.cat((start[:, None], at_steps[:, 1:]), dim=1))
        x = x.transpose(0, 1).contiguous()
        h, _, h_n, c_n = module.lstm_triton(x, *states, *weights.values(), is_init, x.dtype, **options)
        return h.transpose(0, 1), (h_n[None], c_n[None])

    return Model(run, weights, remarks=remarks)


def haste(problem: Problem) -> Model:
    """haste_pytorch.LSTM: no initial state, gates in the order i, g, f, o, float32."""
    module = _module("haste_pytorch", problem)
    case, given, training = problem.case, problem.weights, problem.case.mode == "train"
    if case.dtype != "float32":
        raise Unavailable("haste's module computes in float32")
    lstm = module.LSTM(case.input_size, case.hidden_size).to(problem.device)
    lstm.train(training).requires_grad_(training)

    def to_haste(w: Tensor) -> Tensor:
        i, f, g, o = w.chunk(4)
        return torch.cat((i, g, f, o))

    def from_haste(w: Tensor) -> Tensor:  # exchanging two gates twice
        return to_haste(w.t() if w.dim() == 2 else w)

    weights = {"weight_ih_l0": lstm.kernel, "weight_hh_l0": lstm.recurrent_kernel, "bias_ih_l0": lstm.bias}
    with torch.no_grad():
        lstm.bias.copy_(to_haste(given["bias_ih_l0"] + given["bias_hh_l0"]))
        for name in ("weight_ih_l0", "weight_hh_l0"):
            weights[name].copy_(to_haste(given[name]).t())

    return Model(
        lambda x, _: lstm(x), weights, takes_initial_state=False, to_torch_gradient=dict.fromkeys(weights, from_haste)
    )


def flashrnn(problem: Problem, backend: str = "cuda_fused") -> Model:
    """FlashRNN 1.0.8 with one head, its fused CUDA kernels: a dense recurrence. The product with the input is torch's.

    nvcc compiles the kernels at the first call. The adapter was checked on a CPU with the package's plain-PyTorch backend,
    "vanilla": results and all gradients agree with float64 to a few roundings.
    """
    module = _module("flashrnn", problem)
    weights, dtype, H = _leaves(problem), problem.case.dtype, problem.case.hidden_size

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        T, B, _ = x.shape
        wx = torch.nn.functional.linear(x.transpose(0, 1), weights["weight_ih_l0"]).view(B, T, 4, 1, H)
        r = weights["weight_hh_l0"].view(4, 1, H, H)
        b = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).view(4, 1, H)
        start = torch.stack(state).view(2, B, 1, 1, H)
        options = dict(states=start, function="lstm", backend=backend, dtype=dtype)
        (h, c), _ = module.flashrnn(wx, r, b, **options)  # [B, T, 1, H] each
        return h[:, :, 0].transpose(0, 1), (h[None, :, -1, 0], c[None, :, -1, 0])

    return Model(run, weights, backend, "one head: the same dense recurrence")


def fastlstm(problem: Problem) -> Model:
    """fastlstm.lstm.FastLSTM by its public signature; it could not be installed here, so this adapter is untested."""
    module = _module("fastlstm.lstm", problem)
    case = problem.case
    if case.precision == "ieee" or case.dtype == "float64":
        raise Unavailable("fastlstm computes in float16, bfloat16 or TF32")
    lstm = module.FastLSTM(case.input_size, case.hidden_size, 1, device=problem.device, dtype=problem.x.dtype)
    return Model(lstm, load(lstm, problem), "fast", "adapter by the public signature, untested")


PEERS: dict[str, Callable[[Problem], Model]] = dict(torchrl=torchrl, haste=haste, flashrnn=flashrnn, fastlstm=fastlstm)
