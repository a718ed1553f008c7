"""How the suite itself runs."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import conftest
import pytest
from support import executor


@pytest.mark.parametrize("on_gpu, cores, workers", [(False, 16, None), (True, 16, 16), (True, 2, 4)])
def test_a_gpu_is_shared_by_as_many_workers_as_cores(on_gpu, cores, workers, monkeypatch, pytestconfig):
    monkeypatch.setattr(conftest.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(conftest, "ON_GPU", on_gpu)
    assert conftest.pytest_xdist_auto_num_workers(pytestconfig) == workers


class _Item:
    """Stands for a test with a fixture and some marks, in a file that spells `pytest.mark.compiled` out."""

    path = Path(__file__)

    def __init__(self, fixture, *marks):
        self.fixturenames, self.marks = [fixture], {*marks}

    def get_closest_marker(self, name):
        return name if name in self.marks else None

    def add_marker(self, mark):
        self.marks.add(mark.name)


@pytest.mark.parametrize(
    "on_gpu, compiler, executing, kept",
    [
        (False, True, False, "interpreted"),
        (False, True, True, "compiled"),
        (False, False, False, "interpreted compiled"),
        (False, False, True, ""),
        (True, True, False, "interpreted compiled"),
        (True, True, True, ""),
    ],
)
def test_each_test_belongs_to_the_interpreter_or_to_the_executor(on_gpu, compiler, executing, kept, monkeypatch):
    """make test runs two processes, the second with a target. Where one engine serves all, the first one runs both. What uses
    the device is marked so."""
    monkeypatch.setattr(conftest, "ON_GPU", on_gpu)
    monkeypatch.setattr(conftest, "EXECUTING", executing)
    monkeypatch.setattr(conftest, "TARGET", "sm_90" if executing else None)
    monkeypatch.setattr(executor, "why_not", lambda: None if compiler else "no C compiler")
    items = {"interpreted": _Item("tmp_path"), "compiled": _Item("device", "compiled")}
    found, deselected = list(items.values()), []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    conftest.pytest_collection_modifyitems(types.SimpleNamespace(hook=hook), found)
    assert found == [items[name] for name in kept.split()]
    assert set(found) | set(deselected) == set(items.values())
    assert [item.marks for item in items.values()] == [set(), {"compiled", "gpu"}]


def test_a_file_that_the_executor_would_not_read_is_an_error(monkeypatch):
    """Its compiled tests would run nowhere."""
    for name, value in dict(ON_GPU=False, EXECUTING=False, TARGET=None).items():
        monkeypatch.setattr(conftest, name, value)
    monkeypatch.setattr(executor, "why_not", lambda: None)
    item = _Item("device", "compiled")
    item.path = Path(executor.__file__)
    with pytest.raises(pytest.UsageError, match="would run nowhere"):
        conftest.pytest_collection_modifyitems(None, [item])


# Stands for conftest.py and a GPU that a test can lose.
PLUGINS = """
from pathlib import Path
from support.plugins import EndWhenLost, Resume
lost = []

def pytest_configure(config):
    config.pluginmanager.register(Resume(Path("passed"), config))
    config.pluginmanager.register(EndWhenLost(lambda: lost[0] if lost else None))
"""

TESTS = """
import os, conftest, pytest

def test_before(): pass
def test_skipped(): pytest.skip("no")
def test_between():
    if mishap := os.environ["MISHAP"]:
        if mishap == "interrupt": raise KeyboardInterrupt
        if mishap == "lost": conftest.lost.append("misaligned address")
        assert not mishap
def test_after(): assert not conftest.lost
"""


def test_a_suite_goes_on_where_it_ended_and_ends_where_a_gpu_is_lost(tmp_path):
    """Five runs, one after the other, of a suite of four tests, one of which has a mishap."""
    (tmp_path / "conftest.py").write_text(PLUGINS)
    (tmp_path / "test_some.py").write_text(TESTS)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins take a second to import
    for mishap, arguments, status, counts, passed in (
        ("interrupt", [], pytest.ExitCode.INTERRUPTED, {"passed": 1, "skipped": 1}, "before skipped"),
        ("lost", [], 1, {"failed": 1, "deselected": 2}, "before skipped"),
        ("", [], 0, {"passed": 2, "deselected": 2}, "after before between skipped"),
        ("", [], 0, {"deselected": 4}, "after before between skipped"),
        ("lost", ["-p", "xdist", "-n", "1"], 1, {"passed": 2, "skipped": 1}, "after before skipped"),
    ):
        if arguments:
            pytest.importorskip("xdist")
            (tmp_path / "passed").unlink()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        environ["MISHAP"] = mishap
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
        found = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
        told = done.stdout + done.stderr
        assert done.returncode == status and counts.items() <= found.items(), told
        saved = [line.rpartition("::test_")[2] for line in (tmp_path / "passed").read_text().splitlines()]
        assert saved == passed.split()
        assert ("test_some.py::test_between lost the GPU: misaligned address" in told) == (mishap == "lost")
