"""How far a run is: one line that is overwritten where someone watches, and lines that stay."""

import importlib.util
import sys
import time

# What serves output alone, and what is not shown without it.
EXTRAS = dict(pandas="tables", matplotlib="figures", jinja2="report", rich="progress line", pynvml="GPU clocks")


def missing(*names: str) -> str | None:
    """A sentence about those of EXTRAS (by default of all) that are not installed, or None."""
    absent = [name for name in names or EXTRAS if importlib.util.find_spec(name) is None]
    without = ", ".join(f"no {EXTRAS[name]} without {name}" for name in absent)
    return f"{without}: pip install 'lstm-triton[bench]'" if absent else None


def duration(seconds: float) -> str:
    """ "45 s", "3 min 10 s", "1 h 5 min"."""
    minutes, s = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    parts = (hours, "h"), (minutes, "min"), (0 if hours else s, "s")
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"


class Progress:
    """Counts up to `total`; knows how long that took, and so about how long the rest will."""

    def __init__(self, total: float, budget_s: float | None = None) -> None:
        self.total, self.done = total, 0.0
        self._begin, self._budget_s, self._status = time.monotonic(), budget_s, None
        if sys.stderr.isatty() and missing("rich") is None:
            from rich.console import Console

            self._status = Console(file=sys.stderr).status("", refresh_per_second=2)
            self._status.start()

    def left(self) -> float | None:
        """Seconds until all is done or the budget is used; None before there is anything to judge by."""
        spent = time.monotonic() - self._begin
        bounds = [] if self._budget_s is None else [self._budget_s - spent]
        bounds += [spent / self.done * (self.total - self.done)] if self.done else []
        return min(bounds, default=None)

    def show(self, what: str) -> None:
        """`what` is under way."""
        if self._status is not None:
            left = self.left()
            text = what if left is None else f"{duration(left)} left · {what}"
            self._status.update(f"{self.done / max(self.total, 1e-9):4.0%} · {text}")

    def say(self, text: str) -> None:
        """A line that stays, on standard output."""
        self.close()
        print(text, flush=True)
        if self._status is not None:
            self._status.start()

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
