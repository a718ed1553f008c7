"""What a row was taken on: device, versions, the code's own identity, clocks. All of it is read, nothing is ever set."""

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
from lstm_triton import environment

ROOT = Path(lstm_triton.__file__).resolve().parent
COMMIT_VARIABLE = "LSTM_TRITON_BENCH_COMMIT"
SMI_FIELDS = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.max.sm": "max_sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "utilization.gpu": "utilization_percent",
}


def describe(device: torch.device) -> dict[str, Any]:
    """The device as rows have it."""
    if device.type != "cuda":
        return {
            "type": "cpu",
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "driver": None,
        }
    p = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": getattr(p, "L2_cache_size", None),
        "driver": next(iter(_smi(device, ["driver_version"]) or ()), None),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return "CPU " + line.partition(":")[2].strip()
    except OSError:
        pass
    return f"CPU {platform.processor() or platform.machine()}"


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power and temperature now, as far as they can be read."""
    if device.type != "cuda":
        load = os.getloadavg() if hasattr(os, "getloadavg") else (None,)
        return {"load_1min": load[0]}
    values = _smi(device, list(SMI_FIELDS))
    if values is None:
        return {"unread": "nvidia-smi did not answer"}
    found: dict[str, Any] = {}
    for name, text in zip(SMI_FIELDS.values(), values):
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = None  # "[N/A]", as on a slice of a GPU
    return found


def _smi(device: torch.device, fields: list[str]) -> list[str] | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = ["-i", f"GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    line = next(iter(out.splitlines()), "")
    values = [value.strip() for value in line.split(",")]
    return values if len(values) == len(fields) else None


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, Any]:
    return {
        "lstm_triton": lstm_triton.__version__,
        "torch": torch.__version__,
        "triton": environment.triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


@functools.lru_cache(maxsize=1)
def source() -> dict[str, Any]:
    """Which version of this package: its commit if it is a checkout, and a digest of the code that computes."""
    commit, dirty = _git("rev-parse", "HEAD"), _is_dirty()
    if COMMIT_VARIABLE in os.environ:  # an export of that commit
        commit, dirty = os.environ[COMMIT_VARIABLE], False
    return {"commit": commit, "dirty": dirty, "digest": digest(ROOT)}


def _is_dirty() -> bool | None:
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)


def checkout() -> Path | None:
    """The folder of the checkout that this package is imported from, or None where it was installed."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / "pyproject.toml").is_file() and (folder / "kernels").is_dir() else None


def _git(*arguments: str) -> str | None:
    folder = checkout()
    if folder is None:
        return None
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def digest(package: Path) -> str:
    """Twelve hexadecimal digits over the sources of the kernels and their callers; not of command line or benchmark."""
    left_out = {"cli.py", "check.py", "_version.py"}
    total = hashlib.sha256()
    files = [p for p in package.glob("*.py") if p.name not in left_out] + list((package / "kernels").glob("*.py"))
    for path in sorted(files, key=lambda p: (p.parent.name, p.name)):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def process_age() -> float:
    """Seconds since this process began, imports included; infinite where the system does not tell."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, ValueError, IndexError, AttributeError):
        return float("inf")


def folder_name(described: dict[str, Any]) -> str:
    """The device's name as a folder: "nvidia-h200", "cpu-..."."""
    return re.sub(r"[^a-z0-9]+", "-", described["name"].lower()).strip("-") or described["type"]


def results_folder() -> Path:
    """Where rows go by default: bench/results in a checkout, ./lstm-triton-bench where the package is installed."""
    folder = checkout()
    return folder / "bench" / "results" if folder else Path("lstm-triton-bench")
