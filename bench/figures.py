"""Figures as SVG text, by matplotlib. Colours are the page's CSS variables, so one picture serves light and dark."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from pandas import DataFrame

from .rows import number

# What figures.mplstyle draws in, and the variables of page.html that take its place.
_VARIABLES = dict(zip((f"#0{k}0{k}0{k}" for k in range(1, 10)), "text quiet rule s0 s1 s2 s3 s4 s5".split()))
matplotlib.rc_file(Path(__file__).with_name("figures.mplstyle"))


def curves(
    labels: tuple[str, str, str], series: DataFrame, level: tuple[float, str] | None = None, log: bool = True
) -> Markup:
    """Named curves, the columns, of y by the index x, with axes that they fill, and a named line at a level of y; empty without
    points.

    labels: of the picture, of x, of y. A series without points keeps its look for a picture beside this one, and is not drawn.
    """
    series = series.sort_index().dropna(how="all")
    if not len(series):
        return Markup("")
    figure = Figure((4.7, 3.5 + 0.2 * ((series.shape[1] + 1) // 2)), layout="constrained")
    axes: Any = figure.subplots()
    for name, points in series.items():
        points = points.dropna()
        axes.plot(points.index, points, label=name if len(points) else "_", clip_on=False)
    if level is not None:
        axes.axhline(level[0], color="#010101", linewidth=1, linestyle=(0, (6, 4)))
        place = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="bottom")
        axes.annotate(level[1], (1, level[0]), (-4, 4), **place)
    if log:
        axes.loglog()
        axes.minorticks_off()
        x_range, y_range = series.index[-1] / series.index[0], series.max().max() / series.min().min()
        axes.xaxis.set_major_locator(LogLocator(2 if x_range < 64 else 4 if x_range < 4096 else 10))
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if y_range > 20 else (1, 1.5, 2, 3, 5, 7)))
    else:
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.locator_params("x", nbins=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_xlabel(labels[1])
    axes.set_title(labels[2])
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, labels[0])


def _svg(figure: Any, title: str) -> Markup:
    """The picture as an element of the page, as wide as there is room."""
    target = io.StringIO()
    figure.savefig(
        target, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = target.getvalue().partition("<svg ")[2]
    svg = re.sub(r'<style.*?</style>|\s?xmlns(:xlink)?="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in all figures of a page
    for ink, name in _VARIABLES.items():
        svg = svg.replace(ink, f"var(--{name})")
    return Markup('<svg class="chart" role="img" aria-label="{}" ').format(title) + Markup(svg)
