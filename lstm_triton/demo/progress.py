"""A progress bar where someone watches, lines where the output goes to a file."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lstm_triton.demo.train import Point


class Progress:
    """Progress through a wall-clock budget of `seconds`, with tokens per second and the latest losses."""

    def __init__(self, seconds: float) -> None:
        self._rate = 0.0
        self._first: tuple[float, int] | None = None
        self._losses = ""
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:  # pip install "lstm-triton[demo]"; lines will do
                return
            form = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
            self._bar = tqdm(total=seconds, bar_format=form, dynamic_ncols=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, seconds: float, tokens: int) -> None:
        """`seconds` of the budget are used, `tokens` were trained on in all."""
        if self._first is None:  # the first update warms up and does not count
            self._first = (seconds, tokens)
        elif seconds > self._first[0]:
            self._rate = (tokens - self._first[1]) / (seconds - self._first[0])
        if self._bar is not None:
            self._bar.set_postfix_str(self._state(), refresh=False)
            self._bar.update(min(seconds, self._bar.total) - self._bar.n)

    def point(self, point: "Point") -> None:
        """A new measurement."""
        self._losses = f" · bits/char: train {point.train_bits:.2f}, validation {point.validation_bits:.2f}"
        if self._bar is not None:
            self._bar.set_postfix_str(self._state())
        else:
            print(f"{point.seconds:6.1f} s · {point.tokens:,} tokens{self._losses}", flush=True)

    def _state(self) -> str:
        return f"{self._rate:,.0f} tokens/s{self._losses}"
