"""The wheel: what is in it, and that the package works where only the wheel is installed."""

import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, so that nothing is left behind in them, and without network."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    assert setuptools
    source = tmp_path_factory.mktemp("source")
    for name in ("lstm_triton", "kernels", "bench"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "lstm_triton" / measurements.SHIPPED.name).write_text("[]")  # as if there were shipped measurements
    target = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", target, source)
    (built,) = target.glob("lstm_triton-*-py3-none-any.whl")
    return built


def _pip(*args):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args)]
    done = subprocess.run(command, env=_environment(PIP_NO_INDEX="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _environment(**variables: str) -> dict[str, str]:
    """This process's, without PYTHONPATH, by which pip would find a package that lies in a checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables


def _modules(folder):
    """The paths of the .py files below a folder of the sources, not through links."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(path) / name).is_symlink() and name != "__pycache__"]
        found += [(Path(path) / name).relative_to(folder).as_posix() for name in files if name.endswith(".py")]
    return found


def test_every_module_is_in_the_wheel_once_and_in_its_place(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert f"lstm_triton/{measurements.SHIPPED.name}" in names
    code = [name for name in names if name.endswith(".py")]
    expected = [f"lstm_triton/{name}" for name in _modules(ROOT / "lstm_triton")]
    expected += [f"lstm_triton/kernels/{name}" for name in _modules(ROOT / "kernels")]
    expected += [f"lstm_triton/bench/{name}" for name in _modules(ROOT / "bench")]
    assert sorted(code) == sorted(expected)
    data = {path.name for path in (ROOT / "bench").iterdir() if path.is_file() and path.suffix != ".py"}
    assert {Path(name).name for name in names if name.startswith("lstm_triton/bench/") and name not in code} == data
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lstm_triton"}, (
        "one top-level package"
    )
    assert "lstm_triton/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_requires_torch_and_triton_and_nothing_else(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    required = [requirement for line in lines if (requirement := Requirement(line)) and _applies(requirement)]
    assert sorted(requirement.name for requirement in required) == ["torch", "triton"]


def _applies(requirement: Requirement) -> bool:
    """To an installation without extras."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": "", "platform_system": "Linux"})


def _link_distributions(names: list[str], folder: Path) -> None:
    """Links in `folder` to what these distributions and all that they require have installed, with their metadata."""
    seen = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        requirements = map(Requirement, distribution.requires or ())
        names += [requirement.name for requirement in requirements if _applies(requirement)]
        if distribution.files is None:
            pytest.skip(f"{name} does not say what it has installed")
        for part in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = folder / part
            if not link.exists():
                link.symlink_to(distribution.locate_file(part))


@pytest.fixture
def installed(wheel, tmp_path):
    """The Python of a new environment: the wheel, torch, Triton and what they require; numpy, which the interpreter needs. No
    library that serves output alone can be imported there."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    _link_distributions(["torch", "triton", "numpy"], libraries)
    (site_packages / "libraries.pth").write_text(f"{libraries}\n")
    _pip("--python", python, "install", wheel)  # without an index: what the wheel requires must be there
    (site_packages / "sitecustomize.py").write_text(  # torch requires these two
        "import sys\nsys.modules |= dict.fromkeys(('jinja2', 'markupsafe'))\n"
    )
    return python


def test_the_installed_wheel_works(installed, tmp_path):
    """The command line imports no benchmark before it is asked for; rows need no library that serves output."""
    script = """
import importlib, importlib.util, pathlib, pkgutil, sys
import torch, lstm_triton.cli
assert "lstm_triton.bench" not in sys.modules
assert pathlib.Path(lstm_triton.__file__).is_relative_to(sys.prefix), lstm_triton.__file__
for other in ("kernels", "bench", "pytest"):
    assert importlib.util.find_spec(other) is None, other
import lstm_triton.kernels, lstm_triton.bench
for module in pkgutil.iter_modules(lstm_triton.kernels.__path__):
    importlib.import_module("lstm_triton.kernels." + module.name)
cell = lstm_triton.LSTMCell(3, 5, backend="triton")
found = cell(torch.ones(2, 3))
torch.testing.assert_close(found, torch.nn.LSTMCell.forward(cell, torch.ones(2, 3)))
found[0].sum().backward()
from importlib.metadata import version
assert version("lstm-triton") == lstm_triton.__version__
measured = "--device cpu --scale tiny --seconds 0.001 --threads 1 --suite memory --suite length --mode train".split()
for command in (measured, ["--validate", "lstm-triton-bench"], ["--report"], ["--compare", *["lstm-triton-bench"] * 2]):
    print("exit code", lstm_triton.cli.main(["bench", *command]))
"""
    environment = _environment(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    for command in ([installed, "-c", script], [installed.with_name("lstm-triton"), "info"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if command[0] == installed:
            measured = done
    codes = [line for line in measured.stdout.splitlines() if line.startswith("exit code")]
    assert codes == [f"exit code {code}" for code in (0, 0, NO_LIBRARY, NO_LIBRARY)]
    assert "no tables without pandas" in measured.stdout and "no report without jinja2" in measured.stderr
    (folder,) = (tmp_path / "lstm-triton-bench").iterdir()
    found, problems = rows.read_all([folder])
    assert {row.suite for row in found} == {"memory", "length", "anchor"} and not problems
    assert {row.status for row in found} <= {"ok", "skipped"} and not (folder / "report.html").exists()
    assert all(row.source.commit is None for row in found), "no checkout"
    assert f"lstm_triton  {lstm_triton.__version__}" in done.stdout
