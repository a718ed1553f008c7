"""Tests of compiled kernels, from a test process that interprets kernels: a process is either the one or the other."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_without_interpreter(script: str | Path, *args: str, timeout: float = 600) -> str:
    """Run a Python script without TRITON_INTERPRET, importing from where this process does; return what it prints.

    Raises AssertionError with the script's output if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(script), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def run_checks(namespace: Mapping[str, Any]) -> None:
    """For such a script: call every function named check_*, print what fails, and exit with an error if any does."""
    checks = {name: value for name, value in namespace.items() if name.startswith("check_")}
    failed = []
    for name, check in checks.items():
        try:
            check()
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed or not checks:
        sys.exit(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    print(f"{len(checks)} checks passed")
