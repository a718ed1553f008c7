"""The machine that rows are taken on: device, versions, the code's own identity, clocks. All is read, nothing is set."""

import contextlib
import datetime
import functools
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lstm_triton
from lstm_triton import versions as installed

from .cases import Task, UsageError, require
from .rows import CPU_LABEL, Device, Row, Source, Versions

# What torch reads of a GPU by NVML.
_READERS: dict[str, Callable[[torch.device], float]] = {
    "sm_clock_mhz": torch.cuda.clock_rate,
    "power_w": lambda gpu: torch.cuda.power_draw(gpu) / 1e3,
    "temperature_c": torch.cuda.temperature,
    "utilization_percent": torch.cuda.utilization,
}
_LEFT_OUT = {"cli.py", "check.py", "_version.py", "process.py", "storage.py", "timing.py", "versions.py"}


def pick(name: str) -> str:
    """Return the device to measure on; raises UsageError where there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = re.fullmatch(r"(cuda|cpu)(?::(\d+))?", name)
    require({f"--device {name}: only NVIDIA GPUs and the CPU are measured": known}, UsageError)
    is_there = name.startswith("cpu") or int((known and known[2]) or 0) < torch.cuda.device_count()
    require({f"--device {name}: no such NVIDIA GPU here": is_there}, UsageError)
    return name


def describe(device: torch.device) -> Device:
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        sizes = p.multi_processor_count, p.total_memory, getattr(p, "L2_cache_size", None)
        return Device("cuda", p.name, installed.driver_version(), None, None, f"{p.major}.{p.minor}", *sizes)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = re.findall(r"^model name\s*: (.*\S)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    return Device("cpu", f"CPU {name}", threads=torch.get_num_threads(), cores=os.cpu_count())


def state(device: torch.device) -> dict[str, Any]:
    """Read clocks, power and temperature, as far as they can be read."""
    if device.type != "cuda":
        return {"load_1min": os.getloadavg()[0]}
    found: dict[str, Any] = dict.fromkeys(_READERS)
    for name, read in _READERS.items():
        try:
            found[name] = read(device)
        except ModuleNotFoundError:
            return {"unread": "nvidia-ml-py is missing: pip install 'lstm-triton[bench]'"}
        except Exception:  # an NVMLError, as on a slice of a GPU
            continue
    return found


@functools.cache
def source() -> Source:
    """Identify this version of the package: its commit if it is a checkout, and a digest of the kernels and their callers."""
    package = Path(lstm_triton.__file__).resolve().parent
    files = [path for path in package.glob("*.py") if path.name not in _LEFT_OUT]
    digest = installed.digest([*files, *(package / "kernels").glob("*.py")])[:12]
    command = ["git", "-C", str(checkout()), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # installed, or no git
        return Source(None, None, digest)
    return Source(said.removesuffix("-dirty"), said.endswith("-dirty"), digest)


def checkout() -> Path | None:
    """Return the folder of the checkout that this package is imported from, or None where it was installed."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / "pyproject.toml").is_file() and (folder / "kernels").is_dir() else None


def results_folder(name: str = "") -> Path:
    """Return where the rows of the device of this name go by default; of an installed package below ./lstm-triton-bench."""
    folder = root / "bench" / "results" if (root := checkout()) else Path("lstm-triton-bench")
    return folder / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class RowMaker:
    """Makes the rows of one run on one device. command: as it was typed; l2: the state of the L2 cache that is timed."""

    def __init__(self, on: torch.device, command: str, run: str, l2: Any = None, synthetic: bool = False) -> None:
        self.on, self.l2, self.device, self.source = on, l2, describe(on), source()
        cudnn, own = torch.backends.cudnn.version() if torch.cuda.is_available() else None, lstm_triton.__version__
        others = platform.python_version(), installed.triton_version(), torch.version.cuda, cudnn
        self.versions = Versions(own, str(torch.__version__), *others, f"{platform.system()} {platform.machine()}")
        self._given: dict[str, Any] = dict(command=command, run=run, synthetic=synthetic)

    def make(self, task: Task, provider: str, execution: Any, status: Any, reason: Any = None, **measured: Any) -> Row:
        """Make a row; `measured` has what there is of model (a problem.Model), state and Row's fields of figures."""
        if model := measured.pop("model", None):
            said = "; ".join(model.remarks) or None
            measured |= dict(backend=model.backend, backend_reason=said, algorithm=model.algorithm)
        if errors := measured.get("errors"):  # JSON has no infinities
            measured["errors"] = {name: e for name, e in errors.items() if math.isfinite(e.largest)}
        backends: Any = torch.backends
        precision = {"cudnn_rnn": backends.cudnn.rnn.fp32_precision, "cuda_matmul": backends.cuda.matmul.fp32_precision}
        if "state" not in measured:
            measured["state"] = state(self.on) if status == "ok" else {}
        return Row(
            **dict(kind=task.kind, suite=task.suite, case=task.case, provider=provider, execution=execution),
            **dict(device=self.device, versions=self.versions, source=self.source, status=status, reason=reason),
            precision=precision | {"lstm_triton": task.case.precision or "as the dtype"},
            # Failures name the state of the cache too: with another one they are tried again.
            l2=self.l2 if task.kind in ("timing", "anchor") else None,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            label="; ".join(filter(None, [CPU_LABEL * (self.device.type == "cpu"), task.case.note])) or None,
            **self._given,
            **measured,
        )
