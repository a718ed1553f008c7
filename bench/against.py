"""Two versions of this package on one machine, in turns: the code that is here, and another of its git history."""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import device, run
from .cases import Task
from .progress import Progress, missing
from .rows import read_all


def main(ref: str, options: run.Options, tasks: Sequence[Task]) -> int:
    """Measure both, print the comparison. Rows go to against-<commit>/ in the folder of `options`.

    Raises device.UsageError without a checkout, for an unknown commit, or where no task is timed.
    """
    root, timed = device.checkout(), [task for task in tasks if task.kind == "timing"]
    if root is None or not timed:
        raise device.UsageError("--against needs a git checkout of this project, and a suite that has times")
    commit = _git(root, "rev-parse", "--verify", f"{ref}^{{commit}}")
    kernels = ("lstm_triton triton",) if options.device != "cpu" else ()
    options = dataclasses.replace(options, names=options.names or ("lstm_triton auto", *kernels), again=True)
    folder = options.folder / f"against-{commit[:12]}"
    with tempfile.TemporaryDirectory(prefix="lstm-triton-against-") as scratch:
        path = [str(_export(root, commit, Path(scratch))), *(p for p in sys.path if p and Path(p).resolve() != root)]
        there = dataclasses.replace(options, path=path, environment={device.COMMIT_VARIABLE: commit})
        sides = [dataclasses.replace(o, folder=folder / name) for name, o in (("there", there), ("here", options))]
        outcomes = run.run_in_turns(sides, timed, Progress(2 * len(timed)))
    print("\n".join(outcome.describe(side.folder, side.budget_s) for outcome, side in zip(outcomes, sides)))
    if absent := missing("pandas", "jinja2"):
        print(absent)
        return 0
    from . import tables

    found, said = tables.side_by_side(*(read_all([side.folder])[0] for side in sides))
    print(f"A: {ref} ({commit[:12]})\nB: the code here\nA / B above 1: B is faster\n\n{tables.plain(found)}\n\n{said}")
    return 0


def _export(root: Path, commit: str, scratch: Path) -> Path:
    """A folder to import that commit's package from, with the benchmark of here: one code measures both."""
    tree, package = scratch / "tree", scratch / "path" / "lstm_triton"
    ignore = shutil.ignore_patterns("__pycache__", "kernels", "bench", "results")
    try:
        _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
        shutil.copytree(tree / "lstm_triton", package, ignore=ignore)
        shutil.copytree(tree / "kernels", package / "kernels", ignore=ignore)
        shutil.copytree(Path(__file__).resolve().parent, package / "bench", ignore=ignore)
    finally:
        subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(tree)], capture_output=True)
    return package.parent


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise device.UsageError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
