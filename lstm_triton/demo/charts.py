"""Charts as SVG text. Colours and font come from the page's CSS variables, so one picture serves light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 640


@dataclass(frozen=True)
class Line:
    """A curve: its name, points (x, y) and the CSS class that gives its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True)
class Bar:
    """A bar with a whisker from `low` to `high`, in one group."""

    group: str
    name: str
    value: float
    low: float
    high: float
    style: str


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], level: float, level_name: str) -> str:
    """Curves over x, both axes from zero, with a dashed horizontal line at `level`."""
    height, left, right, top, bottom = 360, 56, 16, 44, 60
    x_ticks = _ticks(max((x for line in lines for x, _ in line.points), default=1.0))
    y_ticks = _ticks(max([level, *(y for line in lines for _, y in line.points if math.isfinite(y))]))
    x_max = max((x for line in lines for x, _ in line.points), default=x_ticks[-1]) or 1.0

    def px(x: float) -> float:
        return left + (WIDTH - left - right) * x / x_max

    def py(y: float) -> float:
        return height - bottom - (height - top - bottom) * y / y_ticks[-1]

    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(_text(left - 8, py(tick) + 6, _number(tick), "end"))
    parts += [_text(px(tick), height - bottom + 24, _number(tick), "middle") for tick in x_ticks if tick <= x_max]
    parts.append(_text((left + WIDTH - right) / 2, height - 8, x_label, "middle"))
    parts.append(_text(4, 20, y_label, "start"))
    parts.append(f'<line class="level" x1="{left}" x2="{WIDTH - right}" y1="{py(level):.1f}" y2="{py(level):.1f}"/>')
    parts.append(_text(WIDTH - right, py(level) - 7, level_name, "end"))
    for line in lines:
        points = [(px(x), py(y)) for x, y in line.points if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        parts += [f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
    return _svg(title, height, parts)


def bar_chart(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from zero, grouped, the value written behind each."""
    step, bar_height, head, left, right = 54, 16, 36, 4, 150
    longest = max((bar.high for bar in bars), default=1.0) or 1.0
    scale = (WIDTH - left - right) / longest
    parts = []
    y = 0.0
    group = None
    for bar in bars:
        if bar.group != group:
            group = bar.group
            parts.append(f'<text class="head" x="{left}" y="{y + 24:.0f}">{escape(group)}</text>')
            y += head
        parts.append(_text(left, y + 20, bar.name, "start"))
        middle = y + 28 + bar_height / 2
        parts.append(
            f'<rect class="{bar.style}" x="{left}" y="{y + 28:.0f}" width="{max(bar.value * scale, 1):.1f}" '
            f'height="{bar_height}" rx="2"/>'
            f'<line class="whisker" x1="{left + bar.low * scale:.1f}" x2="{left + bar.high * scale:.1f}" '
            f'y1="{middle:.0f}" y2="{middle:.0f}"/>'
        )
        end = left + max(bar.value, bar.high) * scale
        parts.append(_text(end + 8, middle + 6, f"{bar.value:,.{0 if bar.value >= 100 else 1}f} {unit}", "start"))
        y += step
    return _svg(title, math.ceil(y) + 6, parts)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">\n{body}\n</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(largest: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least `largest`."""
    raw = largest / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    return [step * k for k in range(math.ceil(largest / step - 1e-9) + 1)]


def _number(value: float) -> str:
    for size, suffix in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
