"""The report, and the tables of Markdown pages: everything in them comes from rows."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from pandas import DataFrame

from . import figures, tables, workloads
from .providers import CUDNN
from .rows import CPU_LABEL, Row, StoreError, unfinished

MODES = {"forward": "Forward, evaluation mode", "train": "Training step: forward and backward"}
MEANINGS = {
    "kernels": "Kernels: the fastest of this package's Triton backends that is right, each forced",
    "auto": "Auto: what is taken when no backend is asked for, which may be cuDNN itself",
}


class Section(NamedTuple):
    """A part of a page. command: what reproduces it."""

    id: str
    title: str
    body: Markup
    note: str = ""
    command: str = ""


class Part(NamedTuple):
    """Sections that belong together: those of one device."""

    id: str
    title: str
    note: str
    sections: Sequence[Section]


def write_page(path: Path, title: str, lead: Sequence[str], parts: Sequence[Part]) -> None:
    """One HTML file, complete in itself, for light and dark, wide and narrow."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template)
    with unfinished(path) as file:
        file.write_text(page.render(title=title, lead=lead, parts=parts), encoding="utf-8")


def figure(caption: str, *pictures: Markup) -> Markup:
    shown = Markup("").join(pictures)
    with_caption = Markup('<figure><div class="pictures">{}</div><figcaption>{}</figcaption></figure>')
    return with_caption.format(shown, caption) if shown else shown


def heat(ratio: float) -> Markup:
    """A cell of a table: a speed-up, in full colour at x4 and x1/4."""
    if math.isnan(ratio):
        return Markup("")
    share, (hue, mark) = min(abs(math.log2(ratio)) / 2, 1.0) * 70, ("s0", "▲") if ratio >= 1 else ("s1", "▼")
    cell = Markup('<span class="heat" style="--hue:var(--{});--share:{:.0f}%">{:.2f} {}</span>')
    return cell.format(hue, share, ratio, mark)


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
    machines = enumerate(tables.newest(rows).groupby("machine", sort=False)) if rows else ()
    parts = [_part(f"d{k}", name, table) for k, (name, table) in machines]
    write_page(path, "lstm_triton beside cuDNN and others", lead, parts)


def _part(id: str, name: Any, table: DataFrame) -> Part:
    first: Row = table["row"].iloc[0]
    found = tables.comparisons(table)
    notes = [f"{CPU_LABEL}."] * (first.device.type == "cpu")
    notes += ["SYNTHETIC rows, made up to test this page: not results."] * any(row.synthetic for row in table["row"])
    options = f" --device cpu --threads {first.device.threads}" if first.device.type == "cpu" else ""
    options += " --flush-l2" if any(row.l2 == "flushed" for row in table["row"]) else ""
    sections = []
    for k, view in enumerate(VIEWS):
        shown = tables.html(view.table(view.of(table), view.of(found)), view.texts)
        if pictures := view.draw and view.draw(view.of(found)):
            shown = pictures + Markup("<details><summary>All figures</summary>{}</details>").format(shown)
        command = f"lstm-triton bench --suite {view.suite}{options}" if view.suite else ""
        sections.append(Section(f"{id}-{k}", view.title, shown, view.note, command))
    return Part(id, name, " ".join(notes), sections)


def _over(found: DataFrame, x_name: str) -> Markup:
    """Time per step of cuDNN, these kernels, auto, peers and the floor; beside it torch's time over each."""
    body = Markup("")
    for (dtype, mode), of in found[found["execution"] == "eager"].groupby(["dtype", "mode"], sort=False):
        times: dict[str, list[tuple[float, float]]] = {CUDNN: [], "kernels": [], "auto": []}
        floor: list[tuple[float, float]] = []
        for line in of.itertuples():
            x = float(getattr(line.case, x_name.replace(" ", "_")))
            by = {name: row for name, row in line.rows.items() if not name.startswith("lstm_triton")}
            by |= {way: row for way in tables.WAYS if (row := getattr(line, way)) is not None}
            for name, row in by.items():
                times.setdefault(name, []).append((x, row.timing.us_per_step))
            floor += [(x, row.floor.us_per_step) for row in list(by.values())[:1] if row.floor]
        torchs, case = dict(times[CUDNN]), of["case"].iloc[0]
        ratios = {name: [(x, torchs[x] / us) for x, us in points if x in torchs] for name, points in times.items()}
        size = f"hidden size {case.hidden_size}" if x_name == "length" else f"{case.length} steps"
        title, beside = f"{MODES[mode]}, {dtype}; batch {case.batch}, {size}", f"{CUDNN}'s time over theirs"
        step = figures.curves((f"{title}: time", x_name, "microseconds per step"), times | {"floor": floor})
        ratio = figures.curves((f"{title}: speed-up", x_name, beside), ratios | {CUDNN: []}, (1, ""))
        body += figure(f"{title}.", step, ratio)
    return body


def _heat(found: DataFrame) -> Markup:
    """Speed-ups by hidden size and batch."""
    body = Markup("")
    for way in tables.WAYS:
        for dtype, known in found[found[f"{way}_ratio"].notna()].groupby("dtype", sort=False):
            pictures = []
            for (mode, execution), part in known.groupby(["mode", "execution"], sort=False):
                grid = part.pivot(index="H", columns="B", values=f"{way}_ratio").astype(float).map(heat)
                shown = tables.html(grid.rename_axis(columns=None).rename_axis("H \\ B"))
                pictures.append(Markup("<div>{}: {}{}</div>").format(MODES[mode], execution, shown))
            steps = known["case"].iloc[0].length
            caption = f"Speed-up, {dtype}, {steps} step{'s' * (steps > 1)}. ▲ ahead, ▼ behind. {MEANINGS[way]}."
            body += figure(caption, *pictures)
    return body


def _real(found: DataFrame) -> Markup:
    """The workloads, those first where this package is most ahead."""
    known = {w.id: f"{w.project}: " for w in workloads.load()}
    ratios = [f"{way}_ratio" for way in tables.WAYS]
    lines = [
        {"workload": f"{known.get(line.case.name, '')}{line.case.describe()}{', graph' * (line.execution == 'graph')}"}
        | {f"speed-up of {way}": heat(getattr(line, f"{way}_ratio") or math.nan) for way in tables.WAYS}
        for line in found[found[ratios].notna().any(axis=1)].sort_values(ratios, ascending=False).itertuples()
    ]
    return tables.html(tables.text_table(lines))


def _sources(table: DataFrame, found: DataFrame) -> DataFrame:
    """Where the shapes of the real workloads come from."""
    lines = []
    for w in workloads.load() if len(found) else ():
        remark = w.case.note if w.case else f"not run: {w.reason}"
        lines.append({"workload": w.id, "project": w.project, "source of the shape": w.source, "remark": remark})
    return tables.text_table(lines)


def _environment(table: DataFrame, found: DataFrame) -> DataFrame:
    rows: list[Row] = sorted(table["row"], key=lambda r: r.date)
    last, times = rows[-1], [r.timing.p50_us for r in rows if r.kind == "anchor" and r.timing]
    facts = {name: str(value) for name, value in (vars(last.device) | vars(last.versions)).items() if value is not None}
    commits = {f"{r.source.commit or 'installed'}{' with changes' if r.source.dirty else ''}" for r in rows}
    facts |= {"commits of the rows": ", ".join(sorted(commits)), "digest of the newest code": last.source.digest}
    facts["rows"] = f"{len(rows)}, from {rows[0].date} to {last.date}"
    facts["L2 cache"] = ", ".join(sorted({r.l2 for r in rows if r.l2})) or "not stated"
    facts["commands"] = "; ".join(sorted({r.command for r in rows})[:8])
    for name in ("sm_clock_mhz", "power_w", "temperature_c"):
        if seen := [v for r in rows if isinstance(v := r.state.get(name), int | float)]:
            facts[name] = f"{min(seen):g} to {max(seen):g}"
    if len(times) > 1:  # what the repeated anchor case says of the machine's steadiness
        moved = f"measured {len(times)} times, moved by {max(times) / min(times) - 1:.1%}"
        facts["drift"] = f"the same anchor case, {moved}; smaller differences than that mean nothing here"
    return tables.text_table({"what": name, "is": value} for name, value in facts.items())


class View(NamedTuple):
    """A section of the page and a table of Markdown pages. suite: whose rows it shows, or ""; texts: cells are sentences."""

    suite: str
    title: str
    table: Callable[[DataFrame, DataFrame], DataFrame]  # of tables.newest and tables.comparisons
    draw: Callable[[DataFrame], Markup] | None = None  # of the suite's comparisons
    note: str = ""
    texts: bool = False

    def of(self, table: DataFrame) -> DataFrame:
        return table[table["suite"] == self.suite] if self.suite else table


_BOTH = ". ".join(MEANINGS.values()) + "."
_FEATURES = "In brackets the multiple of the padded time, ▼ where it is more than this package promises: at most "
_FEATURES += " and ".join(f"{name}, {limit:g} times the padded time" for name, limit in tables.PROMISES.items()) + "."
_ERRORS = "The largest max and RMS error, in units of the true tensor's largest value; the truth is float64."
_FIRST = "In new processes: empty, without compiled kernels on the disk, and warm, with them."
_KERNELS = functools.partial(tables.lost, ways=("kernels",), theirs=CUDNN)
_FROM_PADDED = functools.partial(tables.timings, base="padded")
_BY_SHAPE = functools.partial(tables.accuracy, by_shape=True)
_H, _T = functools.partial(_over, x_name="hidden size"), functools.partial(_over, x_name="length")
VIEWS = (
    View("hidden-sizes", "Time per step against hidden size", tables.timings, _H, _BOTH),
    View("", "Comparisons that torch wins", tables.count_lost),
    View("", "Where cuDNN still wins", _KERNELS, None, MEANINGS["kernels"] + ".", True),
    View("batch", "Hidden size by batch", tables.timings, _heat),
    View("length", "Scaling in the number of steps", tables.timings, _T, _BOTH),
    View("cell", "One step: the cell", tables.timings, _heat),
    View("step", "One step a call, the state carried", tables.timings),
    View("real", "LSTMs that people run", tables.timings, _real, _BOTH),
    View("real", "Sources of their shapes", _sources, texts=True),
    View("features", "What features cost", _FROM_PADDED, None, _FEATURES),
    View("memory", "Memory of a training step", tables.readings),
    View("accuracy", "Accuracy against float64, over all shapes", tables.accuracy, None, _ERRORS),
    View("accuracy", "Accuracy against float64, by hidden size and length", _BY_SHAPE),
    View("overhead", "Host time of a call", tables.readings, texts=True),
    View("cold-start", "The first call", tables.readings, None, _FIRST, True),
    View("", "Where torch is ahead, the worst first", tables.lost, None, _BOTH, True),
    View("", "Not timed: wrong, failed, skipped", tables.not_timed, texts=True),
    View("roofs", "Roofs and floors", tables.roofs),
    View("", "Environment and drift", _environment, texts=True),
)


def compare(sides: Sequence[tuple[Path, Sequence[Row]]], page: Path | None) -> str:
    """Two sets of rows side by side, as text, and as a page where a path of one is given."""
    table, said = tables.side_by_side(*(rows for _, rows in sides))
    lead = []
    for side, (path, rows) in zip("AB", sides):
        commits = sorted({(row.source.commit or row.source.digest)[:10] for row in rows})
        devices = ", ".join(sorted({row.device.name for row in rows}))
        lead.append(f"{side}: {path.stem} ({devices}; {', '.join(commits[:3])})")
    lead += ["A / B above 1: B is faster."]
    if page:
        sections = [Section("pairs", "Both sides", tables.html(table))]
        write_page(page, "lstm_triton: two sets of rows", [*lead, said], [Part("pair", "", "", sections)])
    return "\n".join([*lead, "", tables.plain(table), "", said])


_WRITTEN = (
    r"(<!-- (benchmark(?: summary)?): begin \(written by lstm-triton bench --readme\) -->\n).*?(<!-- \2: end -->)"
)


def update_markdown(path: Path, rows: Sequence[Row]) -> None:
    """Replace what stands between the markers of a file: the summary's, those of all tables, or both.

    Raises:
        StoreError: no such file, or no pair of markers in it; rows that are synthetic.
    """
    if any(row.synthetic for row in rows):
        raise StoreError("synthetic rows are no results: they do not go into a README")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error

    def tables_of(match: re.Match) -> str:
        return f"{match[1]}\n{markdown(rows, 'summary' in match[2])}\n{match[3]}"

    text, count = re.subn(_WRITTEN, tables_of, text, flags=re.DOTALL)
    if not count:
        begin = "<!-- benchmark: begin (written by lstm-triton bench --readme) -->"
        raise StoreError(f"{path} needs one line\n{begin}\nand one line\n<!-- benchmark: end -->")
    with unfinished(path) as file:
        file.write_text(text, encoding="utf-8")


def markdown(rows: Sequence[Row], short: bool = False) -> str:
    """The tables of every device; short: of the headline only the first dtype, and how many comparisons are lost."""
    parts = []
    for name, table in tables.newest(rows).groupby("machine", sort=False):
        last: Row = max(table["row"], key=lambda r: r.date)
        label = f" ({CPU_LABEL})" if last.device.type == "cpu" else ""
        commit = (last.source.commit or "installed")[:12] + (" with changes" if last.source.dirty else "")
        versions = f"torch {last.versions.torch}, triton {last.versions.triton}"
        parts += [f"### {name}{label}", f"{versions}, {last.date[:10]}, commit {commit}"]
        found = tables.comparisons(table)
        if short:
            dtypes = [c.dtype for c in VIEWS[0].of(found)["case"]]
            shown = "bfloat16" if "bfloat16" in dtypes else dtypes[0] if dtypes else ""
            found = found[[c.dtype == shown or s != "hidden-sizes" for c, s in zip(found["case"], found["suite"])]]
        for view in VIEWS[: 2 if short else None]:
            if len(shown := view.table(view.of(table), view.of(found))):
                parts += [f"**{view.title}**", *([view.note] if view.note else []), tables.markdown(shown)]
    return "\n\n".join(parts) + "\n"
