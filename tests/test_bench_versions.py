"""The benchmark of the installed wheel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.benches import ROOT, TINY, rows_of


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds nothing but the wheel, built from a copy of the sources and without network."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    source, wheels, folder = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("lstm_triton", "kernels", "bench"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels, source)
    _pip("install", "--no-deps", "--target", folder, *wheels.iterdir())
    return folder


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PIP_NO_INDEX": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_installed_wheel_measures_and_reports(installed, tmp_path):
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([str(installed), *(p for p in sys.path if p and Path(p).resolve() != ROOT)])

    def bench(*arguments):
        command = [sys.executable, "-m", "lstm_triton.bench", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "hidden-sizes" in bench("--help")
    assert (installed / "lstm_triton" / "bench" / "real_workloads.csv").is_file()
    bench(*TINY, "--suite", "hidden-sizes", "--hidden", "8", "--mode", "forward")
    (folder,) = (tmp_path / "lstm-triton-bench").iterdir()
    found = rows_of(folder)
    assert found and all(row.source.commit is None for row in found)
    assert (folder / "report.html").is_file()
