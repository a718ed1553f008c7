"""How far a run is: one line that is overwritten where someone watches, and lines that stay."""

import importlib.util
import sys
import time
from typing import Any

# What serves output alone, and what is not shown without it.
EXTRAS = {
    "pandas": "tables",
    "matplotlib": "figures",
    "jinja2": "the report",
    "rich": "the progress line",
    "pynvml": "clocks and power of a GPU (nvidia-ml-py)",
}
INSTALL = "pip install 'lstm-triton[bench]'"


def missing(*names: str) -> str | None:
    """A sentence about those of EXTRAS (by default of all) that are not installed, or None."""
    absent = [name for name in names or EXTRAS if importlib.util.find_spec(name) is None]
    return f"{', '.join(f'no {EXTRAS[n]} without {n}' for n in absent)}: {INSTALL}" if absent else None


def duration(seconds: float) -> str:
    """ "45 s", "3 min 10 s", "1 h 5 min"."""
    seconds = max(round(seconds), 0)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s" if seconds % 60 else f"{seconds // 60} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Progress:
    """Counts up to `total`; knows how long that took, and so about how long the rest will."""

    def __init__(self, total: float, deadline: float | None = None) -> None:
        self.total, self.done = total, 0.0
        self._begin, self._deadline, self._live = time.monotonic(), deadline, None
        if sys.stderr.isatty() and missing("rich") is None:
            from rich.console import Console
            from rich.live import Live

            console, quiet = Console(file=sys.stderr), dict(redirect_stdout=False, redirect_stderr=False)
            self._live = Live(console=console, auto_refresh=False, transient=True, **quiet)
            self._live.start()

    def left(self) -> float | None:
        """Seconds until all is done or the budget is used; None before there is anything to judge by."""
        now = time.monotonic()
        bounds = [] if self._deadline is None else [self._deadline - now]
        if self.done:
            bounds.append((now - self._begin) / self.done * (self.total - self.done))
        return min(bounds) if bounds else None

    def show(self, what: str) -> None:
        """`what` is under way."""
        if self._live is not None:
            from rich.columns import Columns
            from rich.progress_bar import ProgressBar
            from rich.text import Text

            left = self.left()
            text = (f"{duration(left)} left · " if left is not None else "") + what
            bar: Any = ProgressBar(total=self.total, completed=self.done, width=20)
            self._live.update(Columns([bar, Text(text, no_wrap=True, overflow="ellipsis")]), refresh=True)

    def say(self, text: str) -> None:
        """A line that stays, on standard output."""
        if self._live is not None:
            self._live.update("", refresh=True)
        print(text, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
