"""Lets this package run single modules of torch.nn.LSTM, GRU and their cells, without changing the class of the module.

A converted module keeps its type, so isinstance, tables of types, pickles, torch.fx and TorchScript take it for what it was.
The `forward` of torch's classes is replaced by one that asks whether the module is marked, and calls torch's own if it is not.
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from . import lstm, modules

OPTIONS = ("precision", "backend", "recompute")
_MARK = "_lstm_triton"

# torch's classes, and the names of the classes of this package that replace them. GRU and GRUCell are imported when the first
# GRU is converted, because deriving their equations takes a second.
NAMES = {torch.nn.LSTM: "LSTM", torch.nn.LSTMCell: "LSTMCell", torch.nn.GRU: "GRU", torch.nn.GRUCell: "GRUCell"}
THEIRS: tuple[Any, ...] = tuple(NAMES)


def ours(module: torch.nn.Module) -> Any:
    """Return the class of this package that replaces the class of a torch module, or the class it derives from."""
    for theirs, name in NAMES.items():
        if isinstance(module, theirs):
            if theirs is torch.nn.LSTM:
                return lstm.LSTM
            return modules.LSTMCell if theirs is torch.nn.LSTMCell else getattr(_cells(), name)
    return None


def _cells() -> Any:
    from . import cells

    return cells


def _as(name: str) -> Callable[..., Any]:
    """Return the forward of this package's class for a torch module: it runs on an object with the same attributes."""

    def forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind = getattr(_cells(), name)
        return kind.forward(shared(module, kind), *args, **kwargs)

    return forward


def shared(module: torch.nn.Module, kind: Any) -> Any:
    """Return the module, or an object of this class with the same attributes."""
    if isinstance(module, kind):
        return module
    same = object.__new__(kind)
    same.__dict__ = module.__dict__
    return same


class _Mark:
    """The attribute that marks a module. A pickle or a copy of it installs the hooks where it is loaded."""

    def __reduce__(self):
        return _installed_mark, ()


_mark = _Mark()


def _installed_mark() -> _Mark:
    install()
    return _mark


@functools.cache
def install() -> None:
    """Let torch's classes ask each of their modules whether this package runs it."""
    forwards = lstm.forward, modules.LSTMCell.forward, _as("GRU"), _as("GRUCell")
    for theirs, forward in zip(THEIRS, forwards, strict=True):
        theirs.forward = _unless_marked(theirs.forward, forward)
        theirs.extra_repr = _unless_marked(theirs.extra_repr, _options_after(theirs.extra_repr))


def _unless_marked(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    mark = _MARK

    def method(self, *args, **kwargs):
        return (ours if mark in self.__dict__ else original)(self, *args, **kwargs)

    # TorchScript compiles the source of what is wrapped, and looks its names up among the globals of the wrapper.
    wrapper = types.FunctionType(method.__code__, original.__globals__, original.__name__, None, method.__closure__)
    return functools.wraps(original)(wrapper)


def _options_after(original: Callable[..., str]) -> Callable[..., str]:
    def extra_repr(self) -> str:
        """Always name the backend, so that a printed model shows which modules are converted."""
        text = f"{original(self)}, backend={self.backend!r}"
        text += "" if self.precision is None else f", precision={self.precision!r}"
        text += ", recompute=True" if self.recompute else ""
        # Before torch 2.15 the error with which torch.compile refuses a torch.nn.LSTM quotes this text, and nothing else of it.
        is_refused = (
            isinstance(self, (torch.nn.LSTM, torch.nn.GRU)) and torch._guards.CompileContext.try_get() is not None
        )
        return text + ("; convert(model, compilable=True) gives a class that compiles" if is_refused else "")

    return extra_repr


def mark(module: torch.nn.Module, precision: str | None, backend: str, recompute: bool) -> None:
    """Have this package run a module of torch's."""
    install()
    for name, value in zip(OPTIONS, (precision, backend, recompute)):
        setattr(module, name, value)
    setattr(module, _MARK, _mark)


def rename(module: torch.nn.Module, ours: type) -> None:
    """Give a marked module this package's own class, which needs no mark."""
    del module.__dict__[_MARK]
    module.__class__ = ours


def unmark(module: torch.nn.Module) -> None:
    for name in (*OPTIONS, _MARK):
        module.__dict__.pop(name, None)


def is_marked(module: torch.nn.Module) -> bool:
    return _MARK in module.__dict__


def kind(module: torch.nn.Module) -> type | None:
    """Return the class of this package that runs the module, or None if torch runs it."""
    if is_marked(module):
        return ours(module)
    known = [lstm.LSTM, modules.LSTMCell, modules.SoftmaxReadout]
    if cells := sys.modules.get(f"{__package__}.cells"):  # else there is none of these
        known += [cells.GRU, cells.GRUCell, cells.Recurrent, cells.RecurrentCell]
    return next((kind for kind in known if isinstance(module, kind)), None)


def cell_of(module: torch.nn.Module) -> Any:
    """Return the `cells.Cell` that runs a `Recurrent` or a converted torch.nn.GRU, or None for other modules."""
    found: Any = kind(module)
    if not getattr(found, "_has_cell", False):
        return None
    return module.cell if isinstance(module, found) else found.cell


def is_torchs(module: torch.nn.Module) -> bool:
    """Return whether module is of torch.nn.LSTM, GRU, their cells or a derived class, and not converted."""
    return isinstance(module, THEIRS) and kind(module) is None


def stands_for(module: torch.nn.Module) -> type | None:
    """Return the torch class whose place the module takes, or None if torch runs it or it has no counterpart in torch."""
    found = kind(module)
    return next((theirs for theirs, name in NAMES.items() if found is not None and found.__name__ == name), None)


def why_not(module: torch.nn.Module) -> str | None:
    """Return the reason why a module that torch runs cannot be marked, or None."""
    theirs = next(kind for kind in THEIRS if isinstance(module, kind))
    name = type(module).__name__
    if type(module).forward is not theirs.forward:
        return f"its class {name} has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    for option in OPTIONS:
        if hasattr(module, option):
            return f"its class {name} has an attribute {option!r} of its own"
    return None
