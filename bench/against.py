"""Two versions of this package on one machine, in turns: the code that is here, and another of its git history."""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import compare, run, store
from . import device as devices
from .cases import Task
from .cli import UsageError
from .progress import Progress


def main(ref: str, options: run.Options, tasks: Sequence[Task]) -> int:
    """Measure both, print the comparison. Rows go to against-<commit>/ in the folder of `options`."""
    root = devices.checkout()
    if root is None:
        raise UsageError("--against needs a git checkout of this project")
    commit = _resolve(root, ref)
    names = options.names or ("lstm_triton auto", *(("lstm_triton triton",) if options.device != "cpu" else ()))
    folder = options.folder / f"against-{commit[:12]}"
    with tempfile.TemporaryDirectory(prefix="lstm-triton-against-") as scratch:
        other = export(root, commit, Path(scratch))
        sides = {
            "here": dataclasses.replace(options, folder=folder / "here", names=names, again=True),
            "there": dataclasses.replace(
                options, folder=folder / "there", names=names, again=True,
                path=[str(other), *(p for p in sys.path if p and Path(p).resolve() != root)],
                environment={devices.COMMIT_VARIABLE: commit},
            ),
        }  # fmt: skip
        timed = [task for task in tasks if task.kind == "timing"]
        if not timed:
            raise UsageError("--against compares times: choose a suite that has some")
        progress = Progress(2 * len(timed), None)
        outcomes = run.run_in_turns(list(sides.values()), timed, progress)
    print("\n".join(run.finish(o, s.folder, s.budget_s) for o, s in zip(outcomes, sides.values())))
    there, here = (store.read_all([folder / side]).rows for side in ("there", "here"))
    print(compare.text(compare.compare(there, here), f"{ref} ({commit[:12]})", "the code here"))
    return 0


def _resolve(root: Path, ref: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise UsageError(f"--against {ref}: git knows no such commit")
    return done.stdout.strip()


def export(root: Path, commit: str, scratch: Path) -> Path:
    """A folder to import that commit's package from, with the benchmark of here: one code measures both."""
    tree = scratch / "tree"
    try:
        _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
        package = scratch / "path" / "lstm_triton"
        ignore = shutil.ignore_patterns("__pycache__", "kernels", "bench", "results")
        shutil.copytree(tree / "lstm_triton", package, ignore=ignore)
        shutil.copytree(tree / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(Path(__file__).resolve().parent, package / "bench", ignore=ignore)
    finally:
        subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(tree)], capture_output=True)
    return package.parent


def _git(root: Path, *arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise UsageError(f"git {arguments[0]}: {done.stderr.strip()}")
