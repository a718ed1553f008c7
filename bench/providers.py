"""Who computes a case: this package in each of its ways, torch's own modules, torch.compile; others' kernels are in `peers`.

A provider says why it cannot serve a case, or makes a function of the problem's leaves. Everything else (modes, gradients,
graphs, checks, timing) is the same code for all.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import dispatch, reference

from . import cudnn
from .cases import Case
from .problem import Problem, torch_lstm

Outputs = tuple[Tensor, Tensor, Tensor]  # y [T, B, D * R], h_n, c_n


class Unavailable(RuntimeError):
    """The provider cannot serve here; the message says why."""


@dataclass
class Model:
    """A case as one provider computes it.

    run: of x, h0, c0 (shaped as in Problem), returns y, h_n, c_n. step: of x [B, I] and (h, c) [B, H], for a cell.
    weights: its parameters by torch.nn.LSTM's names; to_torch_gradient: maps a gradient to torch's layout where that differs.
    """

    run: Callable[[Tensor, Tensor, Tensor], Outputs]
    weights: dict[str, Tensor]
    backend: str | None = None
    backend_reason: str | None = None
    algorithm: str | None = None
    remarks: list[str] = field(default_factory=list)
    takes_initial_state: bool = True
    step: Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] | None = None
    to_torch_gradient: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


class Provider(Protocol):
    @property
    def name(self) -> str: ...

    def make(self, problem: Problem) -> Model:
        """The model with the problem's weights; raises Unavailable (or whatever goes wrong) where it cannot."""
        ...


def _load(module: nn.Module, problem: Problem, cell: bool) -> dict[str, Tensor]:
    """Put the problem's weights into a module; returns its parameters by the layer's names."""
    end = "_l0" if cell else ""
    parameters = {name + end: p for name, p in module.named_parameters()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(problem.weights[name])
    training = problem.case.mode == "train"
    module.train(training)
    for p in parameters.values():
        p.requires_grad_(training)
    return dict(parameters)


def _cell_run(cell: Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]) -> Callable[..., Outputs]:
    def run(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
        h, c = cell(x[0], (h0[0], c0[0]))
        return h[None], h[None], c[None]

    return run


def _loop_run(cell: Callable[..., tuple[Tensor, Tensor]], resets: Tensor | None) -> Callable[..., Outputs]:
    def run(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
        h, c = h0[0], c0[0]
        outputs = []
        for t, x_t in enumerate(x.unbind(0)):
            if resets is not None:
                keep = ~resets[t, :, None]
                h, c = h * keep, c * keep
            h, c = cell(x_t, (h, c))
            outputs.append(h)
        return torch.stack(outputs), h[None], c[None]

    return run


def _one_layer(case: Case, what: str) -> None:
    if case.layers > 1 or case.bidirectional or case.proj_size or case.rows != "padded":
        raise Unavailable(f"{what}: one layer, one direction, padded rows")


@dataclass(frozen=True)
class Ours:
    """This package, its backend left to choose or forced."""

    backend: str = "auto"
    recompute: bool = False

    @property
    def name(self) -> str:
        return f"lstm_triton {self.backend}" + (" recompute" if self.recompute else "")

    def make(self, problem: Problem) -> Model:
        case, device, dtype = problem.case, problem.device, problem.x.dtype
        precision = case.precision or None
        if case.form in ("cell", "loop"):
            if self.recompute or self.backend in ("triton-persistent", "triton-stepwise", "cudnn"):
                raise Unavailable("a cell has one way in Triton: lstm_triton auto, triton or reference")
            if case.form == "loop":
                _one_layer(case, "cells in a loop")
            cell = lstm_triton.LSTMCell(
                case.input_size, case.hidden_size, device=device, dtype=dtype, precision=precision, backend=self.backend
            )
            choice = self._choose(dispatch.choose_cell, device, dtype)
            run = _cell_run(cell) if case.form == "cell" else _loop_run(cell, problem.resets)
            return Model(run, _load(cell, problem, True), choice.backend, choice.reason, step=cell)
        lstm = lstm_triton.LSTM(
            case.input_size, case.hidden_size, case.layers, bidirectional=case.bidirectional, proj_size=case.proj_size,
            device=device, dtype=dtype, precision=precision, backend=self.backend, recompute=self.recompute,
        )  # fmt: skip
        if self.backend == "reference" and case.length > 256:
            raise Unavailable("plain PyTorch step by step: run up to 256 steps")
        weights = _load(lstm, problem, False)
        plain = problem.resets is None and case.rows != "lengths" and not self.recompute
        call = dispatch.Call(plain, case.length > dispatch.CUDNN_MAX_STEPS, precision, case.proj_size > 0)
        choice = self._choose(dispatch.choose_layer, device, dtype, call)
        lengths = problem.lengths.to(device) if case.rows == "lengths" and problem.lengths is not None else None
        if case.rows == "packed":
            run = _packed_run(lstm, problem)
        else:

            def run(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
                y, (h_n, c_n) = lstm(x, (h0, c0), resets=problem.resets, lengths=lengths)[:2]
                return y, h_n, c_n

        model = Model(run, weights, choice.backend, choice.reason)
        if choice.backend == "cudnn":
            model.algorithm = _algorithm(problem)
        return model

    def _choose(self, choose: Callable[..., Any], device: torch.device, dtype: torch.dtype, *call: Any) -> Any:
        try:
            return choose(self.backend, device.type, dtype, dispatch.environment(device), *call)
        except RuntimeError as error:  # a forced backend that cannot serve says so
            raise Unavailable(str(error)) from None


def _packed_run(lstm: nn.Module, problem: Problem) -> Callable[..., Outputs]:
    """Packed in every call and its result padded again, as users of padded batches do: both count, for every provider."""
    lengths, T = problem.lengths, problem.case.length
    assert lengths is not None

    def run(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
        packed = pack_padded_sequence(x, lengths)
        y, (h_n, c_n) = lstm(packed, (h0, c0))
        return pad_packed_sequence(y, total_length=T)[0], h_n, c_n

    return run


def _algorithm(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return None
    p = torch.cuda.get_device_properties(problem.device)
    return cudnn.algorithm(problem.case, cudnn.Gpu((p.major, p.minor), p.multi_processor_count))


@dataclass(frozen=True)
class TorchLSTM:
    """torch.nn.LSTM: cuDNN on a GPU, torch's CPU kernels elsewhere. With resets or lengths, as its users work around it."""

    name: str = "torch.nn.LSTM"

    def make(self, problem: Problem) -> Model:
        case = problem.case
        if case.form == "loop":
            raise Unavailable("torch.nn.LSTM takes whole sequences; step by step it is torch.nn.LSTMCell")
        if case.precision == "tf32x3":
            raise Unavailable("cuDNN has no tf32x3")
        lstm = torch_lstm(case, problem.device, problem.x.dtype)
        weights = _load(lstm, problem, False)
        lstm.flatten_parameters()
        model = Model(self._run(lstm, problem), weights, None, None, _algorithm(problem))
        if problem.device.type == "cuda" and (remark := cudnn.remark(case)):
            model.remarks.append(remark)
        if case.resets:
            model.remarks.append("no resets in torch.nn.LSTM: one call per step, the states masked between them")
        if case.rows == "lengths":
            model.remarks.append("no lengths in torch.nn.LSTM: packed and padded again")
        return model

    def _run(self, lstm: nn.Module, problem: Problem) -> Callable[..., Outputs]:
        case = problem.case
        if case.resets:
            if case.bidirectional or case.rows != "padded":
                raise Unavailable("a loop over steps runs in one direction, over padded rows")
            resets = problem.resets
            assert resets is not None

            def loop(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
                h, c = h0, c0
                outputs = []
                for t, x_t in enumerate(x.split(1)):
                    keep = ~resets[t, :, None]
                    y, (h, c) = lstm(x_t, (h * keep, c * keep))
                    outputs.append(y)
                return torch.cat(outputs), h, c

            return loop
        if case.rows != "padded":
            return _packed_run(lstm, problem)

        def run(x: Tensor, h0: Tensor, c0: Tensor) -> Outputs:
            y, (h_n, c_n) = lstm(x, (h0, c0))
            return y, h_n, c_n

        return run


@dataclass(frozen=True)
class TorchCell:
    """torch.nn.LSTMCell, once or called for every step."""

    name: str = "torch.nn.LSTMCell"

    def make(self, problem: Problem) -> Model:
        case = problem.case
        _one_layer(case, "torch.nn.LSTMCell in a loop")
        if case.length > 2048:
            raise Unavailable("a loop over cells is run up to 2048 steps")
        if case.precision == "tf32x3":
            raise Unavailable("torch has no tf32x3")
        cell = nn.LSTMCell(case.input_size, case.hidden_size, device=problem.device, dtype=problem.x.dtype)
        weights = _load(cell, problem, True)
        run = _cell_run(cell) if case.form == "cell" else _loop_run(cell, problem.resets)
        return Model(run, weights, step=cell)


@dataclass(frozen=True)
class Compiled:
    """torch.compile of the plain-PyTorch cell, once or called for every step."""

    name: str = "torch.compile"

    def make(self, problem: Problem) -> Model:
        case = problem.case
        _one_layer(case, "the compiled cell in a loop")
        if case.length > 256:
            raise Unavailable("a loop over compiled cells is run up to 256 steps")
        if case.precision == "tf32x3":
            raise Unavailable("torch has no tf32x3")
        cell = nn.LSTMCell(case.input_size, case.hidden_size, device=problem.device, dtype=problem.x.dtype)
        weights = _load(cell, problem, True)
        torch.compiler.reset()  # or the cases of a long run exhaust its count of recompilations
        compiled = torch.compile(reference.lstm_cell, fullgraph=True, dynamic=False)

        def step(x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return compiled(x, *hx, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)

        run = _cell_run(step) if case.form == "cell" else _loop_run(step, problem.resets)
        return Model(run, weights, "inductor", "fullgraph, static shapes", step=step)


def all_providers() -> dict[str, Provider]:
    """Every provider by name; the order is that of the tables."""
    from . import peers

    providers: list[Provider] = [
        Ours(), Ours("triton-persistent"), Ours("triton-stepwise"), Ours("triton"), Ours("cudnn"), Ours("reference"),
        Ours("auto", recompute=True), Ours("triton", recompute=True), TorchLSTM(), TorchCell(), Compiled(), *peers.PEERS,
    ]  # fmt: skip
    return {provider.name: provider for provider in providers}


OURS = "lstm_triton auto"
CUDNN = "torch.nn.LSTM"
TORCH_CELL = "torch.nn.LSTMCell"
PEER_PACKAGES = {"torchrl": "torchrl", "haste": "haste_pytorch", "flashrnn": "flashrnn"}


def chosen_for(case: Case, kind: str, device_type: str, interpreter: bool = False) -> list[str]:
    """The providers of a task by default: those that could be worth comparing. Which of them can serve, they say themselves."""
    torchs = CUDNN if case.form == "layer" else TORCH_CELL
    if kind in ("overhead", "cold-start"):
        return ["lstm_triton triton", torchs]
    if interpreter:
        ways = ["lstm_triton triton"] if case.form == "cell" else ["lstm_triton triton-stepwise", "lstm_triton triton"]
        return [*ways, torchs]
    gpu = device_type == "cuda"
    if kind == "memory":
        triton = ["lstm_triton triton", "lstm_triton triton recompute"] if gpu else []
        return [OURS, *triton, "lstm_triton auto recompute", CUDNN]
    plain = ["lstm_triton reference"] if kind == "accuracy" or (not gpu and case.length <= 64) else []
    if case.form in ("cell", "loop"):
        return [OURS, TORCH_CELL, *plain]  # torch.compile where a suite asks for it: it compiles for seconds
    # Not "lstm_triton triton", which takes one of the first two.
    forced = ["lstm_triton triton-persistent", "lstm_triton triton-stepwise"] if gpu else []
    if gpu and not case.resets and case.rows != "lengths":
        forced.append("lstm_triton cudnn")
    one_layer = case.layers == 1 and not case.bidirectional and not case.proj_size and case.rows == "padded"
    loop = [TORCH_CELL] if one_layer and (case.resets or case.length <= 64) else []
    others = (["torchrl"] if case.resets else list(PEER_PACKAGES)) if gpu and one_layer else []
    # One that is not installed is named at the first hidden size of the headline, not in every case.
    peers = [name for name in others if case.hidden_size == 768 or importlib.util.find_spec(PEER_PACKAGES[name])]
    return [OURS, *forced, CUDNN, *loop, *plain, *peers]
