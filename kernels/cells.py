"""The step functions that kernels call, by the name of the cell: the LSTM's equations, or code generated for another cell.

forward(z0, z1, z2, z3, before, at) -> saved0, saved1, saved2, saved3, state, h
backward(saved0, saved1, saved2, saved3, before, state, dh, d_state, at) -> dz0, dz1, dz2, dz3, d_before

All are tiles [BLOCK_B, BLOCK_H]; z are four pre-activations of each unit. before, state and their gradients are wider and hold
all states of a unit (`interleave`). at: (seed, t, batch rows, units) for random masks, as in `dropout`; None without masks.

Kernels mask what they load with zeros, and rely on backward(zeros) being zeros.
"""

import linecache
from typing import Any

import triton
import triton.language as tl

from .cell_equations import generated
from .dropout import mask
from .equations import expm1, log1p, lstm_backward, lstm_forward, sigmoid, tanh
from .interleave import deinterleave, interleave


@triton.jit
def _lstm_forward(z_i, z_f, z_g, z_o, c_prev, at):
    return lstm_forward(z_i, z_f, z_g, z_o, c_prev)


@triton.jit
def _lstm_backward(i, f, g, o, c_prev, c, dh, dc, at):
    return lstm_backward(i, f, g, o, c_prev, c, dh, dc)


_functions: dict[str, tuple[Any, Any]] = {"lstm": (_lstm_forward, _lstm_backward)}


def forward_of(name: str) -> Any:
    """Return the @triton.jit function `forward` of the cell of this name."""
    return _functions_of(name)[0]


def backward_of(name: str) -> Any:
    return _functions_of(name)[1]


def _functions_of(name: str) -> tuple[Any, Any]:
    if name not in _functions:
        _functions[name] = _compiled(name, generated[name].source)
    return _functions[name]


def _compiled(name: str, source: str) -> tuple[Any, Any]:
    # Triton reads the source of a function again, so linecache has to know it as a file.
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {"triton": triton, "tl": tl, "sigmoid": sigmoid, "tanh": tanh, "expm1": expm1, "log1p": log1p}
    names |= {"deinterleave": deinterleave, "interleave": interleave, "mask": mask}
    namespace: dict[str, Any] = {"__name__": f"{__name__}.{name}", **names}
    exec(compile(source, file, "exec"), namespace)
    return namespace["forward"], namespace["backward"]
