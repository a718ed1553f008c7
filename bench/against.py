"""Two versions of this package on one machine, in turns: the code that is here, and another of its git history."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lstm_triton

from . import device, run
from .cases import Task
from .progress import Progress, missing
from .rows import read_all


def main(ref: str, options: run.Options, tasks: Sequence[Task]) -> int:
    """Measure both, print the comparison. Rows go to against-<commit>/ in the folder of `options`.

    Raises device.UsageError without a checkout, for an unknown commit, or where no task is timed.
    """
    timed = [task for task in tasks if task.kind == "timing"]
    if device.checkout() is None or not timed:
        raise device.UsageError("--against needs a git checkout of this project, and a suite that has times")
    commit = device.git("rev-parse", "--verify", f"{ref}^{{commit}}")
    kernels = ("lstm_triton triton",) if options.device != "cpu" else ()
    options = replace(options, provider=options.provider or ("lstm_triton auto", *kernels), again=True)
    folders = [options.output / f"against-{commit[:12]}" / side for side in ("there", "here")]
    with tempfile.TemporaryDirectory(prefix="lstm-triton-against-") as scratch, contextlib.ExitStack() as both:
        here = [p for p in sys.path if p and Path(p).resolve() != device.checkout()]
        there = replace(
            options, path=[_export(commit, Path(scratch)), *here], environment={device.COMMIT_VARIABLE: commit}
        )
        sides = [replace(side, output=folder) for side, folder in zip((there, options), folders)]
        runners = [both.enter_context(run.runner(side, Progress(2 * len(timed)))) for side in sides]
        for task in timed:  # in turns, so that a drift of the machine touches both alike
            for runner in runners:
                runner.run([task])
    print("\n".join(runner.describe() for runner in runners))
    if absent := missing("pandas", "jinja2"):
        print(absent)
        return 0
    from . import tables

    found, said = tables.side_by_side(*(read_all([folder])[0] for folder in folders))
    print(f"A: {ref} ({commit[:12]})\nB: the code here\nA / B above 1: B is faster\n\n{tables.plain(found)}\n\n{said}")
    return 0


def _export(commit: str, scratch: Path) -> str:
    """A folder to import that commit's package from, with the benchmark of here: one code measures both."""
    package = scratch / "path" / "lstm_triton"
    device.git("archive", f"--output={scratch / 'tree.zip'}", commit, "lstm_triton", "kernels")
    shutil.unpack_archive(scratch / "tree.zip", scratch / "tree")
    shutil.copytree(scratch / "tree" / "lstm_triton", package)
    shutil.copytree(scratch / "tree" / "kernels", package / "kernels")
    for name in device.TOOLS:
        shutil.copy(Path(lstm_triton.__file__).parent / name, package)
    shutil.copytree(Path(__file__).parent, package / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
    return str(package.parent)
