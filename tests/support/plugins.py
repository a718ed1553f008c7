"""Plugins of pytest for a GPU that is there for minutes: what passed is not run again, and what is lost tells once."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


class Resume:
    """Leaves out the tests that the file names; at the end, also after Ctrl-C, adds those that passed or were skipped.

    Of pytest-xdist's processes one writes, and not before all have collected: they must find the same tests.
    """

    def __init__(self, file: Path, config: pytest.Config) -> None:
        self.file, self.writes = file, not _is_worker(config)
        self.before = set(file.read_text().splitlines()) if file.exists() else set()
        self.ended: set[str] = set()
        self.failed: set[str] = set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if passed := [item for item in items if item.nodeid in self.before]:
            config.hook.pytest_deselected(items=passed)
            items[:] = [item for item in items if item.nodeid not in self.before]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when == "teardown":
            self.ended.add(report.nodeid)

    @pytest.hookimpl(tryfirst=True)  # before pytest-xdist waits for its processes
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.writes:
            self.file.write_text("".join(f"{name}\n" for name in sorted(self.before | self.ended - self.failed)))
            if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
                session.exitstatus = pytest.ExitCode.OK


class EndWhenLost:
    """Ends a process that has lost its GPU, by an illegal access say: all that it ran from here on would fail, and hide why."""

    def __init__(self, why_lost: Callable[[], str | None]) -> None:
        self.why_lost = why_lost

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        result = yield
        if why := self.why_lost():
            told = f"{item.nodeid} lost the GPU: {why.splitlines()[0]}"
            if _is_worker(item.config):
                # pytest-xdist reports the test, and starts another process for those that follow.
                print(told, file=sys.stderr, flush=True)
                os._exit(1)
            item.session.shouldfail = told
        return result


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's processes."""
    return hasattr(config, "workerinput")
