"""The wheel: what is in it, what it requires, and that the package works where only these are installed."""

import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lstm_triton
from lstm_triton import measurements
from lstm_triton.bench import rows
from lstm_triton.bench.__main__ import NO_LIBRARY

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
FOLDERS = {"lstm_triton": "lstm_triton", "kernels": "lstm_triton/kernels", "bench": "lstm_triton/bench"}

# The command line imports no benchmark before it is asked for; records need no library that serves output.
SCRIPT = """
import importlib, importlib.util, pathlib, pkgutil, sys
import torch, lstm_triton.cli
assert "lstm_triton.bench" not in sys.modules
assert pathlib.Path(lstm_triton.__file__).is_relative_to(pathlib.Path("installed").resolve()), lstm_triton.__file__
for other in ("kernels", "bench", "pytest"):
    assert importlib.util.find_spec(other) is None, other
import lstm_triton.kernels, lstm_triton.bench
for module in pkgutil.iter_modules(lstm_triton.kernels.__path__):
    importlib.import_module("lstm_triton.kernels." + module.name)
cell = lstm_triton.LSTMCell(3, 5, backend="triton")
found = cell(torch.ones(2, 3))
torch.testing.assert_close(found, torch.nn.LSTMCell.forward(cell, torch.ones(2, 3)))
found[0].sum().backward()
from importlib.metadata import entry_points, version
assert version("lstm-triton") == lstm_triton.__version__
(command_line,) = entry_points(group="console_scripts", name="lstm-triton")
main = command_line.load()
main(["info"])
measured = "--device cpu --scale tiny --seconds 0.001 --threads 1 --suite memory --mode train".split()
for command in (measured, ["--validate", "lstm-triton-bench"], ["--report"], ["--compare", *["lstm-triton-bench"] * 2]):
    print("exit code", main(["bench", *command]))
"""


def test_the_wheel(tmp_path):
    wheel = _build(tmp_path / "source")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    expected = {"lstm_triton/py.typed", f"lstm_triton/{measurements.SHIPPED.name}"}
    for folder, installed in FOLDERS.items():
        expected |= {f"{installed}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
    expected |= {f"lstm_triton/bench/{path.name}" for path in (ROOT / "bench").iterdir() if path.is_file()}
    assert sorted(name for name in names if ".dist-info" not in name) == sorted(expected)
    assert any(name.endswith("licenses/LICENSE") for name in names)

    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    requirements = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    assert sorted(_without_extras(requirements)) == ["torch", "triton"]

    install = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--target", "installed"]
    _run(*install, str(wheel), folder=tmp_path)
    _link_distributions(["torch", "triton", "numpy"], tmp_path / "libraries")  # the interpreter needs numpy
    printed, errors = _run("-S", "-c", SCRIPT, folder=tmp_path, path=("installed", "libraries"))
    codes = [line for line in printed.splitlines() if line.startswith("exit code")]
    assert codes == [f"exit code {code}" for code in (0, 0, NO_LIBRARY, NO_LIBRARY)]
    assert "no tables without pandas" in printed and "no report without jinja2" in errors
    (folder,) = (tmp_path / "lstm-triton-bench").iterdir()
    found, problems = rows.read_all([folder])
    assert {row.suite for row in found} == {"memory", "anchor"} and not problems
    assert {row.status for row in found} <= {"ok", "skipped"} and not (folder / "report.html").exists()
    assert all(row.source.commit is None for row in found), "no checkout"
    assert f"lstm_triton  {lstm_triton.__version__}" in printed


def _build(folder: Path) -> Path:
    """Build the wheel without network, from a copy of the sources, so that nothing is left behind in them."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "lstm_triton" / measurements.SHIPPED.name).write_text("[]")  # as if there were shipped measurements
    _run("-c", "import setuptools.build_meta as backend; backend.build_wheel('built')", folder=folder)
    (built,) = folder.glob("built/lstm_triton-*-py3-none-any.whl")
    return built


def _link_distributions(names: list[str], folder: Path) -> None:
    """Links in `folder` to what these distributions and all that they require have installed, with their metadata."""
    seen = {"jinja2"}  # torch requires it for a part that the package does not use
    folder.mkdir()
    while names:
        name = canonicalize_name(names.pop())
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        names += _without_extras(distribution.requires or ())
        if distribution.files is None:
            pytest.skip(f"{name} does not say what it has installed")
        for part in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(distribution.locate_file(part))


def _without_extras(requirements: Iterable[str]) -> list[str]:
    """The names of those that an installation without extras has."""
    found = map(Requirement, requirements)
    return [r.name for r in found if not r.marker or r.marker.evaluate({"extra": "", "platform_system": "Linux"})]


def _run(*arguments: str, folder: Path, path: Iterable[str] = ()) -> tuple[str, str]:
    """What Python prints in a folder, and its errors. No PYTHONPATH names the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(str(folder / name) for name in path)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr
