"""The machine that rows are taken on: device, versions, the code's own identity, clocks. All is read, nothing is set."""

import contextlib
import datetime
import functools
import hashlib
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import lstm_triton
from lstm_triton import versions as installed

from .cases import Task
from .rows import CPU_LABEL, Device, Row, Source, Versions

TOOLS = ("process.py", "storage.py", "timing.py", "versions.py")  # of lstm_triton, with which the benchmark measures
COMMIT_VARIABLE = "LSTM_TRITON_BENCH_COMMIT"
_READERS: dict[str, Any] = {  # of NVML and its handle of a GPU
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "max_sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "power_limit_w": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "utilization_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
}


class UsageError(ValueError):
    """Arguments that make no sense together, or here."""


def pick(name: str) -> str:
    """The device to measure on; raises UsageError where there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if (known := re.fullmatch(r"(cuda|cpu)(?::(\d+))?", name)) is None:
        raise UsageError(f"--device {name}: only NVIDIA GPUs and the CPU are measured")
    if known[1] == "cuda" and int(known[2] or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: no such NVIDIA GPU here")
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
    """Clocks, power and temperature now, as far as they can be read."""
    if device.type != "cuda":
        return {"load_1min": os.getloadavg()[0]}
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except ImportError:
        return {"unread": "nvidia-ml-py is missing: pip install 'lstm-triton[bench]'"}
    except Exception as error:  # NVMLError, or a torch without UUIDs
        return {"unread": f"NVML: {error}"}
    found = dict.fromkeys(_READERS)
    for name, reader in _READERS.items():
        with contextlib.suppress(pynvml.NVMLError):  # as on a slice of a GPU
            found[name] = reader(pynvml, gpu)
    return found


def versions() -> Versions:
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    triton, system = installed.triton_version(), f"{platform.system()} {platform.machine()}"
    own, python = lstm_triton.__version__, platform.python_version()
    return Versions(own, str(torch.__version__), python, triton, torch.version.cuda, cudnn, system)


@functools.cache
def source() -> Source:
    """Identify this version of the package: its commit if it is a checkout, and a digest of the code that computes."""
    computes = digest(Path(lstm_triton.__file__).resolve().parent)
    if COMMIT_VARIABLE in os.environ:  # an export of that commit
        return Source(os.environ[COMMIT_VARIABLE], False, computes)
    try:
        return Source(git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no")), computes)
    except UsageError:
        return Source(None, None, computes)


def checkout() -> Path | None:
    """The folder of the checkout that this package is imported from, or None where it was installed."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / "pyproject.toml").is_file() and (folder / "kernels").is_dir() else None


def git(*arguments: str) -> str:
    """What git says in the checkout; raises UsageError where there is none, or git refuses."""
    try:
        command = ["git", "-C", str(checkout()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"git {' '.join(arguments)}: {getattr(error, 'stderr', None) or error}") from None


def digest(package: Path) -> str:
    """Twelve hexadecimal digits over the sources of the kernels and their callers; not of command line or benchmark."""
    left_out = {"cli.py", "check.py", "_version.py", *TOOLS}
    files = [p for p in package.glob("*.py") if p.name not in left_out] + list((package / "kernels").glob("*.py"))
    total = hashlib.sha256()
    for path in sorted(files, key=lambda p: (p.parent.name, p.name)):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def results_folder() -> Path:
    """Where rows go by default: bench/results in a checkout, ./lstm-triton-bench where the package is installed."""
    folder = checkout()
    return folder / "bench" / "results" if folder else Path("lstm-triton-bench")


def folder_name(name: str) -> str:
    """A device's name as a folder: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


class RowMaker:
    """Makes the rows of one run on one device. command: as it was typed; l2: the state of the L2 cache that is timed."""

    def __init__(self, on: torch.device, command: str, run: str, l2: Any = None, synthetic: bool = False) -> None:
        self.on, self.l2, self.device, self.versions, self.source = on, l2, describe(on), versions(), source()
        self.always: dict[str, Any] = dict(command=command, run=run, synthetic=synthetic)
        self._state: tuple[float, dict[str, Any]] = float("-inf"), {}

    def state(self) -> dict[str, Any]:
        """Clocks, power, temperature, read at most every two seconds, since asking takes a while."""
        if (now := time.monotonic()) - self._state[0] > 2.0:
            self._state = now, state(self.on)
        return self._state[1]

    def make(
        self, task: Task, provider: str, execution: Any, status: Any, reason: str | None = None, **measured: Any
    ) -> Row:
        """A row; `measured` has what there is of model (a providers.Model), state and Row's fields of figures."""
        if model := measured.pop("model", None):
            said = "; ".join(text for text in (model.backend_reason, *model.remarks) if text)
            measured |= dict(backend=model.backend, backend_reason=said or None, algorithm=model.algorithm)
        labels = [CPU_LABEL if self.device.type == "cpu" else None, task.case.note]
        labels += ["kernels in Triton's interpreter, errors only"] if task.interpreter else []
        backends: Any = torch.backends
        precision = {"cudnn_rnn": backends.cudnn.rnn.fp32_precision, "cuda_matmul": backends.cuda.matmul.fp32_precision}
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        measured.setdefault("state", self.state() if status == "ok" else {})
        measured |= dict(kind=task.kind, suite=task.suite, case=task.case, provider=provider, execution=execution)
        measured |= dict(
            status=status, reason=reason, label="; ".join(text for text in labels if text) or None, date=now
        )
        measured |= dict(device=self.device, versions=self.versions, source=self.source) | self.always
        # Failures name the state of the cache too: with another one they are tried again.
        measured["l2"] = self.l2 if task.kind in ("timing", "anchor") else None
        return Row(precision=precision | {"lstm_triton": task.case.precision or "as the dtype"}, **measured)
