"""Random problems on compiled code: `make sweep BUDGET=600`, or `python tests/sweep.py 600 [seed]`.

Draws kernels, shapes, dtypes, features, targets and orders of execution until the seconds are over. Each launch is executed and
checked (support.executor), every result judged against float64. What fails is printed with its number, for
`python tests/sweep.py again NUMBER`; the status is then 1. The first third of the seconds is for random cells in the
interpreter, in float64 beside autograd: with TRITON_INTERPRET=1 in the environment there are only these.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

INTERPRETING = os.environ.setdefault("TRITON_INTERPRET", "0") == "1"  # before triton is imported

import torch  # noqa: E402
from support import cell_grammar, cells, executor, layers, readouts, recurrents  # noqa: E402

from lstm_triton.cells import Cell  # noqa: E402

KINDS = [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32x3"),
    (torch.float64, "ieee"),
]
SEGMENTS: list[dict[str, Any]] = [
    {},
    {"resets": True},
    {"lengths": True},
    {"cells": True},
    {"resets": True, "reset_state": "shared"},
    {"resets": True, "reset_state": "stored", "lengths": True, "cells": True},
]
MOST = 12000  # elements of a state, all rows and directions: an execution takes seconds


def cell(rng: random.Random) -> tuple[tuple, dict, Callable, Any]:
    shape = (
        rng.choice([1, 3, 16, 17, 33, 64, 100]),
        rng.choice([1, 8, 19, 32, 64, 70]),
        rng.choice([4, 19, 32, 48, 65, 96]),
    )
    return shape, {}, cells.by_kernels, cells


def readout(rng: random.Random) -> tuple[tuple, dict, Callable, Any]:
    shape = rng.choice([1, 5, 17, 40]), rng.choice([8, 19, 32, 70]), rng.choice([2, 37, 128, 300, 1500])
    return shape, {}, readouts.by_kernels, readouts


def layer(rng: random.Random) -> tuple[tuple, dict, Callable, Any]:
    while True:
        B, H, D = rng.choice([1, 3, 16, 17, 33, 64, 65, 128]), rng.randint(1, 300), rng.choice([1, 1, 2])
        if B * H * D <= MOST:
            break
    options = {**rng.choice(SEGMENTS), "batch_major": rng.random() < 0.3, "bias": rng.random() < 0.8}
    backend, recompute = rng.choice(["triton", "triton", "triton-stepwise"]), rng.random() < 0.3

    def by_kernels(problem: layers.Problem) -> list[torch.Tensor]:
        return layers.by_kernels(problem, backend, recompute=recompute)

    by_kernels.__name__ = f"{backend}, recompute={recompute}"
    return (rng.choice([1, 3, 4]), B, rng.choice([1, 8, 19]), H, D), options, by_kernels, layers


def own_cell(rng: random.Random) -> tuple[tuple, dict, Callable, Any]:
    """A layer of a random cell, of up to eight programs that wait for each other."""
    options = rng.choice([{}, {"resets": True}, {"lengths": True}, {"resets": True, "lengths": True}])
    number, backend, recompute = rng.randrange(10**6), rng.choice(["triton", "triton-stepwise"]), rng.random() < 0.3
    shape = number, rng.choice([1, 3]), rng.choice([1, 3, 17]), rng.choice([3, 8]), rng.choice([4, 19, 32, 70, 130])

    def by_kernels(problem: recurrents.Problem) -> list[torch.Tensor]:
        return problem.run(backend, recompute=recompute)

    by_kernels.__name__ = f"{backend}, recompute={recompute}"
    return shape, options, by_kernels, recurrents


def interpreted_cell(rng: random.Random) -> tuple[tuple, dict, Callable, Any]:
    """A small layer of a random cell, of functions with kinks too."""
    *parts, words = cell_grammar.random_cell(rng)
    options = {name: rng.random() < 0.3 for name in ("bidirectional", "resets", "lengths")}
    backend, recompute = rng.choice(["triton", "triton-stepwise"]), rng.random() < 0.3
    shape = Cell(*parts), rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 4), rng.choice([1, 3, 5, 17])

    def by_kernels(problem: recurrents.Problem) -> list[torch.Tensor]:
        return problem.run(backend, recompute=recompute)

    by_kernels.__name__ = f"{backend}, recompute={recompute}, {words}"
    return shape, options, by_kernels, recurrents


def once(number: int) -> tuple[str, str | None, int]:
    """The problem of this number: what it is, what is wrong with it, how many programs were executed."""
    rng = random.Random(number)
    kind = rng.choice([cell, readout, own_cell, own_cell, own_cell, layer, layer, layer])
    kind = interpreted_cell if INTERPRETING else kind
    shape, options, by_kernels, module = kind(rng)
    dtype, precision = KINDS[-1] if INTERPRETING else rng.choice(KINDS)
    target, seed, executed = f"sm_{rng.choice([80, 90, 100, 120])}", rng.randrange(1, 10**6), 0
    what = f"{kind.__name__} {shape} {dtype} {precision} {options} {by_kernels.__name__} {target}, number {number}"

    def inaccurate(seed: int) -> str | None:
        nonlocal executed
        problem = module.draw(*shape, dtype, precision=precision, seed=seed, **options)
        with contextlib.nullcontext() if INTERPRETING else executor.executing(target, seed=seed) as device:
            results = by_kernels(problem)
        launches = device.executed if device else ()
        executed += sum(launch.grid[0] * launch.grid[1] * launch.grid[2] for launch in launches)
        try:
            module.assert_as_accurate_as_torch(results, problem)
        except AssertionError as error:
            return f"inaccurate: {error}"
        return None

    try:
        wrong = inaccurate(seed)
        # The rule allows three standard deviations. Of the thousands of tensors in a sweep some exceed these by chance, but not
        # with other numbers too. Nothing in float64 is by chance.
        if wrong and not INTERPRETING and not any([inaccurate(seed + 1), inaccurate(seed + 2)]):
            what, wrong = f"{what}\n    with one of three draws of its numbers {wrong}", None
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    return what, wrong, executed


def main(arguments: Sequence[str]) -> int:
    if not INTERPRETING and (reason := executor.why_not()) is not None:
        print(f"make sweep: {reason}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    if arguments[0] == "again":
        what, wrong, _ = once(int(arguments[1]))
        print(f"{what}\n    {wrong or 'nothing is wrong'}")
        return 1 if wrong else 0
    budget, seed = float(arguments[0]), int(arguments[1]) if len(arguments) > 1 else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    wrong_cells = False
    if not INTERPRETING:
        interpreted = [sys.executable, __file__, str(budget / 3), str(seed)]
        wrong_cells = subprocess.run(interpreted, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode != 0
        budget *= 2 / 3
    rng, end = random.Random(seed), time.monotonic() + budget
    drawn, programs, failed = Counter[str](), 0, 0
    while time.monotonic() < end:
        what, wrong, executed = once(rng.randrange(10**9))
        drawn[what.split()[0]] += 1
        programs += executed
        failed += wrong is not None
        if wrong or "\n" in what:
            print(f"{what} (seed {seed})\n    {wrong or 'nothing else is wrong'}", flush=True)
    counts = ", ".join(f"{n} {name}s" for name, n in sorted(drawn.items()))
    print(f"{counts}: {programs} programs executed, {failed} problems failed (seed {seed})")
    return 1 if failed or wrong_cells else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
