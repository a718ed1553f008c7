"""`make gpu`'s steps, with stand-ins for what needs a GPU: their order, and that a second call goes on after the first."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "gpu"


@pytest.fixture
def run(tmp_path):
    """run(failing=...): the script in a small repository; returns its status and the commands it ran."""
    project, programs, log = tmp_path / "project", tmp_path / "programs", tmp_path / "log"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(SCRIPT, project / ".ci" / "gpu")
    (project / ".gitignore").write_text(".ci-cache\n")
    programs.mkdir()
    for name in ("make", "python", "compute-sanitizer"):
        program = programs / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {log}\ncase "$*" in *"$FAILING"*) [ -z "$FAILING" ] || exit 1;; esac\n'
        )
        program.chmod(0o755)
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "GIT_CONFIG_GLOBAL": os.devnull}
    git = ["git", "-C", str(project), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True, env=environ)

    def call(failing: str = "") -> tuple[int, list[str]]:
        log.write_text("")
        done = subprocess.run(
            [project / ".ci" / "gpu", "python", "100"], env={**environ, "FAILING": failing}, timeout=60, check=False
        )
        return done.returncode, [line.split(" -")[0] for line in log.read_text().splitlines()]

    return call


TABLES = ["python", "python", "python docs/quote.py"]  # README, results, quoted outputs


def test_all_steps_in_order_and_once_for_a_commit(run):
    assert run() == (0, ["make", "python tests/sanitize.py", "python", *TABLES])
    assert run() == (0, ["python", *TABLES])


def test_it_goes_on_where_it_failed(run):
    status, commands = run(failing="sanitize")
    assert status == 1 and commands == ["make", "python tests/sanitize.py"]
    assert run() == (0, ["python tests/sanitize.py", "python", *TABLES])
