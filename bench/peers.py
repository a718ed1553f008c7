"""Other projects' LSTM kernels, where they are installed: torchrl, haste, FlashRNN, FastLSTM.

Each adapter follows the project's public signature. Whether it is right is not taken on trust: its results are compared with
float64 before anything is timed, as everyone's are.
"""

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from .cases import require
from .problem import Model, Problem, Provider, State, Unavailable, load, precision

DEVICE_TYPES = ("cuda",)  # on which they run
PACKAGES = {"torchrl": "torchrl", "haste": "haste_pytorch", "flashrnn": "flashrnn", "fastlstm": "fastlstm"}


def _module(name: str, problem: Problem, *dtypes: str, resets: bool = False) -> Any:
    """A peer's module; Unavailable where it is not installed, needs a GPU, or has no such LSTM."""
    top, case = name.partition(".")[0], problem.case
    is_simple = case.form == "layer" and case.is_simple and case.cell == "lstm"
    require({f"{top}: whole padded sequences, one layer, one direction, no projection": is_simple}, Unavailable)
    try:
        with precision(case):  # which is put back: fastlstm sets it when it is imported
            module = importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] == top
        raise Unavailable(f"{top} is not installed" if missing else f"{top} cannot be imported: {error}") from None
    rules = {
        f"{top} has no resets": resets or not case.resets,
        f"{top} computes in {' or '.join(dtypes)}": not dtypes or case.dtype_name.startswith(dtypes),
        f"{top} runs on GPUs only": problem.device.type in DEVICE_TYPES,
    }
    require(rules, Unavailable)
    return module


def _leaves(problem: Problem) -> dict[str, Tensor]:
    return {name: w.detach().clone().requires_grad_(problem.training) for name, w in problem.weights.items()}


def torchrl(problem: Problem) -> Model:
    """torchrl's Triton LSTM: batch-major, a state to reset to stored for every step."""
    module = _module("torchrl.modules.tensordict_module._rnn_triton", problem, "float32", "bfloat16", resets=True)
    require({"this torchrl found no Triton": getattr(module, "_has_triton", False)}, Unavailable)
    weights = _leaves(problem)
    resets = torch.zeros_like(problem.x[..., 0], dtype=torch.bool) if problem.resets is None else problem.resets
    is_init, options = resets.t().contiguous(), {"input_precision": problem.case.precision or "ieee"}
    chooses = "input_precision" in inspect.signature(module.lstm_triton).parameters  # older ones leave it to Triton
    remarks = [] if chooses else ["this torchrl lets no one choose the precision of its recurrent products"]

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        states = []
        for s in (state[0][0], state[1][0]):  # [:, 0] is where the sequence starts, the others what a reset gives
            at_steps = s.new_zeros(x.shape[1], x.shape[0], s.shape[-1])
            start = torch.where(is_init[:, :1], 0.0, s)
            states.append(torch.cat((start[:, None], at_steps[:, 1:]), dim=1))
        x, given = x.transpose(0, 1).contiguous(), options if chooses else {}
        h, _, h_n, c_n = module.lstm_triton(x, *states, *weights.values(), is_init, x.dtype, **given)
        return h.transpose(0, 1), (h_n[None], c_n[None])

    return Model(run, weights, remarks=remarks)


def haste(problem: Problem) -> Model:
    """haste_pytorch.LSTM 0.4.0: transposed weights and one bias, gates in the order i, g, f, o."""
    lstm = _module("haste_pytorch", problem, "float32").LSTM(problem.case.input_size, problem.case.hidden_size)
    lstm, weights = lstm.to(problem.device).train(problem.training), _leaves(problem)

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        w_ih, w_hh, b_ih, b_hh = (torch.cat([w.chunk(4)[k] for k in (0, 2, 1, 3)]) for w in weights.values())
        parameters = dict(kernel=w_ih.t(), recurrent_kernel=w_hh.t(), bias=b_ih + b_hh)
        return torch.func.functional_call(lstm, parameters, (x, state))

    return Model(run, weights, remarks=["weights brought into its order in each call; adapter untested"])


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

    return Model(run, weights, backend, remarks=["one head: the same dense recurrence"])


def fastlstm(problem: Problem) -> Model:
    """fastlstm.lstm.FastLSTM by its public signature; it could not be installed here, so this adapter is untested."""
    module = _module("fastlstm.lstm", problem, "float16", "bfloat16", "float32 tf32")
    case = problem.case
    lstm = module.FastLSTM(case.input_size, case.hidden_size, 1, device=problem.device, dtype=problem.x.dtype)
    return Model(lstm, load(lstm, problem), "fast", remarks=["adapter by the public signature, untested"])


PEERS: dict[str, Provider] = dict(torchrl=torchrl, haste=haste, flashrnn=flashrnn, fastlstm=fastlstm)
