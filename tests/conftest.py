"""One suite, three engines. On a GPU every test runs there. Elsewhere kernels run on CPU tensors: in Triton's interpreter, or,
with COMPILED_FOR=sm_90 (or another) in the environment, compiled for that target and executed by support.executor.

A process is one or the other. Tests marked `compiled` belong to the executor, all others to the interpreter, which has those
marked too where the executor cannot run.
"""

import os
import shutil
from pathlib import Path

import torch

TARGET = os.environ.get("COMPILED_FOR")
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
EXECUTING = bool(TARGET) and not ON_GPU
INTERPRETING = not (ON_GPU or EXECUTING)
if not ON_GPU:  # before triton is imported: it reads the variable when it decorates a kernel
    os.environ["TRITON_INTERPRET"] = "1" if INTERPRETING else "0"

# Compiled code is kept for the next run, and shared by all processes of this one.
CACHE = Path(__file__).parent.parent / ".ci-cache"
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a graph or two: no pool of processes

import functools  # noqa: E402
import importlib  # noqa: E402
import inspect  # noqa: E402
import pkgutil  # noqa: E402
import random  # noqa: E402
import types  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402

import pytest  # noqa: E402
from support import executor  # noqa: E402
from support.plugins import EndWhenLost, Resume  # noqa: E402

import lstm_triton.kernels  # noqa: E402
from lstm_triton.process import why_lost  # noqa: E402

# The interpreter works in numpy on small arrays, and several workers may share the cores.
torch.set_num_threads(1)

KERNEL_MODULES = [
    importlib.import_module(f"lstm_triton.kernels.{module.name}")
    for module in pkgutil.iter_modules(lstm_triton.kernels.__path__)
]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be there
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto`: on a GPU, where most of the time goes into compiling, a process for each core; otherwise xdist decides."""
    return max(4, os.cpu_count() or 1) if ON_GPU else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", metavar="FILE", help="leave out the tests that passed before, by FILE, which is kept")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--resume"):
        config.pluginmanager.register(Resume(Path(file), config))
    if ON_GPU:
        config.pluginmanager.register(EndWhenLost(why_lost))


_COMPILED = b"pytest.mark.compiled"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The process that executes reads no files without a test for it."""
    if EXECUTING and collection_path.suffix == ".py" and _COMPILED not in collection_path.read_bytes():
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
    if ON_GPU or executor.why_not() is not None:
        other = items[:] if TARGET else []  # the process without a target has run them all
    else:
        other = [item for item in items if (item.get_closest_marker("compiled") is None) == EXECUTING]
        for path in {item.path for item in other if not EXECUTING}:
            if _COMPILED not in path.read_bytes():
                raise pytest.UsageError(f"{path} would run nowhere: it does not spell {_COMPILED.decode()} out")
    if other:
        config.hook.pytest_deselected(items=other)
        left_out = set(other)
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Code of sources long changed must not fill the disk."""
    first = not hasattr(session.config, "workerinput")  # of pytest-xdist's processes
    for folder in (CACHE / "triton", CACHE / "executed", CACHE / "inductor") if first else ():
        if sum(file.stat().st_size for file in folder.rglob("*")) > 2 << 30:
            shutil.rmtree(folder)


class _PoisoningTorch(types.ModuleType):
    """`torch` as the kernels' launchers see it: memory they ask for uninitialised holds what no kernel would write: NaN, or
    the largest integer."""

    def __getattr__(self, name: str):
        found = getattr(torch, name)
        return functools.partial(_poisoned, found) if name in ("empty", "empty_like", "empty_strided") else found


def _poisoned(empty: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
    t = empty(*args, **kwargs)
    if t.dtype == torch.bool:
        return t.fill_(True)
    return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)


@pytest.fixture(scope="session", autouse=True)
def checked_memory() -> Iterator[None]:
    """An output element that a kernel does not write is NaN, not what happens to be there. In the interpreter every load, store
    and atomic is checked to lie in one of the launch's tensors."""
    if INTERPRETING:
        from support import bounds  # needs numpy, without which a GPU runs

        bounds.install()
    poisoning = _PoisoningTorch("torch")
    with pytest.MonkeyPatch.context() as patch:
        for module in KERNEL_MODULES:
            if "torch.empty" in inspect.getsource(module):
                patch.setattr(module, "torch", poisoning)
        yield


@pytest.fixture(autouse=True)
def executed() -> Iterator[executor.ExecutingDriver | None]:
    """The driver that executes and checks the compiled kernels of a test; what it reports, raises. None with other engines."""
    if not EXECUTING:
        yield None
        return
    with executor.executing(TARGET) as driver:
        yield driver


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def multiprocessors(monkeypatch) -> Callable[[int], None]:
    """multiprocessors(n): from here on the launch configurations are those of a GPU with n multiprocessors."""

    def pretend(n: int) -> None:
        for module in KERNEL_MODULES:
            if hasattr(module, "multiprocessor_count"):
                monkeypatch.setattr(module, "multiprocessor_count", lambda device: n)

    return pretend


@pytest.fixture
def count_launches(monkeypatch) -> Callable[..., dict[str, int]]:
    """Counts kernel launches from here on; calling it returns launches by kernel name since the last call.

    Those that bring the input's weights into order are left out, unless all are asked for.
    """
    from lstm_triton.kernels import launch

    counts: Counter[str] = Counter()
    original = launch.Launcher.__call__

    def counting(self, *args, **kwargs):
        counts[self.kernel.fn.__name__] += 1
        return original(self, *args, **kwargs)

    def taken(every: bool = False) -> dict[str, int]:
        found = {name: n for name, n in counts.items() if every or name != "_lstm_input_weights_kernel"}
        counts.clear()
        return found

    monkeypatch.setattr(launch.Launcher, "__call__", counting)
    return taken
