"""The report, and the tables of Markdown pages: everything in them comes from rows."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from pandas import DataFrame

from lstm_triton.storage import unfinished

from . import figures, tables
from .cases import require
from .providers import CUDNN
from .rows import CPU_LABEL, Row, StoreError
from .suites import SUITES
from .tables import WAYS, Comparison

MODES = {"forward": "Forward, evaluation mode", "train": "Training step: forward and backward"}
Figure = tuple[str, list[Any]]  # a caption, and pictures: SVG, or a heading and a table


class Section(NamedTuple):
    """A part of a page. texts: paragraphs. wraps: cells of the table are sentences. command: what reproduces it."""

    title: str
    texts: Iterable[str] = ()
    figures: Sequence[Figure] = ()
    table: DataFrame | None = None
    wraps: bool = False
    note: str = ""
    command: str = ""


class Part(NamedTuple):
    """Sections that belong together: those of one device. note: a caution; about: what they were measured with."""

    sections: Sequence[Section]
    title: str = ""
    note: str = ""
    about: str = ""


def _render(template: str, is_html: bool, **given: Any) -> str:
    environment = jinja2.Environment(autoescape=is_html, trim_blocks=True, lstrip_blocks=True)
    environment.filters["text"] = tables.text
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(given)


def write_page(path: Path, title: str, lead: Sequence[str], parts: Sequence[Part]) -> None:
    """One HTML file, complete in itself, for light and dark, wide and narrow."""
    with unfinished(path) as file:
        file.write_text(_render("page.html", True, title=title, lead=lead, parts=parts), encoding="utf-8")


def write(path: Path, rows: Sequence[Row], problems: Sequence[str] = ()) -> None:
    """The page of all rows; problems: sentences on lines that are none."""
    lead = [
        "Each figure is a median over interleaved, shuffled rounds, taken only after outputs and gradients were compared with "
        "float64. A speed-up is the time of torch.nn.LSTM (on a GPU cuDNN, for cells torch.nn.LSTMCell) over this package's: "
        "above 1 this package is ahead, and ▼ marks where it is not."
    ]
    if problems:
        lead.append(f"{len(problems)} lines of the files are not rows, and left out. The first: {problems[0]}")
    lead += [] if rows else ["There are no rows yet."]
    parts = [_part(machine, of, VIEWS, draws=True) for machine, of in tables.newest(rows).items()]
    write_page(path, "lstm_triton beside cuDNN and others", lead, parts)


def _part(machine: str, rows: Sequence[Row], views: Sequence["View"], dtype: str = "", draws: bool = False) -> Part:
    """One machine's, with its figures or without. dtype: the only one that the headline is to show."""
    last, found = max(rows, key=lambda row: row.date), tables.comparisons(rows)
    found = [c for c in found if not dtype or c.suite != "hidden-sizes" or c.case.dtype == dtype]
    notes = [CPU_LABEL] * (last.device.type == "cpu")
    notes += ["SYNTHETIC rows, made up to test this page: not results"] * any(row.synthetic for row in rows)
    options = f" --device cpu --threads {last.device.threads}" if last.device.type == "cpu" else ""
    options += " --flush-l2" * any(row.l2 == "flushed" for row in rows)
    about = f"torch {last.versions.torch}, triton {last.versions.triton}, {last.date[:10]}, commit {last.source}"
    sections = []
    for suite, table, draw, section in views:
        its = [row for row in rows if suite in ("", row.suite)]
        compared = [c for c in found if suite in ("", c.suite)]
        command = f"lstm-triton bench --suite {suite}{options}" if suite else ""
        note = " ".join(filter(None, (SUITES.get(suite), section.note)))
        drawn = list(draw(compared)) if draw and draws else []
        sections.append(section._replace(note=note, figures=drawn, table=table(its, compared), command=command))
    return Part(sections, machine, "; ".join(notes), about)


def _groups(found: Iterable[Comparison], key: Callable[[Comparison], Any]) -> dict[Any, list[Comparison]]:
    groups: dict[Any, list[Comparison]] = {}
    for c in found:
        groups.setdefault(key(c), []).append(c)
    return groups


def _over(found: Sequence[Comparison], x_name: str) -> Iterator[Figure]:
    """Time per step of cuDNN, these kernels, auto, peers and the floor; beside it torch's time over each."""
    eager = (c for c in found if c.execution == "eager")
    for (dtype, mode), group in _groups(eager, lambda c: (c.case.dtype_name, c.case.mode)).items():
        times: dict[str, dict[float, float]] = {CUDNN: {}, "kernels": {}, "auto": {}}
        floor: dict[float, float] = {}
        for c in group:
            x = float(getattr(c.case, x_name.replace(" ", "_")))
            by: dict[str, Any] = {n: row for n, row in c.rows.items() if not n.startswith("lstm_triton")}
            by |= {way: row for way in WAYS if (row := getattr(c, way))}
            for name, row in by.items():
                times.setdefault(name, {})[x] = row.timing.us_per_step
                floor |= {x: row.floor.us_per_step} if row.floor else {}
        torchs, case = times[CUDNN], group[0].case
        ratios = {name: {x: torchs[x] / us for x, us in of.items() if x in torchs} for name, of in times.items()}
        size = f"hidden size {case.hidden_size}" if x_name == "length" else f"{case.length} steps"
        title, beside = f"{MODES[mode]}, {dtype}; batch {case.batch}, {size}", f"{CUDNN}'s time over theirs"
        step = figures.curves((f"{title}: time", x_name, "microseconds per step"), times | {"floor": floor})
        ratio = figures.curves((f"{title}: speed-up", x_name, beside), ratios | {CUDNN: {}}, (1, ""))
        yield f"{title}.", [step, ratio]


def _heat(found: Sequence[Comparison]) -> Iterator[Figure]:
    """Speed-ups by hidden size and batch."""
    for way in WAYS:
        known = [c for c in found if c.ratio(way) is not None]
        for dtype, group in _groups(known, lambda c: c.case.dtype_name).items():
            pictures = []
            for (mode, execution), part in _groups(group, lambda c: (c.case.mode, c.execution)).items():
                cells = [{"H \\ B": c.case.hidden_size, "B": c.case.batch, "x": c.ratio(way)} for c in part]
                table = DataFrame(cells).pivot(index="H \\ B", columns="B", values="x")
                pictures.append((f"{MODES[mode]}: {execution}", table))
            steps = group[0].case.length
            yield f"Speed-up, {dtype}, {steps} step{'s' * (steps > 1)}. ▲ ahead, ▼ behind. {_meaning(way)}", pictures


def _meaning(*ways: str) -> str:
    return " ".join(f"{way.capitalize()}: {WAYS[way]}." for way in ways)


# A section of the page, and a table of Markdown pages: the suite whose rows it shows, or ""; table; figures; all else.
View = tuple[str, Callable[..., DataFrame], Callable[[Sequence[Comparison]], Iterator[Figure]] | None, Section]
_BOTH = _meaning(*WAYS)
_KERNELS = functools.partial(tables.lost, ways=("kernels",), theirs=CUDNN)
_FROM_PADDED = functools.partial(tables.timings, base="padded")
_H, _T = functools.partial(_over, x_name="hidden size"), functools.partial(_over, x_name="length")
VIEWS: Sequence[View] = (
    ("hidden-sizes", tables.timings, _H, Section("Time per step against hidden size", note=_BOTH)),
    ("", tables.count_lost, None, Section("Comparisons that torch wins")),
    ("", _KERNELS, None, Section("Where cuDNN still wins", note=_meaning("kernels"), wraps=True)),
    ("batch", tables.timings, _heat, Section("Hidden size by batch")),
    ("length", tables.timings, _T, Section("Scaling in the number of steps", note=_BOTH)),
    ("cell", tables.timings, _heat, Section("One step: the cell")),
    ("step", tables.timings, None, Section("One step a call, the state carried")),
    ("real", tables.timings, None, Section("LSTMs that people run", note=_BOTH)),
    ("real", tables.sources, None, Section("Sources of their shapes", wraps=True)),
    ("features", _FROM_PADDED, None, Section("What features cost")),
    ("segments", tables.timings, None, Section("Beside what torch alone can do")),
    ("memory", tables.readings, None, Section("Memory of a training step")),
    ("accuracy", tables.readings, None, Section("Accuracy against float64")),
    ("overhead", tables.readings, None, Section("Host time of a call")),
    ("cold-start", tables.readings, None, Section("The first call", wraps=True)),
    ("", tables.lost, None, Section("Where torch is ahead, the worst first", note=_BOTH, wraps=True)),
    ("", tables.not_timed, None, Section("Not timed: wrong, failed, skipped", wraps=True)),
    ("roofs", tables.readings, None, Section("Roofs and floors", wraps=True)),
    ("", tables.environment, None, Section("Environment and drift", wraps=True)),
)


def compare(sides: Sequence[tuple[Path, Sequence[Row]]], page: Path | None) -> str:
    """Two sets of rows side by side, as text, and as a page where a path of one is given."""
    table, said = tables.side_by_side(*(rows for _, rows in sides))
    lead = []
    for side, (path, rows) in zip("AB", sides):
        commits = sorted({(row.source.commit or row.source.digest)[:10] for row in rows})
        devices = ", ".join(sorted({row.device.name for row in rows}))
        lead.append(f"{side}: {path.stem} ({devices}; {', '.join(commits[:3])})")
    lead += ["A / B above 1: B is faster.", said]
    if page:
        write_page(page, "lstm_triton: two sets of rows", lead, [Part([Section("Both sides", table=table)])])
    return "\n\n".join(["\n".join(lead), tables.plain(table)])


_WRITTEN = (
    r"(<!-- (benchmark(?: summary)?): begin \(written by lstm-triton bench --readme\) -->\n).*?(<!-- \2: end -->)"
)


def update_markdown(path: Path, rows: Sequence[Row]) -> None:
    """Replace what stands between the markers of a file: the summary's, those of all tables, or both.

    Raises StoreError: no such file, or no pair of markers in it; rows that are synthetic.
    """
    made_up = any(row.synthetic for row in rows)
    require({"synthetic rows are no results: they do not go into a README": not made_up}, StoreError)
    try:
        written = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error

    def tables_of(match: re.Match) -> str:
        return f"{match[1]}\n{markdown(rows, 'summary' in match[2])}\n{match[3]}"

    written, count = re.subn(_WRITTEN, tables_of, written, flags=re.DOTALL)
    begin, end = "<!-- benchmark: begin (written by lstm-triton bench --readme) -->", "<!-- benchmark: end -->"
    require({f"{path} needs one line\n{begin}\nand one line\n{end}": count}, StoreError)
    with unfinished(path) as file:
        file.write_text(written, encoding="utf-8")


def markdown(rows: Sequence[Row], short: bool = False) -> str:
    """The tables of every device; short: of the headline only the first dtype, and how many comparisons are lost."""
    dtypes = {row.case.dtype for row in rows if row.suite == "hidden-sizes"}
    dtype = "bfloat16" if "bfloat16" in dtypes else min(dtypes, default="")
    views, only = (VIEWS[:2], dtype) if short else (VIEWS, "")
    return _render("tables.md", False, parts=[_part(*of, views, only) for of in tables.newest(rows).items()])
