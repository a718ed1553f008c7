"""Figures as SVG text, by matplotlib. Colours are the page's CSS variables, so one picture serves light and dark.

Series differ in colour, dash and marker alike: no one needs the colours to tell them apart.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

Points = Sequence[tuple[float, float]]
# What matplotlib draws in, and the variables of page.html that take its place.
TEXT, QUIET, RULE, *SERIES = (f"#0{k}0{k}0{k}" for k in range(1, 10))
_VARIABLES = {TEXT: "text", QUIET: "quiet", RULE: "rule"} | {ink: f"s{k}" for k, ink in enumerate(SERIES)}
_LOOKS = list(zip(SERIES, "os^DXv", ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))))
_STYLE: dict[str, Any] = {
    "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "lstm_triton", "text.color": TEXT, "axes.labelcolor": QUIET,
    "axes.edgecolor": RULE, "axes.titlesize": 11, "xtick.color": QUIET, "ytick.color": QUIET, "grid.color": RULE,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 10,
}  # fmt: skip
_numbers = itertools.count()


def _axes(width: float, height: float) -> tuple[Any, Any]:
    matplotlib.rcParams.update(_STYLE)
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, title: str) -> Markup:
    """The picture as an element of the page, as wide as there is room."""
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True)
    svg = target.getvalue().partition("<svg ")[2]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|\s?xmlns(:xlink)?="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(id="|#)(?=[a-z]+[0-9a-f]{9,})', rf"\1f{next(_numbers)}", svg)  # unique on a page of many figures
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for ink, name in _VARIABLES.items():
        svg = svg.replace(ink, f"var(--{name})")
    return Markup('<svg class="chart" role="img" aria-label="{}" ').format(title) + Markup(svg)


def curves(title: str, x_label: str, y_label: str, series: Mapping[str, Points], *, level: float | None = None,
           level_name: str = "", logarithmic: bool = True) -> Markup:  # fmt: skip
    """Named curves of points (x, y) with axes that they fill, and a line at y = `level`; empty without points.

    A series without points keeps its look for a picture beside this one, and is not drawn.
    """
    everything = [point for points in series.values() for point in points]
    if not everything:
        return Markup("")
    figure, axes = _axes(4.7, 3.5 + 0.2 * ((len(series) + 1) // 2))
    for (name, points), (ink, marker, dash) in zip(series.items(), itertools.cycle(_LOOKS)):
        if points:
            style = dict(color=ink, marker=marker, linestyle=dash, markersize=5, linewidth=1.8)
            axes.plot(*zip(*sorted(points)), label=name, **style)
    if level is not None:
        axes.axhline(level, color=TEXT, linewidth=1, linestyle=(0, (6, 4)))
        axes.annotate(level_name, (0, level), (4, -4), ("axes fraction", "data"), "offset points", va="top")
    if logarithmic:
        axes.loglog()
        axes.minorticks_off()
        x_range, y_range = (max(values) / min(values) for values in zip(*everything))
        axes.xaxis.set_major_locator(LogLocator(2 if x_range < 64 else 4 if x_range < 4096 else 10))
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if y_range > 20 else (1, 1.5, 2, 3, 5, 7)))
    else:
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.locator_params("x", nbins=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left", color=QUIET)
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, title)


def _short(value: float) -> str:
    size, unit = (1e6, " M") if abs(value) >= 1e6 else (1e3, " k") if abs(value) >= 1e4 else (1, "")
    return f"{value / size:g}{unit}"


def bars(title: str, values: Sequence[tuple[str, float, float, float, str]], *, ratio: bool = False) -> Markup:
    """Horizontal bars of (name, value, low, high, text), each with its name above and its text behind it.

    From 0 to the value, with a whisker from low to high; a ratio from 1, on a logarithmic scale, hatched below 1.
    """
    figure, axes = _axes(6.5 if ratio else 4.7, 0.25 + 0.5 * len(values))
    axes.grid(False)
    axes.axis("off")
    most = 1e-9
    for y, (name, value, low, high, text) in enumerate(values):
        length, ahead = math.log2(value) if ratio else value, value >= 1 or not ratio
        end = length if ratio else max(length, high)
        most = max(most, abs(end))
        look: dict[str, Any] = (
            dict(color=SERIES[0]) if ahead else dict(facecolor="none", edgecolor=SERIES[1], hatch="////")
        )
        axes.barh(y, length, height=0.34, **look)
        if not ratio:
            axes.plot([low, high], [y, y], color=TEXT, linewidth=1.5)
        axes.annotate(f" {text} ", (end, y), va="center", ha="left" if ahead else "right")
        axes.annotate(name, (0, y), (0, 9), ("axes fraction", "data"), "offset points", va="bottom")
    axes.axvline(0, color=TEXT, linewidth=1)
    axes.set_xlim(-1.3 * most if ratio else 0, 1.3 * most)
    axes.set_ylim(len(values) - 0.6, -0.9)
    return _svg(figure, title)
