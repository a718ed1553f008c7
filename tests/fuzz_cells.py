"""Random cells in Triton's interpreter: a part of `make sweep`, or `python tests/fuzz_cells.py 60 [seed]`.

Draws cells (support.cell_grammar) and layers of them until the seconds are over. Each runs through the kernels, in float64,
and is compared with its function under autograd, gradients included. What fails is printed with its number, for
`python tests/fuzz_cells.py again NUMBER`; the status is then 1.
"""

import os
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch  # noqa: E402
from support import cell_grammar, recurrents  # noqa: E402

from lstm_triton.cells import Cell  # noqa: E402


def once(number: int) -> tuple[str, str | None]:
    """The cell of this number: what it is, and what is wrong with it."""
    rng = random.Random(f"layer of {number}")
    *parts, words = cell_grammar.random_cell(random.Random(number))
    sizes = T, B, I, H = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 4), rng.choice([1, 3, 5, 17])
    names = ("bidirectional", "resets", "lengths")
    options: dict[str, Any] = {name: rng.random() < 0.3 for name in names}
    backend, recompute = rng.choice(["triton", "triton-stepwise"]), rng.random() < 0.3
    what = f"cell {number}, {parts[1:]} {sizes} {options} {backend}, recompute={recompute}: {words}"
    try:
        problem = recurrents.draw(Cell(*parts), T, B, I, H, torch.float64, seed=number, **options)
        recurrents.assert_as_accurate_as_torch(problem.run(backend, recompute=recompute), problem)
    except Exception as error:
        return what, f"{type(error).__name__}: {error}"
    return what, None


def main(arguments: Sequence[str]) -> int:
    torch.set_num_threads(1)
    if arguments[0] == "again":
        what, wrong = once(int(arguments[1]))
        print(f"{what}\n    {wrong or 'nothing is wrong'}")
        return 1 if wrong else 0
    budget, seed = float(arguments[0]), int(arguments[1]) if len(arguments) > 1 else random.randrange(10**6)
    print(f"random cells in the interpreter, seed {seed}", flush=True)
    rng, end, drawn, failed = random.Random(seed), time.monotonic() + budget, 0, 0
    while time.monotonic() < end:
        what, wrong = once(rng.randrange(10**9))
        drawn += 1
        if wrong is not None:
            failed += 1
            print(f"{what} (seed {seed})\n    {wrong}", flush=True)
    print(f"{drawn} random cells in the interpreter (seed {seed}), {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
