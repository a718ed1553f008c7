"""Charts as SVG text. Colours and fonts come from the page's CSS variables, so one picture serves light and dark.

Series differ in colour, dash and marker alike: no one needs the colours to tell them apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 640
STYLES = 6  # s0 ... s5 in the style sheet

_MARKERS = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
    lambda x, y: f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 6:.1f} l6 10.5 h-12 z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 6.5:.1f} l6.5 6.5 l-6.5 6.5 l-6.5 -6.5 z"/>',
    lambda x, y: f'<path d="M{x - 5:.1f} {y - 5:.1f} l10 10 m0 -10 l-10 10" class="cross"/>',
    lambda x, y: f'<path d="M{x:.1f} {y + 6:.1f} l6 -10.5 h-12 z"/>',
)


@dataclass(frozen=True)
class Series:
    """A named curve: points (x, y), y > 0; style: 0 ... STYLES - 1."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int


@dataclass(frozen=True)
class Bar:
    """A named ratio, with what to write behind it."""

    name: str
    value: float
    text: str


def lines(title: str, x_label: str, y_label: str, series: Sequence[Series], level: float | None = None) -> str:
    """Curves on two logarithmic axes, a tick at every x that occurs, with a dashed line at y = `level`."""
    height, left, right, top, bottom = 380, 62, 22, 40, 62
    xs = sorted({x for s in series for x, _ in s.points})
    ys = [y for s in series for _, y in s.points] + ([level] if level else [])
    x_low, x_high = xs[0], xs[-1]
    y_ticks = _ticks(min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        share = math.log(x / x_low) / math.log(x_high / x_low) if x_high > x_low else 0.5
        return left + (WIDTH - left - right) * share

    def py(y: float) -> float:
        return height - bottom - (height - top - bottom) * math.log(y / y_low) / math.log(y_high / y_low)

    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(_text(left - 8, py(tick) + 5, f"{tick:g}", "end"))
    free = -math.inf  # labels as wide as on a narrow page, where letters are larger
    for x in xs:
        label = f"{x:g}"
        half = 6.5 * len(label)
        if px(x) - half >= free:
            middle = min(px(x), WIDTH - half)
            parts.append(_text(middle, height - bottom + 24, label, "middle"))
            free = middle + half + 8
    parts.append(_text((left + WIDTH - right) / 2, height - 10, x_label, "middle"))
    parts.append(_text(4, 18, y_label, "start"))
    if level:
        parts.append(
            f'<line class="level" x1="{left}" x2="{WIDTH - right}" y1="{py(level):.1f}" y2="{py(level):.1f}"/>'
        )
    for s in series:
        points = sorted((px(x), py(y)) for x, y in s.points)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<g class="s{s.style}"><polyline points="{path}"/>')
        parts += [_MARKERS[s.style](x, y) for x, y in points]
        parts.append("</g>")
    return _svg(title, height, parts) + key(series)


def key(series: Sequence[Series]) -> str:
    """The legend, as HTML beneath the picture: it wraps on a narrow page."""
    entries = []
    for s in series:
        picture = f'<g class="s{s.style}"><polyline points="2,8 34,8"/>{_MARKERS[s.style](18, 8)}</g>'
        entries.append(
            f'<span class="key"><svg viewBox="0 0 36 16" aria-hidden="true">{picture}</svg>{escape(s.name)}</span>'
        )
    return f'<p class="keys">{" ".join(entries)}</p>'


def ratios(bars: Sequence[Bar], ahead: str, behind: str) -> str:
    """Horizontal bars from 1 on a logarithmic scale: to the right what is ahead, to the left, hatched, what is behind.

    HTML rather than SVG, so that long names wrap on a narrow page.
    """
    largest = max([2.0, *(max(b.value, 1 / b.value) for b in bars)])
    parts = [f'<div class="sides"><span>◂ {escape(behind)}</span><span>{escape(ahead)} ▸</span></div>']
    for bar in bars:
        share = max(
            36 * abs(math.log(bar.value)) / math.log(largest), 0.4
        )  # percent of the width; the rest is for the figure
        text = f"<span>{escape(bar.text)}</span>"
        if bar.value >= 1:
            inner = (
                f'<i class="ahead" style="left:50%;width:{share:.1f}%"></i><b style="left:{50 + share:.1f}%">{text}</b>'
            )
        else:
            inner = f'<i class="behind" style="left:{50 - share:.1f}%;width:{share:.1f}%"></i>'
            inner += f'<b class="left" style="right:{50 + share:.1f}%">{text}</b>'
        parts.append(f'<div class="bar"><div>{escape(bar.name)}</div><div class="track">{inner}</div></div>')
    return f'<div class="bars">{"".join(parts)}</div>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers 1, 2, 5 x 10^k that enclose the range; at most eight of them, then only powers of ten."""
    first = math.floor(math.log10(low)) - 1
    last = math.ceil(math.log10(high)) + 1
    for steps in ((1, 2, 5), (1,)):
        found = [round(m * 10.0**k, 12) for k in range(first, last + 1) for m in steps]
        below = max((t for t in found if t <= low * 1.0001), default=found[0])
        above = min((t for t in found if t >= high * 0.9999 and t > below), default=found[-1])
        found = [t for t in found if below <= t <= above]
        if len(found) <= 8:
            break
    return found


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">\n{body}\n</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
