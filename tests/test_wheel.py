"""The wheel: what is in it, and that the package works where only the wheel is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    target = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", target, source)
    (built,) = target.glob("lstm_triton-*-py3-none-any.whl")
    return built


def _pip(*args):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args)]
    done = subprocess.run(command, env={**os.environ, "PIP_NO_INDEX": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _modules(folder):
    """The paths of the .py files below a folder of the sources, not through links."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(path) / name).is_symlink() and name != "__pycache__"]
        found += [(Path(path) / name).relative_to(folder).as_posix() for name in files if name.endswith(".py")]
    return found


def test_every_module_is_in_the_wheel_once_and_in_its_place(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    code = [name for name in names if name.endswith(".py")]
    expected = [f"lstm_triton/{name}" for name in _modules(ROOT / "lstm_triton")]
    expected += [f"lstm_triton/kernels/{name}" for name in _modules(ROOT / "kernels")]
    expected += [f"lstm_triton/bench/{name}" for name in _modules(ROOT / "bench")]
    assert sorted(code) == sorted(expected)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lstm_triton"}, (
        "one top-level package"
    )
    assert "lstm_triton/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_wheel_works(wheel, tmp_path):
    installed = tmp_path / "installed"
    _pip("install", "--no-deps", "--target", installed, wheel)
    script = f"""
import importlib, importlib.util, pkgutil
import torch, lstm_triton
assert lstm_triton.__file__.startswith({str(installed)!r}), lstm_triton.__file__
assert importlib.util.find_spec("kernels") is None and importlib.util.find_spec("bench") is None
import lstm_triton.kernels, lstm_triton.bench
for module in pkgutil.iter_modules(lstm_triton.kernels.__path__):
    importlib.import_module("lstm_triton.kernels." + module.name)
cell = lstm_triton.LSTMCell(3, 5, backend="triton")
found = cell(torch.ones(2, 3))
torch.testing.assert_close(found, torch.nn.LSTMCell.forward(cell, torch.ones(2, 3)))
found[0].sum().backward()
from importlib.metadata import version
assert version("lstm-triton") == lstm_triton.__version__
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(installed), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
