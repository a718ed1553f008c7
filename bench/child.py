"""Python processes that import what this one does."""

import os
import sys
from collections.abc import Mapping, Sequence


def command(module: str, argument: str) -> list[str]:
    """Runs `main([argument])` of a module of this package, importing from PYTHONPATH alone, not from the working folder."""
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; "
        f"from lstm_triton.bench.{module} import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, argument]


def environment(path: Sequence[str] | None = None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without Triton's interpreter; imports come from `path`, by default from where this process's do."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in (sys.path if path is None else path))
    return environ | dict(more or {})
