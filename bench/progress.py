"""How far a run is: one line that is overwritten where someone watches, nothing but results elsewhere."""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """ "45 s", "3 min 10 s", "1 h 5 min"."""
    seconds = max(round(seconds), 0)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s" if seconds % 60 else f"{seconds // 60} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Pace:
    """How long tasks took, and so how long the next one will: what does not fit into a budget is not begun."""

    _RECENT = 8

    def __init__(self, first: float) -> None:
        """first: seconds per row that are expected of the first task."""
        self._first = first
        self._seconds: dict[str, list[float]] = {}  # per row, by suite

    def took(self, suite: str, rows: int, seconds: float) -> None:
        for key in (suite, ""):
            self._seconds.setdefault(key, []).append(seconds / max(rows, 1))

    def predict(self, suite: str, rows: int) -> float:
        """Seconds, rather too many: the upper quartile of the last tasks of the suite, or of all."""
        recent = sorted(self._seconds.get(suite, self._seconds.get("", [self._first]))[-self._RECENT :])
        return rows * recent[3 * len(recent) // 4]


class Progress:
    """Counts tasks; knows how long they took, and so about how long the rest will."""

    def __init__(self, total: int, deadline: float | None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._begin = time.monotonic()
        self._deadline = deadline
        self.total, self.done = total, 0
        self._what = ""

    def left(self) -> float | None:
        """Seconds until the tasks are done or the budget is used; None before there is anything to judge by."""
        now = time.monotonic()
        bounds = [] if self._deadline is None else [self._deadline - now]
        if self.done:
            bounds.append((now - self._begin) / self.done * (self.total - self.done))
        return min(bounds) if bounds else None

    def stage(self, what: str) -> None:
        self._what = what
        if not self._live:
            return
        width = 20
        filled = round(width * self.done / max(self.total, 1))
        left = self.left()
        text = f"[{'#' * filled}{'.' * (width - filled)}] {self.done}/{self.total}"
        text += f" · {duration(left)} left" if left is not None else ""
        self._stream.write(f"\r\x1b[2K{text} · {self._what}"[:160])
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
        print(text, flush=True)

    def task_done(self) -> None:
        self.done += 1
        self.stage(self._what)
