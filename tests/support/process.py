"""Tests of compiled kernels, from a test process that interprets kernels: a process is either the one or the other."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_without_interpreter(script: str | Path, *args: str, timeout: float = 600) -> str:
    """Run a Python script without TRITON_INTERPRET, importing from where this process does; return what it prints.

    Where the system allows, its memory lies at the same addresses in every run: the compiler's order of instructions follows
    them, and with it whether a kernel that fills all registers spills one or two.

    Raises AssertionError with the script's output if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment["PYTHONHASHSEED"] = "0"
    command = [*_with_fixed_addresses(), sys.executable, str(script), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


@functools.cache
def _with_fixed_addresses() -> list[str]:
    command = ["setarch", "-R"]
    allowed = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


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
