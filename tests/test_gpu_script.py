"""`make gpu`'s steps, with stand-ins for what needs a GPU: their order, that each reports whatever the others found, and that a
second call goes on after the first; and the preflight."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import preflight
import pytest

from lstm_triton.kernels import interpreter

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "gpu"

# Notes its arguments, writes to the page that the real command would write, and fails where it is told to.
STAND_IN = """#!/bin/sh
echo "{name} $*" >> {log}
case "$*" in *--readme*) echo row >> "${{4}}";; esac
case "$*" in *"$FAILING"*) [ -z "$FAILING" ] || exit 1;; esac
"""


class Project:
    """The script in a folder of its own, which is no repository."""

    def __init__(self, folder: Path):
        self.root, self.log, programs = folder / "project", folder / "log", folder / "programs"
        for name in (".ci", "bench", "docs", "kernels", "lstm_triton", "tests"):
            (self.root / name).mkdir(parents=True)
        self.script = Path(shutil.copy(SCRIPT, self.root / ".ci"))
        self.source = self.root / "kernels" / "cell.py"
        self.source.write_text("a kernel\n")
        programs.mkdir()
        self.make = programs / "make"
        for name in ("make", "python", "compute-sanitizer"):
            program = programs / name
            program.write_text(STAND_IN.format(name=name, log=self.log))
            program.chmod(0o755)
        self.environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def run(self, failing: str = "") -> tuple[int, list[str]]:
        """Its status, and the commands it ran."""
        self.log.write_text("")
        environ = {**self.environ, "FAILING": failing}
        done = subprocess.run([self.script, "python", "100"], env=environ, timeout=60, check=False)
        return done.returncode, [line.split(" -")[0] for line in self.log.read_text().splitlines()]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


PREFLIGHT, TESTS, SANITIZER = "python tests/preflight.py", "make", "python tests/sanitize.py"
REPORTS = ["python", "python", "python"]  # the benchmark, README, results
ALL = [PREFLIGHT, TESTS, *REPORTS, SANITIZER]
STEPS = {  # by what fails: what runs, in order, and what runs the next time
    "": (ALL, [PREFLIGHT, *REPORTS]),
    "preflight": ([PREFLIGHT], ALL),  # everything needs it
    "-m 'gpu": (ALL, [PREFLIGHT, TESTS, *REPORTS]),
    "sanitize": (ALL, [PREFLIGHT, *REPORTS, SANITIZER]),
    "--budget": (ALL, [PREFLIGHT, *REPORTS]),
    "--readme README.md": (ALL, [PREFLIGHT, *REPORTS]),
}


@pytest.mark.parametrize("failing", STEPS)
def test_what_fails_does_not_stop_the_others_and_runs_again(failing, project):
    """What has passed does not, though the script itself writes to the pages."""
    first, again = STEPS[failing]
    assert project.run(failing) == (bool(failing), first)
    written = [(project.root / page) for page in ("README.md", "docs/results.md")]
    assert failing == "preflight" or [page.read_text() for page in written] == ["row\n", "row\n"]
    assert project.run() == (0, again)


def test_what_has_passed_is_kept_for_the_same_sources(project):
    """pytest keeps the names of its tests where the script tells it to."""

    def kept() -> str:
        return re.search(r"^make .* --resume (\S+)", project.log.read_text(), re.M)[1]

    assert project.run("-m 'gpu")[0] == 1
    first = kept()
    assert (project.root / first).parent.is_dir()
    assert project.run()[0] == 0 and kept() == first
    project.source.write_text("another kernel\n")
    assert project.run() == (0, ALL) and kept() != first


def test_nothing_is_left_running_at_the_limit(project, tmp_path):
    """make dies at the interrupt, what it started does not."""
    project.script.write_text(re.sub(r"TESTS_S=\d+", "TESTS_S=1", project.script.read_text()))
    left = tmp_path / "left"
    project.make.write_text(f"#!/bin/sh\nsleep 120 & echo $! > {left}\nwait\n")
    began = time.monotonic()
    assert project.run() == (1, [c for c in ALL if c != TESTS]) and time.monotonic() - began < 30
    state = Path(f"/proc/{left.read_text().strip()}/stat")
    for _ in range(50):  # killed, it may not be gone at once
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")
def test_the_preflights_launch():
    preflight.launch("cpu")


def test_the_preflight_names_what_is_missing_and_how_the_launch_failed(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "version", lambda name: None if name in ("pytest", "pytest-xdist") else "1.0")
        patch.setattr(preflight.shutil, "which", lambda name: None)
        patch.setattr(preflight.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
        patch.delenv("CC", raising=False)
        assert preflight.main() == 1
    said = capsys.readouterr()
    assert "torch 1.0" in said.out and "pytest-xdist None" in said.out
    for what in ("the Python package pytest", "C compiler.*none of gcc, clang", "/nowhere/Python.h"):
        assert len([line for line in said.err.splitlines() if re.search(what, line)]) == 1, what
    assert "pytest-xdist" not in said.err, "its tests are skipped"
    monkeypatch.setattr(preflight, "missing", list)
    monkeypatch.setattr(preflight, "gpu", lambda: {}["no GPU"])
    assert preflight.main() == 1 and "a first launch failed: KeyError: 'no GPU'" in capsys.readouterr().err
