"""Figures as SVG text, by matplotlib. Colours are the page's CSS variables, so one picture serves light and dark.

Series differ in colour, dash and marker alike: no one needs the colours to tell them apart.
"""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

Points = Sequence[tuple[float, float]]
# What matplotlib draws in, and the variables of page.html that take its place.
_INKS = {"#010101": "text", "#020202": "quiet", "#030303": "rule"} | {f"#04040{k}": f"s{k}" for k in range(8)}
_HEX = {name: ink for ink, name in _INKS.items()}
_MARKERS, _DASHES = "os^DXvP*", ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1)))
_STYLE: dict[str, Any] = {
    "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "lstm_triton", "text.color": _HEX["text"],
    "axes.labelcolor": _HEX["quiet"], "axes.edgecolor": _HEX["rule"], "axes.titlesize": 11, "xtick.color": _HEX["quiet"],
    "ytick.color": _HEX["quiet"], "grid.color": _HEX["rule"], "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 10,
}  # fmt: skip
_numbers = itertools.count()


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(_STYLE)
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, title: str) -> Markup:
    """The picture as an element of the page, as wide as there is room."""
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(id="|#)(?=[a-z]+[0-9a-f]{9,})', rf"\1f{next(_numbers)}", svg)  # unique on a page of many figures
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for ink, name in _INKS.items():
        svg = svg.replace(ink, f"var(--{name})")
    label = Markup('<svg class="chart" role="img" aria-label="{}" ').format(title)
    return label + Markup(svg[len("<svg ") :])


def curves(title: str, x_label: str, y_label: str, series: Mapping[str, Points], *, level: float | None = None,
           level_name: str = "", logarithmic: bool = True) -> Markup:  # fmt: skip
    """Named curves of points (x, y) with axes that they fill, and a line at y = `level`; empty without points."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if not any(len(points) for points in series.values()):
        return Markup("")
    figure, axes = _axes(4.7, 3.5 + 0.2 * ((len(series) + 1) // 2))
    for k, (name, points) in enumerate(series.items()):
        if not len(points):  # it keeps its colour for the picture beside this one
            continue
        style = dict(color=_HEX[f"s{k % 8}"], marker=_MARKERS[k % 8], linestyle=_DASHES[k % 8])
        axes.plot(*zip(*sorted(points)), label=name, markersize=5, linewidth=1.8, **style)
    if level is not None:
        axes.axhline(level, color=_HEX["text"], linewidth=1, linestyle=(0, (6, 4)))
        axes.annotate(level_name, (1, level), (0, 3), ("axes fraction", "data"), "offset points", ha="right")
    if logarithmic:
        axes.loglog()
        axes.minorticks_off()
        xs = sorted({x for points in series.values() for x, _ in points})
        axes.xaxis.set_major_locator(LogLocator(2 if xs[-1] < 64 * xs[0] else 4 if xs[-1] < 4096 * xs[0] else 10))
        ys = [y for points in series.values() for _, y in points]
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if max(ys) > 20 * min(ys) else (1, 1.5, 2, 3, 5, 7)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.locator_params("x", nbins=5)
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left", color=_HEX["quiet"])
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, title)


def _short(value: float) -> str:
    sizes = ((1e6, " M"), (1e3, " k"), (1, ""))
    return next((f"{value / size:g}{unit}" for size, unit in sizes if abs(value) >= size), f"{value:g}")


def bars(title: str, values: Sequence[tuple[str, float, float, float, str]], *, ratio: bool = False) -> Markup:
    """Horizontal bars of (name, value, low, high, text), each with its name above and its text behind it.

    From 0 to the value, with a whisker from low to high; a ratio from 1, on a logarithmic scale, hatched below 1.
    """
    import math

    figure, axes = _axes(6.5, 0.25 + 0.5 * len(values))
    axes.grid(False)
    axes.axis("off")
    lengths = [math.log2(v) if ratio else v for _, v, _, _, _ in values]
    most = max([*map(abs, lengths), *(high for _, _, _, high, _ in values if not ratio), 1e-9])
    for y, ((name, value, low, high, text), length) in enumerate(zip(values, lengths)):
        ahead = value >= 1 or not ratio
        look = dict(color=_HEX["s0"]) if ahead else dict(facecolor="none", edgecolor=_HEX["s1"], hatch="////")
        axes.barh(y, length, height=0.34, **look)
        if not ratio:
            axes.plot([low, high], [y, y], color=_HEX["text"], linewidth=1.5)
        end = length if ratio else max(length, high)
        axes.annotate(f" {text} ", (end, y), va="center", ha="left" if ahead else "right")
        axes.annotate(name, (0, y), (0, 9), ("axes fraction", "data"), "offset points", va="bottom")
    axes.axvline(0, color=_HEX["text"], linewidth=1)
    axes.set_xlim(-1.3 * most if ratio else 0, 1.3 * most)
    axes.set_ylim(len(values) - 0.6, -0.9)
    return _svg(figure, title)
