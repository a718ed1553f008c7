"""The shape of the code, which reviews alone would not hold: short paths, names for what travels together, no circles."""

import ast
import functools
import graphlib
import importlib.util
import re
import traceback
from pathlib import Path

import torch

from lstm_triton import LSTM
from lstm_triton.kernels.launch import Launcher

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "lstm_triton": ROOT / "lstm_triton",
    "lstm_triton.cells": ROOT / "lstm_triton" / "cells",
    "lstm_triton.kernels": ROOT / "kernels",
    "lstm_triton.bench": ROOT / "bench",
    "lstm_triton.demo": ROOT / "lstm_triton" / "demo",
}
FILES = {
    package if path.stem == "__init__" else f"{package}.{path.stem}": path
    for package, folder in FOLDERS.items()
    for path in sorted(folder.glob("*.py"))
}


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def test_a_layer_reaches_its_kernels_in_few_frames(device, monkeypatch):
    """The launcher's own is one more."""
    module, x = LSTM(4, 5, backend="triton", device=device), torch.randn(3, 2, 4, device=device)
    loss = module(x)[0].sum()
    loss.backward(retain_graph=True)  # imports are no part of a call
    stacks, launch = [], Launcher.__call__

    def noting(*args, **kwargs):
        stacks.append(traceback.extract_stack())
        return launch(*args, **kwargs)

    monkeypatch.setattr(Launcher, "__call__", noting)
    for call, start, most in (
        (lambda: module(x), ("lstm.py", "forward"), 7),
        (torch.no_grad()(lambda: module(x)), ("lstm.py", "forward"), 7),
        (lambda: torch.autograd.grad(loss, list(module.parameters())), ("autograd.py", "backward"), 6),
    ):
        stacks.clear()
        call()
        paths = [(Path(frame.filename), frame.name) for frame in stacks[0] if not frame.name.startswith("<")]
        frames = [(path.name, name) for path, name in paths if path.parent.name in ("lstm_triton", "kernels")]
        assert frames[0] == start and len(frames) <= most and len({file for file, _ in frames}) <= 5, frames


def test_arguments_that_belong_together_travel_together_and_have_names():
    """At most eight parameters where ruff does not count them, and no look-up by position past the first few."""
    for module in FILES:
        for node in ast.walk(_tree(module)):
            where = f"{module}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef) and module.startswith("lstm_triton.kernels"):
                is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                assert is_kernel or len(node.args.args) + len(node.args.kwonlyargs) <= 8, where
            elif isinstance(node, ast.Subscript) and not module.startswith(("lstm_triton.bench", "lstm_triton.demo")):
                ends = [node.slice.lower, node.slice.upper] if isinstance(node.slice, ast.Slice) else [node.slice]
                numbers = [end.value for end in ends if isinstance(end, ast.Constant) and isinstance(end.value, int)]
                assert not any(4 < number < 32 for number in numbers), where


def test_almost_all_code_is_formatted_by_ruff():
    marks = [mark for path in FILES.values() for mark in re.findall("fmt: *(skip|off)", path.read_text())]
    assert marks.count("skip") < 10 and "off" not in marks


def _imports(module: str) -> set[str]:
    """The modules of this project that a module imports, wherever in the file; not those only for types."""
    found = set()
    package = module if FILES[module].stem == "__init__" else module.rpartition(".")[0]
    conditions = (node for node in ast.walk(_tree(module)) if isinstance(node, ast.If))
    of_types = {n for c in conditions if "TYPE_CHECKING" in ast.unparse(c.test) for n in ast.walk(c)}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in of_types:
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names if names <= set(FILES) else names | {base}
    return found & set(FILES) - {module}


def test_who_imports_whom():
    """Nothing in a circle; the kernels none of what calls them; and the command line and the demo alone the benchmark."""
    graph = {module: _imports(module) for module in FILES}
    assert "lstm_triton.kernels.layer" in graph["lstm_triton.kernels.layer_backward"]
    graphlib.TopologicalSorter(graph).prepare()
    clients = "lstm_triton.bench", "lstm_triton.demo", "lstm_triton.cli"
    for module, imported in graph.items():
        if module.startswith("lstm_triton.kernels"):
            assert all(name.startswith("lstm_triton.kernels") for name in imported), module
        elif not module.startswith(clients):
            assert not any(name.startswith(clients[:2]) for name in imported), module
