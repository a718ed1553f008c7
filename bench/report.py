"""The report, and the tables of Markdown pages: everything in them comes from rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from pandas import DataFrame

from . import figures, tables, workloads
from .providers import CUDNN
from .rows import CPU_LABEL, Row, StoreError, replace_text

MODES = {"forward": "Forward, evaluation mode", "train": "Training step: forward and backward"}
MEANINGS = {
    "kernels": "Kernels: the fastest of this package's Triton backends that is right, each forced",
    "auto": "Auto: what is taken when no backend is asked for, which may be cuDNN itself",
}
LEAD = (
    "Each figure is a median over interleaved, shuffled rounds, taken only after outputs and gradients were compared with "
    "float64. Both sides pay for their matrix products, in the same precision and mode. Speed-up: torch's time over ours; "
    "above 1 this package is ahead, and ▼ marks where it is not."
)


@dataclass(frozen=True)
class Section:
    """A part of a page. command: what reproduces it."""

    id: str
    title: str
    body: Markup
    command: str = ""


@dataclass(frozen=True)
class Part:
    """Sections that belong together: those of one device."""

    id: str
    title: str
    note: str
    sections: Sequence[Section]


def page(title: str, lead: Sequence[str], parts: Sequence[Part]) -> str:
    """One HTML file, complete in itself, for light and dark, wide and narrow."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(template).render(title=title, lead=lead, parts=parts)


def paragraph(text: str, style: str = "") -> Markup:
    return Markup('<p class="{}">{}</p>').format(style, text) if text else Markup("")


def figure(caption: str, *pictures: Markup) -> Markup:
    shown = Markup("").join(picture for picture in pictures if picture)
    with_caption = Markup('<figure><div class="pictures">{}</div><figcaption>{}</figcaption></figure>')
    return with_caption.format(shown, caption) if shown else Markup("")


def details(summary: str, body: Markup) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body) if body else body


def write(path: Path, rows: Sequence[Row], problems: Sequence[str]) -> None:
    replace_text(path, render(rows, problems))


def render(rows: Sequence[Row], problems: Sequence[str] = ()) -> str:
    lead = [LEAD]
    if problems:
        lead.append(f"{len(problems)} lines of the files are not rows, and left out. The first: {problems[0]}")
    table = tables.newest(rows)
    parts = [_part(f"d{k}", name, of) for k, (name, of) in enumerate(table.groupby("machine", sort=False))]
    return page("lstm_triton beside cuDNN and others", lead if parts else [*lead, "There are no rows yet."], parts)


def _part(id: str, name: Any, table: DataFrame) -> Part:
    first: Row = table["row"].iloc[0]
    notes = [f"{CPU_LABEL}."] if first.device.type == "cpu" else []
    if any(row.synthetic for row in table["row"]):
        notes.append("SYNTHETIC rows, made up to test this page: not results.")
    options = f" --device cpu --threads {first.device.threads}" if first.device.type == "cpu" else ""
    options += " --flush-l2" if any(table["row"].map(lambda r: r.l2 == "flushed")) else ""
    makers: Sequence[tuple[str, str, Callable[[DataFrame], Markup]]] = (
        ("hidden-sizes", "Time per step against hidden size", _hidden_sizes),
        ("cudnn", "Where cuDNN still wins", lambda t: tables.html(_won_by_cudnn(t), True)),
        ("batch", "Hidden size by batch", _heat),
        ("length", "Scaling in the number of steps", _length),
        ("cell", "One step: the cell", _cell),
        (
            "step",
            "One step a call, the state carried",
            lambda t: tables.html(tables.timings(tables.comparisons(t, "step"))),
        ),
        ("real", "LSTMs that people run", _real),
        ("features", "What features cost", _features),
        ("memory", "Memory of a training step", lambda t: tables.html(tables.memory(t))),
        ("accuracy", "Accuracy against float64", _accuracy),
        ("overhead", "Host time of a call", lambda t: tables.html(tables.overhead(t), True)),
        ("cold-start", "The first call", lambda t: tables.html(tables.cold_start(t), True)),
        ("losses", "What loses, and why", _losses),
        ("roofs", "Roofs and floors", lambda t: tables.html(tables.roofs(t))),
        ("environment", "Environment and drift", _environment),
    )
    sections = []
    for key, title, make in makers:
        suite = key not in ("cudnn", "losses", "environment")
        sections.append(
            Section(f"{id}-{key}", title, make(table), f"lstm-triton bench --suite {key}{options}" if suite else "")
        )
    return Part(id, name, " ".join(notes), sections)


def _hidden_sizes(table: DataFrame) -> Markup:
    return _over(tables.comparisons(table, "hidden-sizes"), "hidden size", lambda case: case.hidden_size)


def _length(table: DataFrame) -> Markup:
    return _over(tables.comparisons(table, "length"), "steps", lambda case: case.length)


def _over(found: DataFrame, x_label: str, x_of: Callable[[Any], int]) -> Markup:
    """Time per step of cuDNN, these kernels, auto, peers and the floor; beside it torch's time over each."""
    body = Markup("")
    eager = found[found["execution"] == "eager"]
    for (dtype, mode), of in eager.groupby(
        [[c.dtype_name for c in eager["case"]], [c.mode for c in eager["case"]]], sort=False
    ):
        times: dict[str, list[tuple[float, float]]] = {CUDNN: [], "kernels": [], "auto": []}
        floor: list[tuple[float, float]] = []
        for line in of.itertuples():
            x = float(x_of(line.case))
            by = {name: row for name, row in line.rows.items() if not name.startswith("lstm_triton")}
            by |= {way: row for way in tables.WAYS if (row := getattr(line, way)) is not None}
            for name, row in by.items():
                times.setdefault(name, []).append((x, row.timing.us_per_step))
            floor += [(x, row.floor.us_per_step) for row in list(line.rows.values())[:1] if row.floor]
        torchs = dict(times[CUDNN])
        ratios = {name: [(x, torchs[x] / us) for x, us in points if x in torchs] for name, points in times.items()}
        title, case = f"{MODES[mode]}, {dtype}", of["case"].iloc[0]
        step = figures.curves(
            f"{title}: microseconds per step", x_label, "microseconds per step", times | {"floor": floor}
        )
        ratio = ratios | {CUDNN: []}
        beside = figures.curves(f"{title}: speed-up", x_label, f"{CUDNN}'s time over theirs", ratio, level=1.0)
        length = f", {case.length} steps" if x_label != "steps" else f", hidden size {case.hidden_size}"
        body += figure(f"{title}; batch {case.batch}{length}.", step, beside)
    return body and body + paragraph(". ".join(MEANINGS.values()) + ".", "quiet") + _all(found)


def _all(found: DataFrame) -> Markup:
    return details("All figures", tables.html(tables.timings(found)))


def _heat(table: DataFrame) -> Markup:
    found, body = tables.comparisons(table, "batch"), Markup("")
    for way in tables.WAYS:
        known = found[found[f"{way}_ratio"].notna()]
        names = [[c.dtype_name for c in known["case"]], [c.mode for c in known["case"]]]
        for (dtype, mode), of in known.groupby(names, sort=False):
            sizes = DataFrame({"H": [c.hidden_size for c in of["case"]], "B": [c.batch for c in of["case"]],
                               "text": of[f"{way}_ratio"].map(_heat_cell).values})  # fmt: skip
            grid = sizes.pivot(index="H", columns="B", values="text").fillna("")
            shown = Markup('<div class="scroll">{}</div>').format(Markup(grid.to_html(border=0, escape=False)))
            steps = of["case"].iloc[0].length
            body += figure(
                f"Speed-up, {dtype}, {steps} steps. {MODES[mode]}. ▲ ahead, ▼ behind. {MEANINGS[way]}.", shown
            )
    return body and body + _all(found)


def _heat_cell(ratio: float) -> str:
    share = min(abs(math.log2(ratio)) / 2, 1.0) * 70  # full colour at x4 and x1/4
    hue, mark = ("s0", "▲") if ratio >= 1 else ("s1", "▼")
    return f'<span class="heat" style="--hue:var(--{hue});--share:{share:.0f}%">{ratio:.2f} {mark}</span>'


def _cell(table: DataFrame) -> Markup:
    found, body = tables.comparisons(table, "cell"), Markup("")
    known = found[found["auto_ratio"].notna()]
    names = [[c.dtype_name for c in known["case"]], [c.mode for c in known["case"]]]
    for (dtype, mode), of in known.groupby(names, sort=False):
        pictures = []
        for execution in ("eager", "graph"):
            series: dict[str, list[tuple[float, float]]] = {}
            for line in of[of["execution"] == execution].itertuples():
                series.setdefault(f"batch {line.case.batch}", []).append((line.case.hidden_size, line.auto_ratio))
            what = "eager calls" if execution == "eager" else "replays of a CUDA graph"
            label = f"speed-up over nn.LSTMCell, {what}"
            pictures.append(figures.curves(f"{dtype}, {mode}: {label}", "hidden size", label, series, level=1.0))
        body += figure(f"One step of a cell, {dtype}, as backend auto takes it. {MODES[mode]}.", *pictures)
    return body + _all(found) if len(found) else body


def _real(table: DataFrame) -> Markup:
    known = {w.id: w for w in workloads.load()}
    found, body = tables.comparisons(table, "real"), Markup("")
    for way in tables.WAYS:
        ahead = found[found[f"{way}_ratio"].notna()].sort_values(f"{way}_ratio", ascending=False)
        values = []
        for line in ahead.itertuples():
            project = known[line.case.name].project if line.case.name in known else line.case.name
            ratio, graph = getattr(line, f"{way}_ratio"), ", graph" if line.execution == "graph" else ""
            values.append((f"{project}: {line.case.describe()}{graph}", ratio, ratio, ratio, f"{ratio:.2f}x"))
        text = "Speed-up over torch.nn.LSTM (cells: torch.nn.LSTMCell), logarithmic, to the right where this package is ahead"
        if values:
            body += figure(f"{text}. {MEANINGS[way]}.", figures.bars("speed-up of each workload", values, ratio=True))
    if not len(found):
        return body
    sources = [{"workload": w.id, "project": w.project, "source of the shape": w.source, "remark": w.case.note if w.case
                else f"not run: {w.reason}"} for w in known.values()]  # fmt: skip
    return body + _all(found) + details("Each workload's source", tables.html(tables.text_table(sources), True))


def _features(table: DataFrame) -> Markup:
    found = tables.comparisons(table, "features")
    promised = " and ".join(f"{name}, {limit:g} times the padded time" for name, limit in tables.PROMISES.items())
    text = f"Promised of this package at most: {promised}. In brackets the multiple of the padded time; ▼: more than promised."
    body = tables.html(tables.timings(found[found["execution"] == "eager"], base="padded"))
    return body and paragraph(text, "quiet") + body


def _accuracy(table: DataFrame) -> Markup:
    body = tables.html(tables.accuracy(table))
    text = "The largest max and RMS error over all shapes, in units of the true tensor's largest value; the truth is float64."
    by_shape = details("By hidden size and length", tables.html(tables.accuracy(table, by_shape=True)))
    return body and paragraph(text, "quiet") + body + by_shape


def _won_by_cudnn(table: DataFrame) -> DataFrame:
    return tables.lost(tables.comparisons(table), "kernels", CUDNN)


def _losses(table: DataFrame) -> Markup:
    found, body = tables.comparisons(table), Markup("")
    for way in tables.WAYS:
        if compared := int(found[f"{way}_ratio"].notna().sum()):
            behind = int((found[f"{way}_lost"] == True).sum())  # noqa: E712
            text = f"Of {compared} comparisons torch is ahead in {behind}, beyond what the samples leave open."
            body += paragraph(f"{MEANINGS[way]}. {text}") + tables.html(tables.lost(found, way), True)
    bad = tables.html(tables.not_timed(table), True)
    return body + (
        bad and paragraph("Not timed: results that were wrong, failures, and what could not be tried.") + bad
    )


def _environment(table: DataFrame) -> Markup:
    rows: list[Row] = sorted(table["row"], key=lambda r: r.date)
    last = rows[-1]
    facts = [*vars(last.device).items(), *vars(last.versions).items()]
    commits = {f"{r.source.commit or 'installed'}{' with changes' if r.source.dirty else ''}" for r in rows}
    facts += [("commits of the rows", ", ".join(sorted(commits))), ("digest of the newest code", last.source.digest)]
    facts += [("rows", f"{len(rows)}, from {rows[0].date} to {last.date}")]
    facts += [("L2 cache", ", ".join(sorted({r.l2 for r in rows if r.l2})) or "not stated")]
    for name in ("sm_clock_mhz", "power_w", "temperature_c"):
        if seen := [r.state[name] for r in rows if r.state.get(name) is not None]:
            facts.append((name, f"{min(seen):g} to {max(seen):g}"))
    facts.append(("commands", "; ".join(sorted({r.command for r in rows})[:8])))
    listed = tables.text_table([{"what": name, "is": str(value)} for name, value in facts if value is not None])
    return tables.html(listed, True) + drift([r for r in rows if r.kind == "anchor" and r.timing])


def drift(anchors: Sequence[Row]) -> Markup:
    """What the repeated anchor case says of the machine's steadiness."""
    times = [r.timing.p50_us for r in anchors if r.timing]
    if len(times) < 2:
        return paragraph("The anchor case has run too seldom to show drift.", "quiet")
    spread = (max(times) / min(times) - 1) * 100
    text = f"The same anchor case, measured {len(times)} times along the way, moved by {spread:.1f} %."
    text += " Smaller differences than that mean nothing here." if spread >= 5 else ""
    listed = paragraph(", ".join(f"{t:.4g}" for t in times[:40]) + " us", "quiet")
    return paragraph(text, "quiet" if spread < 5 else "note") + listed


_MARKER = "<!-- benchmark{}: {} -->"
_WRITTEN = " (written by lstm-triton bench --readme)"


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
    pairs = {kind: (_MARKER.format(kind, "begin" + _WRITTEN), _MARKER.format(kind, "end")) for kind in (" summary", "")}
    there = [kind for kind, pair in pairs.items() if any(marker in text for marker in pair)]
    for kind in there or [""]:
        begin, end = pairs[kind]
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise StoreError(f"{path} needs one line\n{begin}\nand after it one line\n{end}\n(or, for a summary, "
                             f"{pairs[' summary'][0]})")  # fmt: skip
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{markdown(rows, kind != '')}\n{end}{rest.split(end)[1]}"
    replace_text(path, text)


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
        headline = found[found["suite"] == "hidden-sizes"]
        if short and len(headline):
            dtypes = [c.dtype for c in headline["case"]]
            wanted = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
            headline = headline[[d == wanted for d in dtypes]]
        made = {"Time per step against hidden size; speed-up above 1: this package is ahead": tables.timings(headline)}
        if not short:
            made |= {
                "One step: the cell": tables.timings(found[found["suite"] == "cell"]),
                "One step a call, the state carried": tables.timings(found[found["suite"] == "step"]),
                "What features cost": tables.timings(found[found["suite"] == "features"], base="padded"),
                "Memory of a training step": tables.memory(table),
                "Accuracy against float64, over all shapes": tables.accuracy(table),
                "Accuracy against float64, by hidden size and length": tables.accuracy(table, by_shape=True),
                "Where cuDNN still wins": tables.lost(found, "kernels", CUDNN, 30),
                "Where torch is ahead of the kernels, the worst first": tables.lost(found, "kernels", most=30),
                "Where torch is ahead of what is taken by itself": tables.lost(found, "auto", most=30),
            }
        parts += [
            f"**{title}**\n\n{tables.markdown(made_table)}" for title, made_table in made.items() if len(made_table)
        ]
        for way, who in (("kernels", "this package's kernels"), ("auto", "what is taken when no backend is asked for")):
            if compared := int(found[f"{way}_ratio"].notna().sum()):
                behind = int((found[f"{way}_lost"] == True).sum())  # noqa: E712
                parts.append(f"In {behind} of {compared} comparisons torch is ahead of {who}.")
    return "\n\n".join(parts) + "\n"


def write_comparison(path: Path, table: DataFrame, lead: Sequence[str]) -> None:
    """The page of two sets of rows side by side."""
    section = Section("pairs", "Both sides", tables.html(table) or paragraph("Nothing in common."))
    replace_text(path, page("lstm_triton: two sets of rows", lead, [Part("compared", "Side by side", "", [section])]))
