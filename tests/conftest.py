"""One suite for CPU and GPU: without a GPU, or with TRITON_INTERPRET=1, kernels run in Triton's interpreter on CPU tensors."""

import os
import shutil
from pathlib import Path

import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
if INTERPRETING:  # before triton is imported: it reads the variable when it decorates a kernel
    os.environ["TRITON_INTERPRET"] = "1"

# Compiled kernels are kept for the next run, and shared by all processes of this one.
COMPILED = Path(__file__).parent.parent / ".ci-cache" / "triton"
os.environ.setdefault("TRITON_CACHE_DIR", str(COMPILED))

import importlib  # noqa: E402
import pkgutil  # noqa: E402
import random  # noqa: E402
import types  # noqa: E402
from collections.abc import Callable  # noqa: E402

import pytest  # noqa: E402
from support.plugins import EndWhenLost, Resume  # noqa: E402

import lstm_triton.kernels  # noqa: E402
from lstm_triton.bench.lost import why_lost  # noqa: E402
from lstm_triton.kernels import interpreter  # noqa: E402

# The interpreter works in numpy on small arrays, and several workers may share the cores.
torch.set_num_threads(1)

KERNEL_MODULES = [
    importlib.import_module(f"lstm_triton.kernels.{module.name}")
    for module in pkgutil.iter_modules(lstm_triton.kernels.__path__)
]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be there
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto`: on a GPU, where most of the time goes into compiling, a process for each core; otherwise xdist decides."""
    return None if INTERPRETING else max(4, os.cpu_count() or 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", metavar="FILE", help="leave out the tests that passed before, by FILE, which is kept")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--resume"):
        config.pluginmanager.register(Resume(Path(file), config))
    if not INTERPRETING:
        config.pluginmanager.register(EndWhenLost(why_lost))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Kernels of sources long changed must not fill the disk."""
    first = not hasattr(session.config, "workerinput")  # of pytest-xdist's processes
    if first and sum(file.stat().st_size for file in COMPILED.glob("*/*")) > 4 << 30:
        shutil.rmtree(COMPILED)


class _PoisoningTorch(types.ModuleType):
    """`torch` as the kernels' launchers see it: memory they ask for uninitialised comes filled with NaN."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def empty(*args, **kwargs):
        return poison(torch.empty(*args, **kwargs))

    @staticmethod
    def empty_like(*args, **kwargs):
        return poison(torch.empty_like(*args, **kwargs))

    @staticmethod
    def empty_strided(*args, **kwargs):
        return poison(torch.empty_strided(*args, **kwargs))


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill with what no kernel would write: NaN, or the largest integer."""
    if t.dtype == torch.bool:
        return t.fill_(True)
    return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)


@pytest.fixture(scope="session", autouse=True)
def poisoned_outputs():
    """An output element that a kernel does not write is NaN, not what happens to be there."""
    poisoning = _PoisoningTorch("torch")
    with pytest.MonkeyPatch.context() as patch:
        for module in KERNEL_MODULES:
            if getattr(module, "torch", None) is torch:
                patch.setattr(module, "torch", poisoning)
        yield


@pytest.fixture(autouse=True)
def checked_bounds():
    """In the interpreter every load, store and atomic is checked to lie in one of the launch's tensors."""
    if INTERPRETING:
        interpreter.install(check_bounds=True)


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETING else "cuda")


@pytest.fixture
def multiprocessors(monkeypatch) -> Callable[[int], None]:
    """multiprocessors(n): from here on the launch configurations are those of a GPU with n multiprocessors."""

    def pretend(n: int) -> None:
        for module in KERNEL_MODULES:
            if hasattr(module, "multiprocessor_count"):
                monkeypatch.setattr(module, "multiprocessor_count", lambda device: n)

    return pretend


@pytest.fixture
def count_launches(monkeypatch) -> Callable[[], dict[str, int]]:
    """Counts kernel launches from here on; calling it returns launches by kernel name since the last call."""
    from lstm_triton.kernels import launch

    counts: dict[str, int] = {}
    original = launch.Launcher.__call__

    def counting(self, *args, **kwargs):
        name = self.kernel.fn.__name__
        counts[name] = counts.get(name, 0) + 1
        return original(self, *args, **kwargs)

    def taken() -> dict[str, int]:
        found = dict(counts)
        counts.clear()
        return found

    monkeypatch.setattr(launch.Launcher, "__call__", counting)
    return taken
