"""Figures as SVG text, by matplotlib. Colours are the page's CSS variables, so one picture serves light and dark.

Series differ in colour, dash and marker alike: no one needs the colours to tell them apart.
"""

import io
import itertools
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

# What matplotlib draws in, and the variables of page.html that take its place.
TEXT, QUIET, RULE, *SERIES = (f"#0{k}0{k}0{k}" for k in range(1, 10))
_VARIABLES = {TEXT: "text", QUIET: "quiet", RULE: "rule"} | {ink: f"s{k}" for k, ink in enumerate(SERIES)}
_LOOKS = list(zip(SERIES, "os^DXv", ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))))
_numbers = itertools.count()
matplotlib.rc("font", size=11)
matplotlib.rc("svg", fonttype="none", hashsalt="lstm_triton")
matplotlib.rc("text", color=TEXT)
matplotlib.rc("axes", labelcolor=QUIET, edgecolor=RULE, titlesize=11, grid=True, axisbelow=True)
matplotlib.rc("axes.spines", top=False, right=False)
matplotlib.rc("xtick", color=QUIET)
matplotlib.rc("ytick", color=QUIET)
matplotlib.rc("grid", color=RULE)
matplotlib.rc("legend", frameon=False, fontsize=10)


def curves(
    labels: tuple[str, str, str],
    series: Mapping[str, Mapping[float, float]],
    level: tuple[float, str] | None = None,
    log: bool = True,
) -> Markup:
    """Named curves of y by x with axes that they fill, and a named line at a level of y; empty without points.

    labels: of the picture, of x, of y. A series without points keeps its look for a picture beside this one, and is not drawn.
    """
    everything = [point for points in series.values() for point in points.items()]
    if not everything:
        return Markup("")
    figure = Figure((4.7, 3.5 + 0.2 * ((len(series) + 1) // 2)), layout="constrained")
    axes: Any = figure.subplots()
    for (name, points), (ink, marker, dash) in zip(series.items(), itertools.cycle(_LOOKS)):
        if points:
            style = dict(color=ink, marker=marker, linestyle=dash, markersize=5, linewidth=1.8, clip_on=False)
            axes.plot(*zip(*sorted(points.items())), label=name, **style)
    if level is not None:
        axes.axhline(level[0], color=TEXT, linewidth=1, linestyle=(0, (6, 4)))
        place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="bottom")
        axes.annotate(level[1], (1, level[0]), (-4, 4), **place)
    if log:
        axes.loglog()
        axes.minorticks_off()
        x_range, y_range = (max(values) / min(values) for values in zip(*everything))
        axes.xaxis.set_major_locator(LogLocator(2 if x_range < 64 else 4 if x_range < 4096 else 10))
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if y_range > 20 else (1, 1.5, 2, 3, 5, 7)))
    else:
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.locator_params("x", nbins=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_xlabel(labels[1])
    axes.set_title(labels[2], loc="left", color=QUIET)
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, labels[0])


def _short(value: float) -> str:
    size, unit = (1e6, " M") if abs(value) >= 1e6 else (1e3, " k") if abs(value) >= 1e4 else (1, "")
    return f"{value / size:g}{unit}"


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
