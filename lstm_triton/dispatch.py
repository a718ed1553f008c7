"""The choice of the backend that runs a call, with its reason: pure functions of what is known before the call."""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .modes import takes_reference

BACKENDS = ("auto", "triton", "triton-persistent", "triton-stepwise", "cudnn", "reference")
PRECISIONS = (None, "ieee", "tf32", "tf32x3")

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CUDNN_MAX_STEPS = 65535
# bfloat16 and TF32 products begin with compute capability 8.0, and the tests compile the kernels from there on.
_MIN_CAPABILITY = (8, 0)


def check_precision(precision: str | None) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of 'ieee', 'tf32', 'tf32x3' or None, got {precision!r}")


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


@dataclass(frozen=True)
class Choice:
    """The backend that runs a call, or "torch" for torch's own kernels on a CPU, and the reason in one sentence."""

    backend: str
    reason: str


class Measured(NamedTuple):
    """The backend that was measured fastest for such a call on this device, and the measurement in words."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Environment:
    """The surroundings of a call: whether Triton is installed and interpreting, and the capability of the GPU."""

    has_triton: bool
    interpreting: bool
    capability: tuple[int, int] | None  # of the GPU that holds the tensors; None on a CPU


@functools.cache
def environment(device: torch.device) -> Environment:
    """Return the environment of calls on this device."""
    capability = None
    if device.type == "cuda" and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(device)
    has_triton = importlib.util.find_spec("triton") is not None
    interpreting = False
    if has_triton and os.environ.get("TRITON_INTERPRET"):
        from .kernels import interpreter

        interpreting = interpreter.is_interpreting()
    return Environment(has_triton, interpreting, capability)


def _why_no_kernels(device_type: str, dtype: torch.dtype, env: Environment) -> str | None:
    """Return why the Triton kernels cannot run, or None if they can."""
    if not env.has_triton:
        return "triton is not installed"
    if dtype not in _KERNEL_DTYPES:
        return f"the kernels know no {dtype}"
    if device_type == "cpu":
        reason = "the kernels run on NVIDIA GPUs; on a CPU only in Triton's interpreter, slowly (TRITON_INTERPRET=1)"
        return None if env.interpreting else reason
    if device_type != "cuda" or env.capability is None:
        return f"the kernels run on NVIDIA GPUs, not on '{device_type}'"
    if env.interpreting:
        return "TRITON_INTERPRET=1 is set: the interpreter works on CPU tensors"
    if env.capability < _MIN_CAPABILITY:
        return "the GPU's compute capability {}.{} is below {}.{}".format(*env.capability, *_MIN_CAPABILITY)
    return None


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton kernels cannot run on this device, or None if they can."""
    return _why_no_kernels(device.type, dtype, environment(device))


def choose_cell(backend: str, device_type: str, dtype: torch.dtype, env: Environment) -> Choice:
    """Choose the backend of one LSTM cell call.

    Raises:
        ValueError: unknown backend.
        RuntimeError: a named backend that cannot run the call, with the reason.
    """
    no_cudnn = "cuDNN has no LSTM cell, only whole sequences"
    return _choose(backend, device_type, dtype, env, no_cudnn, "one fused launch computes the step", "cell")


def choose_readout(backend: str, device_type: str, dtype: torch.dtype, env: Environment) -> Choice:
    """Choose the backend of one softmax readout; raises as `choose_cell` does."""
    fused = "at most two fused launches compute it"
    return _choose(backend, device_type, dtype, env, "cuDNN has no such readout", fused, "linear layer and softmax")


def _choose(
    backend: str, device_type: str, dtype: torch.dtype, env: Environment, no_cudnn: str, fused: str, torchs: str
) -> Choice:
    """Choose a backend for `choose_cell` and `choose_readout`; no_cudnn, fused and torchs word the reasons."""
    check_backend(backend)
    if backend == "reference":
        return Choice("reference", "requested")
    if backend == "cudnn":
        raise RuntimeError(f"backend='cudnn' cannot serve: {no_cudnn}")
    obstacle = _why_no_kernels(device_type, dtype, env)
    if backend == "auto":
        if obstacle is None and device_type == "cuda":
            # To be reworded when committed benchmark rows show how the kernels compare with torch's own.
            return Choice("triton", f"{fused}; its speed is not yet measured on a GPU")
        return Choice("torch", obstacle or f"on a CPU torch's own {torchs} is faster than Triton's interpreter")
    if obstacle is not None:
        raise RuntimeError(f"backend={backend!r} cannot serve: {obstacle}")
    return Choice("triton", "requested")


@dataclass(frozen=True)
class Call:
    """The properties of a layer's call that the choice depends on, besides device and dtype."""

    plain: bool  # no resets, lengths, cell states or recomputation, so that cuDNN and torch's CPU kernels can run it
    long: bool  # more steps than cuDNN takes
    precision: str | None
    projected: bool = False  # proj_size
    measured: Measured | None = None


def choose_layer(backend: str, device_type: str, dtype: torch.dtype, env: Environment, call: Call) -> Choice:
    """Choose the backend of an LSTM layer: "triton", "triton-persistent", "triton-stepwise", "cudnn", "torch" or "reference".

    Raises as `choose_cell` does.
    """
    check_backend(backend)
    if backend == "reference":
        return Choice("reference", "requested")
    obstacle = _why_no_kernels(device_type, dtype, env)
    no_cudnn = _why_no_cudnn(device_type, call)
    if backend == "cudnn":
        if no_cudnn is not None:
            raise RuntimeError(f"backend='cudnn' cannot serve: {no_cudnn}")
        return Choice("cudnn", "requested")
    if backend != "auto":
        if obstacle is not None:
            raise RuntimeError(f"backend={backend!r} cannot serve: {obstacle}")
        return Choice(backend, "requested")
    measured = call.measured
    if measured is not None and (no_cudnn if measured.backend == "cudnn" else obstacle) is None:
        return Choice(*measured)
    if device_type == "cuda" and obstacle is None:
        unmeasured = "the persistent kernels are not yet measured on this GPU"
        if no_cudnn is not None:
            return Choice("triton-stepwise", f"{no_cudnn}; {unmeasured}")
        return Choice("cudnn", unmeasured)
    if no_cudnn is None and obstacle is not None:
        return Choice("cudnn", obstacle)
    if not call.plain and device_type != "cpu":
        return Choice("reference", "torch's own kernels have no resets, lengths, cell states or recomputation")
    if device_type == "cuda":
        return Choice("reference", f"{no_cudnn}, and {obstacle}")
    reason = obstacle or "on a CPU torch's own kernels are faster than Triton's interpreter"
    loops = "; cell states, reset states and cells of one's own, if any, run step by step in plain PyTorch"
    return Choice("torch", reason if call.plain else reason + loops)


def _why_no_cudnn(device_type: str, call: Call) -> str | None:
    if device_type != "cuda":
        return f"cuDNN runs on NVIDIA GPUs, not on '{device_type}'"
    if not call.plain:
        return "cuDNN has no resets, lengths, cell states or recomputation"
    if call.long:
        return f"cuDNN takes no more than {CUDNN_MAX_STEPS} steps"
    if call.precision == "tf32x3":
        return "cuDNN has no tf32x3"
    return None


@functools.cache
def _remembered(choose, backend: str, device: torch.device, dtype: torch.dtype, *call) -> str:
    return choose(backend, device.type, dtype, environment(device), *([Call(*call)] if call else [])).backend


def is_long(T: int, device: torch.device) -> bool:
    """Return `Call.long`, a bool for the symbolic T of a compiler too. On a CPU it puts no guard on T."""
    return device.type == "cuda" and bool(T > CUDNN_MAX_STEPS)


def _constant_to_compilers(function):
    """Mark as torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


def _transformable(backend: str, chosen: str) -> str:
    """Return "reference" for "auto" under vmap and forward-mode AD, for which torch's own kernels have no rules."""
    return "reference" if backend == "auto" and chosen in ("torch", "cudnn") and takes_reference() else chosen


@_constant_to_compilers
def cell_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend of `choose_cell` for tensors of this device and dtype, remembered."""
    return _transformable(backend, _remembered(choose_cell, backend, device, dtype))


@_constant_to_compilers
def layer_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    plain: bool,
    long: bool,
    precision: str | None,
    projected: bool = False,
    measured: Measured | None = None,
) -> str:
    """Return the backend of `choose_layer` for tensors of this device and dtype and this `Call`, remembered."""
    chosen = _remembered(choose_layer, backend, device, dtype, plain, long, precision, projected, measured)
    return _transformable(backend, chosen)


@_constant_to_compilers
def readout_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend of `choose_readout` for tensors of this device and dtype, remembered."""
    return _remembered(choose_readout, backend, device, dtype)
