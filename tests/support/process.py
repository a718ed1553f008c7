"""Tests of compiled kernels, from a test process that interprets kernels: a process is either the one or the other."""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch


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


def run_script(script: str | Path, *args: str, cwd: Path, timeout: float = 300) -> str:
    """What a Python script prints that is run as if by `python script *args` in the folder `cwd`.

    It runs in a fork of this process, which has imported torch and this package already; where CUDA is in use, which no fork
    survives, in a process of its own.

    Raises AssertionError with the script's output if it fails.
    """
    command = [str(script), *args]
    if torch.cuda.is_initialized():
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
        printed, errors, failed = done.stdout, done.stderr, done.returncode
    else:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = multiprocessing.get_context("fork").Process(target=_as_main, args=(command, cwd, out, err))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads; they are idle
                child.start()
            child.join(timeout)
            failed = child.exitcode != 0
            child.kill()
            printed, errors = (file.seek(0) or file.read() for file in (out, err))
    if failed:
        raise AssertionError(f"{' '.join(command)} failed:\n{printed}\n{errors}")
    return printed


def _as_main(command: list[str], cwd: Path, out: TextIO, err: TextIO) -> None:
    for file, descriptor in ((out, 1), (err, 2)):
        os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # pytest has put others there
    for name, module in list(sys.modules.items()):
        if name.startswith("lstm_triton.kernels.") and hasattr(module, "torch"):
            module.torch = torch  # not the one with which conftest.py fills new memory
    os.chdir(cwd)
    sys.argv, script = command, Path(command[0]).resolve()
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.stdout.flush()


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
