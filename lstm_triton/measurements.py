"""Measurements on this device: the file that `lstm-triton tune` writes, and its use by "auto" and by launches.

A row holds for one shape, device, driver, Triton, torch and source of the kernels, and for sequences of half to twice its
length. The user's file comes first, then the package's own in the same format, then the cost model (`kernels.search`).
"""

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import storage
from .dispatch import Measured
from .kernels import device as kernels_device
from .modes import is_jit_tracing
from .shapes import Shape
from .versions import digest, driver_version, triton_version

SHIPPED = Path(__file__).with_name("measurements.json")  # not there until rows of a GPU are committed


class Machine(NamedTuple):
    """The device and software that a measurement depends on. kernels: a digest of their source."""

    device: str
    sms: int
    driver: str
    triton: str
    torch: str
    kernels: str


@dataclass(frozen=True)
class Row:
    """The fastest backend of a shape, how long a call takes with it and with cuDNN (None where that cannot serve), in
    microseconds, and the kernels' configurations that were fastest, where they were measured."""

    machine: Machine
    shape: Shape
    steps: int
    backend: str
    microseconds: float
    cudnn: float | None
    forward: dict | None = None
    backward: dict | None = None

    def __str__(self) -> str:
        beside = "" if self.cudnn is None else f", {self.cudnn / self.microseconds:.2f} times as fast as cuDNN"
        return f"{self.shape}, T = {self.steps}: {self.backend}, {self.microseconds:.1f} us{beside}"


@functools.cache
def machine(device: torch.device) -> Machine:
    """Return this machine, with this device."""
    from . import kernels
    from .kernels.device import multiprocessor_count

    sources = digest(Path(kernels.__file__).parent.glob("*.py"))
    is_gpu = device.type == "cuda"
    name, driver = (torch.cuda.get_device_name(device), driver_version()) if is_gpu else ("CPU", "none")
    versions = triton_version() or "none", torch.__version__
    return Machine(name, multiprocessor_count(device), driver, *versions, sources)


def path() -> Path:
    """Return the path of the user's measurements: LSTM_TRITON_TUNED, or else in the folder for caches."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LSTM_TRITON_TUNED") or Path(folder) / "lstm_triton" / "measurements.json")


def _read(file: Path) -> list[Row]:
    """Read the rows of a file. Raises ValueError for anything else."""
    given = json.loads(file.read_text())
    if not isinstance(given, list):
        raise ValueError("not a list of rows")
    return [storage.read(row, Row, "row") for row in given]


def _legal(row: Row, device: torch.device) -> bool:
    """Return whether this device can run the backend and the configurations of the row."""
    from .kernels.device import device_figures
    from .kernels.search import candidates

    found = ((way, getattr(row, way)) for way in ("forward", "backward"))
    return row.backend in ("cudnn", "triton", "triton-stepwise") and all(
        config is None or config in map(asdict, candidates(problem_of(row.shape, way), device_figures(device)))
        for way, config in found
    )


def problem_of(shape: Shape, way: str) -> Any:
    from .kernels.sequence_config import Problem

    dtype = getattr(torch, shape.dtype)
    sizes = shape.batch, shape.hidden_size, shape.directions
    return Problem(way, *sizes, dtype, shape.precision, cell=shape.cell)


@functools.cache
def rows(device: torch.device) -> tuple[tuple[str, Row], ...]:
    """Return the rows that hold on this device, each with its source, the user's first. A file that is damaged or was measured
    elsewhere is ignored as a whole, with a warning."""
    found: list[tuple[str, Row]] = []
    for source, file in (("your measurements", path()), ("shipped measurements", SHIPPED)):
        try:
            read = _read(file) if file.exists() else []
            here = [row for row in read if row.machine == machine(device)]
            if not all(_legal(row, device) for row in here):
                raise ValueError("a configuration that this device cannot run")
        except (ValueError, TypeError, AttributeError, OSError) as error:
            warnings.warn(f"lstm_triton leaves {file} aside: {error}", stacklevel=2)
            continue
        if read and not here and file != SHIPPED:
            text = (
                "was measured on another device, or with other versions: run lstm-triton tune again, or tune --forget"
            )
            warnings.warn(f"lstm_triton leaves {file} aside: it {text}", stacklevel=2)
        found += [(source, row) for row in here]
    return tuple(found)


def refresh() -> None:
    """Read the files again at the next call."""
    from .kernels import search

    rows.cache_clear()
    search.remembered.clear()


# Set by `tuning` where LSTM_TRITON_TUNE=1: called with shape, steps and device of a call for which nothing is measured.
tune_first_call: Callable[[Shape, int, torch.device], None] | None = None


def for_call(backend: str, shape_of: Callable[[], Shape], steps: int, device: torch.device) -> Measured | None:
    """Return `best` for a call with backend "auto", else None; None in compiled, exported and traced programs."""
    if backend != "auto" or torch.compiler.is_compiling() or is_jit_tracing():
        return None
    if not rows(device) and tune_first_call is None:
        return None
    shape = shape_of()
    found = best(shape, steps, device)
    if found is None and tune_first_call is not None:
        tune_first_call(shape, steps, device)
        found = best(shape, steps, device)
    return found


def best(shape: Shape, steps: int, device: torch.device) -> Measured | None:
    """Return the backend that was measured fastest for such a call, or None."""
    near = [(s, row) for s, row in rows(device) if row.shape == shape and row.steps <= 2 * steps <= 4 * row.steps]
    if not near:
        return None
    source, _ = near[0]
    _, row = min((n for n in near if source in n), key=lambda n: abs(math.log2(steps / n[1].steps)))
    beside = "" if row.cudnn is None else f", cuDNN {row.cudnn:.1f} us"
    return Measured(
        row.backend, f"measured here for T = {row.steps}: {row.microseconds:.1f} us a call{beside} ({source})"
    )


def _plain(problem: Any) -> Any:
    """Return the problem without the fields that only change the code."""
    names = ("way", "B", "H", "D", "dtype", "precision", "cell")
    return type(problem)(**{name: getattr(problem, name) for name in names})


def configuration(problem: Any, on: torch.device) -> Any:
    """Return the measured configuration of a kernel's launch, or None; it replaces `kernels.device.measured`."""
    from .kernels.sequence_config import SequenceConfig

    training = problem.way == "backward" or "gates" in problem.features
    same = [row for _, row in rows(on) if problem_of(row.shape, problem.way) == _plain(problem)]
    found = [row for row in same if getattr(row, problem.way) is not None]
    row = next((row for row in found if row.shape.train == training), found[0] if found else None)
    return None if row is None or problem.stepwise else SequenceConfig(**getattr(row, problem.way))


kernels_device.measured = configuration


def listing() -> list[str]:
    """Return the lines of the user's file for this machine, and how many it has for others."""
    try:
        found = _read(path()) if path().exists() else []
    except (OSError, ValueError) as error:
        return [f"{path()} is damaged: {error}"]
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    here = machine(torch.device("cpu" if index is None else f"cuda:{index}"))
    lines = [str(row) for row in found if row.machine == here]
    others = [f"{len(found) - len(lines)} for other devices or versions"] * (len(found) > len(lines))
    return [*lines, *others, f"in {path()}"] if found else [f"none yet: lstm-triton tune writes {path()}"]


def change(by: Callable[[list[Row]], Sequence[Row]]) -> None:
    """Replace the rows of the user's file by those that `by` returns. Processes take turns; readers see old or new rows.

    A file that is damaged is replaced.
    """
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        try:
            before = _read(file)
        except (OSError, ValueError):
            before = []
        text = json.dumps(
            [asdict(row) | dict(machine=row.machine._asdict(), shape=row.shape._asdict()) for row in by(before)]
        )
        with storage.unfinished(file) as part:
            part.write_text(text.replace('{"machine"', '\n{"machine"'))
    refresh()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where no kernel runs

    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add(row: Row) -> None:
    """Add a row to the user's file, in place of one for the same call and machine."""

    def key(row: Row) -> tuple:
        return row.machine, row.shape, row.steps

    change(lambda rows: [*(old for old in rows if key(old) != key(row)), row])
