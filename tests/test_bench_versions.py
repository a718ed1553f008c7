"""The benchmark of the installed wheel."""

import os
import subprocess
import sys
from pathlib import Path

from support.benches import ROOT, TINY, rows_of
from test_wheel import _pip, wheel  # noqa: F401


def test_the_installed_wheel_measures_and_reports(wheel, tmp_path):  # noqa: F811
    installed = tmp_path / "installed"
    _pip("install", "--no-deps", "--target", installed, wheel)
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([str(installed), *(p for p in sys.path if p and Path(p).resolve() != ROOT)])
    command = [sys.executable, "-m", "lstm_triton.bench", *TINY, "--suite", "hidden-sizes", "--hidden", "8"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "lstm-triton-bench").iterdir()
    found = rows_of(folder)
    assert found and all(row.source.commit is None for row in found)
    assert (folder / "report.html").is_file()
