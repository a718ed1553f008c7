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
        self.script = self.root / ".ci" / "gpu"
        shutil.copy(SCRIPT, self.script)
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


PREFLIGHT = "python tests/preflight.py"
REPORTS = ["python", "python", "python"]  # the benchmark, README, results
ALL = [PREFLIGHT, "make", *REPORTS, "python tests/sanitize.py"]


def test_all_steps_in_order_and_once_for_the_same_sources(project):
    """Though the script itself writes to the pages."""
    assert project.run() == (0, ALL)
    assert (project.root / "README.md").read_text() == (project.root / "docs" / "results.md").read_text() == "row\n"
    assert project.run() == (0, [PREFLIGHT, *REPORTS])
    project.source.write_text("another kernel\n")
    assert project.run() == (0, ALL)


def test_tests_go_on_after_those_that_passed_for_these_sources(project):
    """pytest keeps their names where the script tells it to."""

    def file() -> str:
        project.run("-m 'gpu")
        return re.search(r"^make .* --resume (\S+)", project.log.read_text(), re.M)[1]

    first = file()
    assert (project.root / first).parent.is_dir() and file() == first
    project.source.write_text("another kernel\n")
    assert file() != first


@pytest.mark.parametrize("failing", ["-m 'gpu", "sanitize", "--budget", "--readme README.md"])
def test_what_fails_does_not_stop_the_others_and_runs_again(failing, project):
    assert project.run(failing) == (1, ALL)
    again = {"-m 'gpu": [PREFLIGHT, "make", *REPORTS], "sanitize": [PREFLIGHT, *REPORTS, "python tests/sanitize.py"]}
    assert project.run() == (0, again.get(failing, [PREFLIGHT, *REPORTS]))


def test_without_what_everything_needs_nothing_is_tried(project):
    assert project.run("preflight") == (1, [PREFLIGHT])


def test_nothing_is_left_running_at_the_limit(project, tmp_path):
    """make dies at the interrupt, what it started does not."""
    project.script.write_text(re.sub(r"TESTS_S=\d+", "TESTS_S=1", project.script.read_text()))
    left = tmp_path / "left"
    project.make.write_text(f"#!/bin/sh\nsleep 120 & echo $! > {left}\nwait\n")
    began = time.monotonic()
    status, commands = project.run()
    assert status == 1 and commands == [c for c in ALL if c != "make"] and time.monotonic() - began < 30
    state = Path(f"/proc/{left.read_text().strip()}/stat")
    for _ in range(50):  # killed, it may not be gone at once
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="needs a process with TRITON_INTERPRET=1")
def test_the_preflights_launch():
    preflight.launch("cpu")


def test_the_preflight_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "version", lambda name: None if name in ("pytest", "pytest-xdist") else "1.0")
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    monkeypatch.setattr(preflight.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    monkeypatch.delenv("CC", raising=False)
    assert preflight.main() == 1
    said = capsys.readouterr()
    assert "torch 1.0" in said.out and "pytest-xdist None" in said.out
    for what in ("the Python package pytest", "C compiler.*none of gcc, clang", "/nowhere/Python.h"):
        assert len([line for line in said.err.splitlines() if re.search(what, line)]) == 1, what
    assert "pytest-xdist" not in said.err, "its tests are skipped"


def test_the_preflight_says_how_the_launch_failed(monkeypatch, capsys):
    def fail():
        raise RuntimeError("no GPU")

    monkeypatch.setattr(preflight, "missing", list)
    monkeypatch.setattr(preflight, "gpu", fail)
    assert preflight.main() == 1 and "a first launch failed: RuntimeError: no GPU" in capsys.readouterr().err
