"""The report, its figures as SVG text, and the tables of Markdown pages: everything in them comes from rows."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.figure
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator
from pandas import DataFrame, Series

from lstm_triton.storage import unfinished

from . import tables
from .cases import HERE, SUITES, UsageError, require
from .providers import CUDNN
from .rows import CPU_LABEL, Row, number
from .tables import WAYS

# What figures.mplstyle draws in, and the variables of page.html that take its place: one picture serves light and dark.
_INKS = dict(zip((f"#0{k}0{k}0{k}" for k in range(1, 10)), "text quiet rule s0 s1 s2 s3 s4 s5".split()))
matplotlib.rc_file(HERE / "figures.mplstyle")
Figure = tuple[str, list[Any]]  # a caption, and pictures: SVG, or a heading and a table
# The sections, in order. table: a function of `tables`, of the rows of that suite, or of all; ways: of WAYS, to be explained.
LEAD, MODES, VIEWS = json.loads((HERE / "page.json").read_text(encoding="utf-8")).values()


def _render(template: str, is_html: bool, **given: Any) -> str:
    environment = jinja2.Environment(autoescape=is_html, trim_blocks=True, lstrip_blocks=True)
    environment.filters["text"] = tables.text
    return environment.from_string((HERE / template).read_text(encoding="utf-8")).render(given)


def write_page(path: Path, title: str, lead: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> None:
    """Write one HTML file, complete in itself, for light and dark, wide and narrow. A part, such as a device's, has sections
    and perhaps a title, and a note that cautions. A section has a title and some of: note; texts, its paragraphs; figures,
    pairs of a caption and pictures; table, a DataFrame; wraps, where cells are sentences; command, which reproduces it."""
    with unfinished(path) as file:
        file.write_text(_render("page.html", True, title=title, lead=lead, parts=parts), encoding="utf-8")


def write(path: Path, rows: Sequence[Row], problems: Sequence[str] = ()) -> None:
    """Write the page of all rows; problems: sentences on lines that are none."""
    lead = [LEAD] + ["There are no rows yet."] * (not rows)
    lead += [f"{len(problems)} lines of the files are not rows, and left out. The first: {of}" for of in problems[:1]]
    parts = [_part(machine, of, VIEWS, draws=True) for machine, of in tables.newest(rows).items()]
    write_page(path, "lstm_triton beside cuDNN and others", lead, parts)


def _part(
    machine: str, rows: Sequence[Row], views: Sequence[dict], dtype: str = "", draws: bool = False
) -> dict[str, Any]:
    """Return one machine's part, with its figures or without. dtype: the only one that the headline is to show."""
    last, found = max(rows, key=lambda row: row.date), tables.comparisons(rows)
    if dtype:
        found = found[(found["suite"] != "hidden-sizes") | (found["dtype"] == dtype)]
    notes = [CPU_LABEL] * (last.device.type == "cpu")
    notes += ["SYNTHETIC rows, made up to test this page: not results"] * any(row.synthetic for row in rows)
    options = f" --device cpu --threads {last.device.threads}" if last.device.type == "cpu" else ""
    options += " --flush-l2" * any(row.l2 == "flushed" for row in rows)
    about = f"torch {last.versions.torch}, triton {last.versions.triton}, {last.date[:10]}, commit {last.source}"
    sections = []
    for view in views:
        suite, figure = view.get("suite", ""), view.get("figure") if draws else None
        compared = found[found["suite"] == suite] if suite else found
        its = [row for row in rows if suite in ("", row.suite)]
        table = getattr(tables, view["table"])(its, compared, **view.get("options", {}))
        drawn = list(_heat(compared) if figure == "heat map" else _over(compared, figure) if figure else ())
        note = " ".join(
            [SUITES.get(suite, ""), *(f"{way.capitalize()}: {WAYS[way]}." for way in view.get("ways", ()))]
        ).strip()
        command = f"lstm-triton bench --suite {suite}{options}" if suite else ""
        sections.append(view | dict(note=note, figures=drawn, table=table, command=command))
    return dict(title=machine, note="; ".join(notes), about=about, sections=sections)


def _over(found: DataFrame, x: str) -> Iterator[Figure]:
    """Draw the time per step of cuDNN, these kernels, auto, peers and the floor, and beside it torch's time over each."""
    for (dtype, mode), group in found[found["execution"] == "eager"].groupby(["dtype", "mode"], sort=False):
        others = [name for name in group["of"].unique() if not name.startswith("lstm_triton")]
        times = group.pivot_table("us", x, "of", "last").reindex(columns=dict.fromkeys([CUDNN, *WAYS, *others]))
        ratios = times.rdiv(times[CUDNN], axis="index").assign(**{CUDNN: None})
        floors = {at: row.floor.us_per_step for at, row in zip(group[x], group["row"]) if row.floor}
        times["floor"] = Series(floors, dtype=float)
        first = group.iloc[0]
        size = f"hidden size {first['hidden size']}" if x == "length" else f"{first['length']} steps"
        title, beside = f"{MODES[mode]}, {dtype}; batch {first['batch']}, {size}", f"{CUDNN}'s time over theirs"
        step = curves((f"{title}: time", x, "microseconds per step"), times)
        yield f"{title}.", [step, curves((f"{title}: speed-up", x, beside), ratios, (1, ""))]


def _heat(found: DataFrame) -> Iterator[Figure]:
    """Show speed-ups by hidden size and batch."""
    points = found[found["of"].isin(WAYS)].rename(columns={"hidden size": "H \\ B"}).dropna(subset="ratio")
    for (way, dtype, steps), group in points.groupby(["of", "dtype", "length"], sort=False):
        pictures = [
            (f"{MODES[mode]}: {execution}", part.pivot_table("ratio", "H \\ B", "batch", "last"))
            for (mode, execution), part in group.groupby(["mode", "execution"], sort=False)
        ]
        about = f"{steps} step{'s' * (steps > 1)}. ▲ ahead, ▼ behind. {way.capitalize()}: {WAYS[way]}."
        yield f"Speed-up, {dtype}, {about}", pictures


def curves(
    labels: Sequence[str], series: DataFrame, level: tuple[float, str] | None = None, log: bool = True
) -> Markup:
    """Draw named curves, the columns, of y by the index x, with axes that they fill, and a named line at a level of y; empty
    without points. labels: of the picture, of x, of y. A series without points keeps its look for a picture beside this one,
    and is not drawn."""
    series = series.sort_index().dropna(how="all")
    if not len(series):
        return Markup("")
    figure = matplotlib.figure.Figure((4.7, 3.5 + 0.2 * ((series.shape[1] + 1) // 2)), layout="constrained")
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
    """Return the picture as an element of the page, as wide as there is room."""
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True)
    svg = target.getvalue().partition("<svg ")[2]
    svg = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|\s?xmlns(:xlink)?="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in all figures of a page
    for ink, name in _INKS.items():
        svg = svg.replace(ink, f"var(--{name})")
    return Markup('<svg class="chart" role="img" aria-label="{}" ').format(title) + Markup(svg)


def compare(sides: Sequence[tuple[Path, Sequence[Row]]], page: Path | None) -> str:
    """Return two sets of rows side by side, as text; also write them as a page where its path is given."""
    table, said = tables.side_by_side(*(rows for _, rows in sides))
    lead = []
    for side, (path, rows) in zip("AB", sides):
        commits = sorted({(row.source.commit or row.source.digest)[:10] for row in rows})
        devices = ", ".join(sorted({row.device.name for row in rows}))
        lead.append(f"{side}: {path.stem} ({devices}; {', '.join(commits[:3])})")
    lead += ["A / B above 1: B is faster.", said]
    if page:
        write_page(
            page, "lstm_triton: two sets of rows", lead, [dict(sections=[dict(title="Both sides", table=table)])]
        )
    plain = table.map(tables.text).reset_index().to_string(index=False, justify="left") if len(table) else ""
    return "\n".join([*lead, "", plain])


_WRITTEN = r"(<!-- (benchmark(?: summary)?): begin \(written by \S+ bench --readme\) -->\n).*?(<!-- \2: end -->)"


def update_markdown(path: Path, rows: Sequence[Row]) -> None:
    """Replace what stands between the markers of a file. Raises UsageError: no such file, no markers, synthetic rows."""
    made_up = any(row.synthetic for row in rows)
    require({"synthetic rows are no results: they do not go into a README": not made_up}, UsageError)
    try:
        written = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error

    def tables_of(match: re.Match) -> str:
        return f"{match[1]}\n{markdown(rows, 'summary' in match[2])}\n{match[3]}"

    written, count = re.subn(_WRITTEN, tables_of, written, flags=re.DOTALL)
    begin, end = "<!-- benchmark: begin (written by lstm-triton bench --readme) -->", "<!-- benchmark: end -->"
    require({f"{path} needs one line\n{begin}\nand one line\n{end}": count}, UsageError)
    with unfinished(path) as file:
        file.write_text(written, encoding="utf-8")


def markdown(rows: Sequence[Row], short: bool = False) -> str:
    """Return the tables of every device. short: only the headline of one dtype, and how many comparisons are lost."""
    dtypes = {row.case.dtype for row in rows if row.suite == "hidden-sizes"}
    dtype = "bfloat16" if "bfloat16" in dtypes else min(dtypes, default="")
    views, only = (VIEWS[:2], dtype) if short else (VIEWS, "")
    return _render("tables.md", False, parts=[_part(*of, views, only) for of in tables.newest(rows).items()])
