"""Other providers: LSTM kernels of other projects, where they are installed, and what users write with torch alone.
Each adapter follows the project's public signature. Whether it is right is not taken on trust: its results are compared with
float64 before anything is timed, as everyone's are.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lstm_triton.reference import lstm_step

from .cases import require
from .problem import Model, Problem, Provider, State, Unavailable, by_steps, load, precision, torch_lstm

DEVICE_TYPES = ("cuda",)  # on which they run
PACKAGES = {"torchrl": "torchrl", "haste": "haste_pytorch", "flashrnn": "flashrnn", "fastlstm": "fastlstm"}


def _module(name: str, problem: Problem, *dtypes: str, resets: bool = False) -> Any:
    """Import a peer's module; Unavailable where it is not installed, needs a GPU, or has no such LSTM."""
    top, case = name.partition(".")[0], problem.case
    is_simple = case.form == "layer" and case.is_simple and case.cell == "lstm"
    try:
        with precision(case):  # which is put back: fastlstm sets it when it is imported
            module = importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] == top
        raise Unavailable(f"{top} is not installed" if missing else f"{top} cannot be imported: {error}") from None
    rules = {
        f"{top}: whole padded sequences, one layer, one direction, no projection": is_simple,
        f"{top} has no resets": resets or not case.resets,
        f"{top} computes in {' or '.join(dtypes)}": not dtypes or {case.dtype, case.dtype_name} & {*dtypes},
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
        starts = (torch.where(is_init[:, :1], 0.0, s[0])[:, None] for s in state)
        states = (
            nn.functional.pad(s, (0, 0, 0, len(x) - 1)) for s in starts
        )  # at later steps what a reset gives: zeros
        x, given = x.transpose(0, 1).contiguous(), options if chooses else {}
        h, _, h_n, c_n = module.lstm_triton(x, *states, *weights.values(), is_init, x.dtype, **given)
        return h.transpose(0, 1), (h_n[None], c_n[None])

    return Model(problem, run, weights, remarks=remarks)


def haste(problem: Problem) -> Model:
    """haste_pytorch.LSTM 0.4.0: transposed weights and one bias, gates in the order i, g, f, o."""
    lstm = _module("haste_pytorch", problem, "float32").LSTM(problem.case.input_size, problem.case.hidden_size)
    lstm, weights = lstm.to(problem.device).train(problem.training), _leaves(problem)

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        w_ih, w_hh, b_ih, b_hh = (torch.cat([w.chunk(4)[k] for k in (0, 2, 1, 3)]) for w in weights.values())
        parameters = dict(kernel=w_ih.t(), recurrent_kernel=w_hh.t(), bias=b_ih + b_hh)
        return torch.func.functional_call(lstm, parameters, (x, state))

    return Model(problem, run, weights, remarks=["weights brought into its order in each call; adapter untested"])


def flashrnn(problem: Problem, backend: str = "cuda_fused") -> Model:
    """FlashRNN 1.0.8 with one head, its fused CUDA kernels: a dense recurrence. The product with the input is torch's. nvcc
    compiles the kernels at the first call. The adapter was checked on a CPU with the package's plain-PyTorch backend,
    "vanilla": results and all gradients agree with float64 to a few roundings."""
    module = _module("flashrnn", problem)
    weights, dtype, H = _leaves(problem), problem.case.dtype, problem.case.hidden_size

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        T, B, _ = x.shape
        wx = torch.nn.functional.linear(x.transpose(0, 1), weights["weight_ih_l0"]).view(B, T, 4, 1, H)
        r = weights["weight_hh_l0"].view(4, 1, H, H)
        b = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).view(4, 1, H)
        start = torch.stack(state).view(2, B, 1, 1, H)
        (h, c), _ = module.flashrnn(wx, r, b, start, "lstm", backend=backend, dtype=dtype)  # [B, T, 1, H] each
        return h[:, :, 0].transpose(0, 1), (h[None, :, -1, 0], c[None, :, -1, 0])

    return Model(problem, run, weights, backend, remarks=["one head: the same dense recurrence"])


def fastlstm(problem: Problem) -> Model:
    """fastlstm.lstm.FastLSTM by its public signature; it could not be installed here, so this adapter is untested."""
    module = _module("fastlstm.lstm", problem, "float16", "bfloat16", "float32 tf32")
    case = problem.case
    lstm = module.FastLSTM(case.input_size, case.hidden_size, 1, device=problem.device, dtype=problem.x.dtype)
    return Model(problem, lstm, load(lstm, problem), "fast", remarks=["adapter by the public signature, untested"])


def _by_hand(way: Callable[..., tuple[Tensor, State]], problem: Problem) -> Model:
    """Make a model with torch alone, for resets, lengths and cell states: one layer, one direction, final states."""
    case, resets, lengths = problem.case, problem.resets is not None, problem.lengths is not None
    kind = case.form, case.cell, case.layers, case.directions, case.proj_size
    serves = {split: resets or lengths, packed: resets and not lengths, loop: True}
    rules = {
        "written for one layer of an LSTM in one direction": kind == ("layer", "lstm", 1, 1, 0)
        and case.rows != "packed",
        "calls are split at resets and lengths, and packed by resets of full batch rows": serves[way],
    }
    require(rules, Unavailable)
    lstm = torch_lstm(case, problem.device, problem.x.dtype)
    return Model(problem, functools.partial(way, lstm, problem), load(lstm, problem))


def split(lstm: Any, problem: Problem, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Call torch.nn.LSTM once from each step at which a batch row starts anew or ends to the next."""
    cuts, (h, c), resets, lengths = {0, len(x)}, state, problem.resets, problem.lengths
    if resets is not None:
        cuts |= set(resets.any(1).nonzero()[:, 0].tolist())
    if lengths is not None:
        cuts |= set(lengths.tolist())
    steps, ys, ended = sorted(cuts), [], []
    for start, stop in zip(steps, steps[1:]):
        if lengths is not None:  # longest first
            n = int((lengths > start).sum())
            ended.append((h[:, n:], c[:, n:]))
            h, c = h[:, :n].contiguous(), c[:, :n].contiguous()
        if resets is not None:
            keep = ~resets[start, : h.shape[1], None]
            h, c = h * keep, c * keep
        y, (h, c) = lstm(x[start:stop, : h.shape[1]], (h, c))
        ys.append(nn.functional.pad(y, (0, 0, 0, x.shape[1] - y.shape[1])))
    h, c = (torch.cat(states[::-1], 1) for states in zip(*ended, (h, c)))
    return torch.cat(ys), (h, c)


def packed(lstm: Any, problem: Problem, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Make every segment a row of one packed call."""
    (T, B, I), starts = x.shape, problem.resets.clone()  # type: ignore[union-attr]
    starts[0] = True
    row, start = starts.t().nonzero().unbind(1)
    stop = torch.where(row.roll(-1) == row, start.roll(-1), T)
    stop[-1] = T
    length, order = (stop - start).sort(descending=True)
    row, start, stop = row[order], start[order], stop[order]
    step = torch.arange(int(length[0]), device=x.device)[:, None]
    active = step < length
    at = ((start + step) * B + row)[active]
    first = (start == 0) & ~problem.resets[0, row]  # type: ignore[index]
    h, c = (s[:, row] * first[:, None] for s in state)
    y, last = lstm(nn.utils.rnn.PackedSequence(x.reshape(T * B, I)[at], active.sum(1).cpu()), (h, c))
    ends = (stop == T).nonzero()[:, 0]
    ends = ends[row[ends].argsort()]
    h, c = (s[:, ends] for s in last)
    return y.data.new_zeros(T * B, y.data.shape[1]).index_copy(0, at, y.data).view(T, B, -1), (h, c)


def loop(lstm: Any, problem: Problem, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Take one product for the inputs of all steps, and loop over the steps, keeping h and c of each."""
    (w_ih, w_hh, b_ih, b_hh), cells = lstm._flat_weights, []

    def step(z: Tensor, state: State) -> State:
        z_i, z_f, z_g, z_o = torch.addmm(z, state[0], w_hh.t()).chunk(4, 1)
        h, c = lstm_step(z_i, z_f, z_g, z_o, state[1])
        cells.append(c)
        return h, c

    z = nn.functional.linear(x, w_ih, b_ih + b_hh)
    y, state = by_steps(step, problem.resets, z, state, problem.ends)
    if problem.case.cell_states:
        torch.stack(cells)
    return y, state


PEERS: dict[str, Provider] = dict(torchrl=torchrl, haste=haste, flashrnn=flashrnn, fastlstm=fastlstm)
BY_HAND: dict[str, Provider] = {
    f"torch by hand: {way.__name__}": functools.partial(_by_hand, way) for way in (split, packed, loop)
}
