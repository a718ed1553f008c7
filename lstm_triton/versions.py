"""The versions of Triton, of NVIDIA's driver and of sources."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path


def triton_version() -> str | None:
    """Return Triton's version without importing it, or None if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a source tree, or a folder on PYTHONPATH
        import triton

        return triton.__version__


def driver_version() -> str:
    """Return the version of NVIDIA's driver, which torch does not tell."""
    with contextlib.suppress(OSError, TypeError):  # the quick way, on Linux
        return re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())[0]  # type: ignore[index]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi did not answer)"
    return out.splitlines()[0].strip() if out.strip() else "unknown"


def digest(files: Iterable[Path]) -> str:
    """Return sixteen hexadecimal digits over names and contents."""
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(files, key=lambda path: (path.parent.name, path.name)):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
