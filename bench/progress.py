"""How far a run is: one line that is overwritten where someone watches, and lines that stay."""

import importlib.util
import sys

# What serves output alone, and what is not shown without it.
EXTRAS = dict(pandas="tables", matplotlib="figures", jinja2="report", rich="progress line", pynvml="GPU clocks")


def missing(*names: str) -> str | None:
    """A sentence about those of EXTRAS (by default of all) that are not installed, or None."""
    absent = [name for name in names or EXTRAS if importlib.util.find_spec(name) is None]
    without = ", ".join(f"no {EXTRAS[name]} without {name}" for name in absent)
    return f"{without}: pip install 'lstm-triton[bench]'" if absent else None


class Progress:
    """Counts what is `done` of `total`, on a line of the terminal with the time that is left at this pace."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self._bar = total, 0.0, None
        if sys.stderr.isatty() and missing("rich") is None:
            from rich import console, progress

            columns = "{task.percentage:3.0f} %", progress.TimeRemainingColumn(), "left · {task.description}"
            self._bar = progress.Progress(*columns, console=console.Console(file=sys.stderr), transient=True)
            self._line = self._bar.add_task("", total=total)
            self._bar.start()

    def show(self, what: str) -> None:
        """`what` is under way."""
        if self._bar is not None:
            self._bar.update(self._line, completed=self.done, total=self.total, description=what)

    def say(self, text: str) -> None:
        """A line that stays, on standard output."""
        self.close()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
