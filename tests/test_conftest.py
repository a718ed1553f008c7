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


def test_what_uses_the_device_is_marked(request, device):
    assert request.node.get_closest_marker("gpu")


def test_what_does_not_is_not(request):
    assert not request.node.get_closest_marker("gpu")


class _Item:
    """Stands for a test with some marks."""

    def __init__(self, *marks):
        self.marks = marks

    def get_closest_marker(self, name):
        return name in self.marks or None


@pytest.mark.parametrize(
    "on_gpu, compiler, executing, kept",
    [
        (False, True, False, "interpreted"),
        (False, True, True, "compiled"),
        (False, False, False, "both"),
        (False, False, True, "none"),
        (True, True, False, "both"),
        (True, True, True, "none"),
    ],
)
def test_each_test_belongs_to_the_interpreter_or_to_the_executor(on_gpu, compiler, executing, kept, monkeypatch):
    """make test runs two processes, the second with a target. Where one engine serves all, the first one runs both."""
    monkeypatch.setattr(conftest, "ON_GPU", on_gpu)
    monkeypatch.setattr(conftest, "EXECUTING", executing)
    monkeypatch.setattr(conftest, "TARGET", "sm_90" if executing else None)
    monkeypatch.setattr(executor, "why_not", lambda: None if compiler else "no C compiler")
    items = interpreted, compiled = _Item(), _Item("compiled")
    found, deselected = list(items), []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    conftest.pytest_collection_modifyitems(types.SimpleNamespace(hook=hook), found)
    assert found == {"interpreted": [interpreted], "compiled": [compiled], "both": list(items), "none": []}[kept]
    assert set(found) | set(deselected) == set(items)


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


@pytest.fixture
def run_suite(tmp_path):
    """Runs a suite of four tests, of which one has a mishap: its exit status, how many of what, all it says, what it need not
    run again."""
    (tmp_path / "conftest.py").write_text(PLUGINS)
    (tmp_path / "test_some.py").write_text(TESTS)

    def run(mishap: str, *arguments: str) -> tuple[int, dict[str, int], str, list[str]]:
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "MISHAP": mishap}
        environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins take a second to import
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
        counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
        passed = [line.rpartition("::test_")[2] for line in (tmp_path / "passed").read_text().splitlines()]
        return done.returncode, counts, done.stdout + done.stderr, passed

    return run


def test_what_passed_is_not_run_again(run_suite):
    assert run_suite("fail")[:2] == (1, {"failed": 1, "passed": 2, "skipped": 1})
    assert run_suite("")[:2] == (0, {"passed": 1, "deselected": 3})
    assert run_suite("")[:2] == (0, {"deselected": 4}), "no test is left, and none failed"


def test_what_passed_before_an_interrupt_is_not_run_again(run_suite):
    status, _, _, passed = run_suite("interrupt")
    assert status == pytest.ExitCode.INTERRUPTED and passed == ["before", "skipped"]


def test_a_lost_gpu_ends_the_run(run_suite):
    status, counts, told, passed = run_suite("lost")
    assert status == 1 and counts == {"failed": 1, "passed": 1, "skipped": 1} and passed == ["before", "skipped"]
    assert "test_some.py::test_between lost the GPU: misaligned address" in told


def test_a_lost_gpu_ends_one_process_of_several(run_suite):
    pytest.importorskip("xdist")
    status, counts, told, passed = run_suite("lost", "-p", "xdist", "-n", "1")
    assert status == 1 and counts["passed"] == 2 and passed == ["after", "before", "skipped"]
    assert "test_some.py::test_between lost the GPU: misaligned address" in told and "replacing crashed worker" in told
