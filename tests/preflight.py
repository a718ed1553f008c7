"""Whether this machine can run the tests on its GPU: `python tests/preflight.py` prints its versions, and exits with 1 and what
is missing if it cannot. A few seconds, before minutes are spent."""

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

REQUIRED = ("torch", "triton", "numpy", "pytest")
OPTIONAL = ("pytest-xdist", "jinja2", "matplotlib", "nvidia-ml-py", "pandas", "rich")


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> list[str]:
    """What Triton's launchers are built with, and the packages without which nothing runs."""
    found = [f"the Python package {name}" for name in REQUIRED if version(name) is None]
    compilers = [name for name in (os.environ.get("CC"), "gcc", "clang") if name]
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    builds = ", with which Triton builds its launchers"
    if not any(map(shutil.which, compilers)):
        found.append(f"a C compiler{builds}: none of {', '.join(compilers)} in PATH")
    return found + ([] if header.exists() else [f"{header}{builds}"])


def launch(device: str) -> None:
    """One kernel, which must be right."""
    import torch

    from lstm_triton import functional, reference

    x, h, c, *weights = (torch.randn(*shape, device=device) for shape in ((3, 5), (3, 8), (3, 8), (32, 5), (32, 8)))
    found = functional.lstm_cell(x, (h, c), *weights, precision="ieee", backend="triton")
    torch.testing.assert_close(found, reference.lstm_cell(x, h, c, *weights))


def gpu() -> str:
    import torch

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return f"{torch.cuda.get_device_name()}, compute capability {capability}, CUDA {torch.version.cuda}"


def main() -> int:
    print(
        f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in (*REQUIRED, *OPTIONAL)), sep=", "
    )
    if absent := missing():
        print(*(f"preflight: missing: {what}" for what in absent), sep="\n", file=sys.stderr)
        return 1
    try:
        print(gpu())
        launch("cuda")
    except Exception as error:
        print(f"preflight: a first launch failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
