"""Describe this machine: versions, GPU, which backends can run here and why others cannot."""

import contextlib
import json
import os
import platform
from collections import Counter
from pathlib import Path

import torch

from lstm_triton import dispatch, measurements
from lstm_triton._version import __version__
from lstm_triton.versions import driver_version, triton_version

# Beginnings of the names under which Triton keeps this package's compiled kernels.
_KERNEL_NAMES = ("_lstm_", "_readout_")


def why_no_triton_gpu() -> str | None:
    """Return why the Triton kernels cannot run on the current GPU, or None if they can."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU, or a torch build without CUDA"
    device = torch.device("cuda", torch.cuda.current_device())
    return _why_no_kernels(device)


def _why_no_kernels(device: torch.device) -> str | None:
    try:
        dispatch.choose_cell("triton", device.type, torch.float32, dispatch.environment(device))
    except RuntimeError as error:
        return str(error).partition(": ")[2] or str(error)
    return None


def device_label(device: torch.device | None = None) -> str:
    """Return the device (by default the current GPU, if any) in a few words, such as 'NVIDIA H200 (sm_90, 132 SMs)'."""
    on_cpu = "torch's own CPU kernels; Triton kernels in the interpreter"
    if not torch.cuda.is_available():
        return f"CPU only (no NVIDIA GPU): {on_cpu}"
    if device is not None and device.type != "cuda":
        return f"{device.type.upper()}, chosen instead of the GPU: {on_cpu}"
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    p = torch.cuda.get_device_properties(index)
    return f"{p.name} (sm_{p.major}{p.minor}, {p.multi_processor_count} SMs)"


def summary(device: torch.device | None = None) -> str:
    """Return one line: the device, as from `device_label`, and the versions that decide what runs."""
    return f"{device_label(device)} · triton {triton_version() or 'not installed'} · torch {torch.__version__}"


def info() -> str:
    """Return the listing that `lstm-triton info` prints: versions, GPU, driver, backends, measurements, compiled kernels."""
    lines = [summary(), ""]
    rows = [
        ("lstm_triton", __version__),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", triton_version() or "not installed"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", f"{os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads"),
    ]
    lines += _aligned(rows)
    lines += ["", "GPUs"] + [f"  {line}" for line in _gpu_lines()]
    lines += ["", "Backends"] + [f"  {line}" for line in _aligned(_backends())]
    lines += ["", "Measurements"] + [f"  {line}" for line in measurements.listing()]
    lines += ["", "Compiled kernels"] + [f"  {line}" for line in _cache_lines()]
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def _gpu_lines() -> list[str]:
    if not torch.cuda.is_available():
        return ["none"]
    lines = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        shared = getattr(p, "shared_memory_per_block_optin", None)
        l2 = getattr(p, "L2_cache_size", None)
        parts = [
            f"sm_{p.major}{p.minor}",
            f"{p.multi_processor_count} SMs",
            f"{p.total_memory / 2**30:.0f} GiB",
            *([f"L2 {l2 / 2**20:.0f} MiB"] if l2 else []),
            *([f"shared memory {shared / 2**10:.0f} KiB a block"] if shared else []),
        ]
        lines.append(f"{index}: {p.name}: " + ", ".join(parts))
    return [*lines, f"driver {driver_version()}"]


def _backends() -> list[tuple[str, str]]:
    if (reason := why_no_triton_gpu()) is None:
        triton = "available on the GPU"
    elif _why_no_kernels(torch.device("cpu")) is None:
        triton = "available on CPU tensors, in the interpreter (TRITON_INTERPRET=1)"
    else:
        triton = f"not available: {reason}"
        triton += "; TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly" if triton_version() else ""
    if not torch.cuda.is_available():
        cudnn = "not available: no NVIDIA GPU, or a torch build without CUDA"
    elif not torch.backends.cudnn.is_available():
        cudnn = "not available: this torch build has no cuDNN"
    else:
        cudnn = f"available, version {torch.backends.cudnn.version()}"
    return [("triton", triton), ("cudnn", cudnn), ("reference", "available: plain PyTorch, on any device")]


def cache_folder() -> Path:
    """Return the folder of Triton's compiled kernels."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton/cache")


def compiled_kernels(folder: Path) -> dict[tuple[str, str], int]:
    """Count this package's kernels in a cache of Triton's, by (kernel, architecture): each has a folder, with metadata."""
    found: Counter[tuple[str, str]] = Counter()
    for path in folder.glob("*/_*.json"):
        if not path.name.startswith(_KERNEL_NAMES):
            continue
        try:
            metadata = json.loads(path.read_text())
            arch = metadata["target"]["arch"]
            found[metadata["name"], f"sm_{arch}" if isinstance(arch, int) else str(arch)] += 1
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ):  # gone meanwhile, cut off, or of a Triton that writes it otherwise
            found[path.stem, "unreadable"] += 1
    return dict(sorted(found.items()))


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder; another process may be writing there."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(path, name)).st_size
    return size


def _cache_lines() -> list[str]:
    folder = cache_folder()
    if not folder.is_dir():
        return [f"none yet; they will be kept in {folder}"]
    kernels = compiled_kernels(folder)
    rows = [(name, f"{arch:<6}  {n} variant{'s' * (n > 1)}") for (name, arch), n in kernels.items()]
    return [
        *(_aligned(rows) if rows else ["none yet"]),
        f"in {folder}: {_size(folder) / 2**20:.1f} MiB, other packages' kernels included",
    ]
