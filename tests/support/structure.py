"""The shape of the code, counted: frames from a module to its kernel, parameters, import circles, hand-kept formatting.

`TRITON_INTERPRET=1 python -m support.structure`, in the folder tests, prints them.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "lstm_triton": ROOT / "lstm_triton",
    "lstm_triton.cells": ROOT / "lstm_triton" / "cells",
    "lstm_triton.kernels": ROOT / "kernels",
    "lstm_triton.bench": ROOT / "bench",
    "lstm_triton.demo": ROOT / "lstm_triton" / "demo",
}

# ---- the path of a call ----------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """What ran of this package: the frames (file, function) from the first to a launch, and how many calls in all.

    What Triton's interpreter runs inside a launch does not count.
    """

    chain: list[tuple[str, str]]
    calls: int

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.chain}


def trace(call: Callable[[], object]) -> Trace:
    """The frames that forward to the first kernel launch of `call`, and how many calls of the package it makes."""
    from lstm_triton.kernels.launch import Launcher

    launch = Launcher.__call__.__code__
    chain: list[tuple[str, str]] = []
    calls = launching = 0

    def profile(frame, event, _):
        nonlocal calls, launching
        if event == "call" and not launching and (name := _name(frame)):
            calls += 1
            if frame.f_code is launch and not chain:
                caller = frame
                while caller is not None:
                    if name := _name(caller):
                        chain.insert(0, name)
                    caller = caller.f_back
        if frame.f_code is launch and event in ("call", "return"):
            launching += 1 if event == "call" else -1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return Trace(chain, calls)


def _name(frame) -> tuple[str, str] | None:
    path = Path(frame.f_code.co_filename)
    for folder in ("lstm_triton", "kernels"):
        if path.parent.name == folder and not frame.f_code.co_name.startswith(
            "<"
        ):  # a comprehension is a frame until 3.12
            return path.name, frame.f_code.co_name
    return None


# ---- the source ------------------------------------------------------------------------------------------------------


def sources(*folders: str) -> Iterator[Path]:
    """The Python files of these folders of the repository, and of the folders in them."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(p.is_symlink() for p in path.parents if p.is_relative_to(ROOT)):
                yield path


def wide_functions(limit: int, *folders: str) -> dict[str, int]:
    """file:function -> how many parameters, where there are more than `limit`; constructors and kernels excepted."""
    found = {}
    for path in sources(*folders):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name == "__init__" or _is_kernel(node):
                continue
            a = node.args
            n = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
            if n > limit:
                found[f"{path.relative_to(ROOT)}:{node.name}"] = n
    return found


def _is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list)


def hand_formatted(*folders: str) -> tuple[int, int]:
    """How often ruff is told to skip a statement, and to be off."""
    text = "\n".join(path.read_text() for path in sources(*folders))
    return text.count("# fmt: " + "skip"), text.count("# fmt: " + "off")


def imports(*packages: str) -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, wherever in the file; not those only for types."""
    files = {}
    for package in packages:
        for path in sorted(FOLDERS[package].glob("*.py")):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    graph = {}
    for module, path in files.items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        graph[module] = {name for name in _imported(ast.parse(path.read_text()), package, files) if name != module}
    return graph


def _imported(tree: ast.AST, package: str, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                if f"{base}.{alias.name}" in files:
                    yield f"{base}.{alias.name}"
                elif base in files:
                    yield base
        yield from _imported(node, package, files)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that import one another."""
    reached = {module: _reached(graph, module) for module in graph}
    groups: dict[frozenset[str], None] = {}
    for module in graph:
        together = frozenset(m for m in reached[module] if module in reached.get(m, ()))
        if together:
            groups[together] = None
    return [set(group) for group in groups]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    pending = list(graph[start])
    while pending:
        module = pending.pop()
        if module in graph and module not in found:
            found.add(module)
            pending += graph[module]
    return found


def flat_indices(*folders: str) -> list[str]:
    """file:line of every look-up by a literal position from 5 to 31: an argument that lost its name."""
    found = []
    for path in sources(*folders):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Subscript):
                continue
            ends = [node.slice.lower, node.slice.upper] if isinstance(node.slice, ast.Slice) else [node.slice]
            if any(isinstance(e, ast.Constant) and isinstance(e.value, int) and 4 < e.value < 32 for e in ends):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def report() -> None:
    for folders in (("lstm_triton", "kernels"), ("bench",), ("tests", "examples", "docs")):
        wide = wide_functions(8, *folders)
        skips, offs = hand_formatted(*folders)
        print(
            f"{' '.join(folders)}: {len(wide)} functions with more than 8 parameters, {skips} fmt: skip, {offs} fmt: off"
        )
        print("  ", *(f"{n} {name}" for name, n in wide.items()), sep="\n   ")
    print("circles", circles(imports(*FOLDERS)))
    print("flat indices", flat_indices("lstm_triton", "kernels"))


def report_traces() -> None:
    import torch

    from lstm_triton import LSTM

    lstm, x = LSTM(4, 5, backend="triton"), torch.randn(3, 2, 4)
    for _ in range(2):
        loss = lstm(x)[0].sum()
    torch.autograd.grad(loss, list(lstm.parameters()))
    loss = lstm(x)[0].sum()
    for name, found in (
        ("forward", trace(lambda: lstm(x))),
        ("inference", trace(torch.no_grad()(lambda: lstm(x)))),
        ("backward", trace(lambda: torch.autograd.grad(loss, list(lstm.parameters())))),
    ):
        print(
            f"{name}: {len(found.chain)} frames, {len(found.files)} files, {found.calls} calls",
            *found.chain,
            sep="\n   ",
        )


if __name__ == "__main__":
    report()
    report_traces()
