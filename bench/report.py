"""The report: everything in it comes from rows."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from . import cases, charts, page, providers, schema, select, tables, workloads
from .page import Part, Section, details, figure, paragraph
from .select import Group, Row
from .store import Rows

MODES = {"forward": "Forward, evaluation mode", "train": "Training step: forward and backward"}
# What the two series are, by select.WAYS.
MEANINGS = {
    "kernels": "Kernels: the fastest of this package's Triton backends that is right, each forced",
    "auto": "Auto: what is taken when no backend is asked for, which may be cuDNN itself",
}


def write(path: Path, found: Rows) -> None:
    """Render all rows to one HTML file; at no moment is there half a file."""
    text = render(found.rows, found.problems)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def render(rows: Sequence[Row], problems: Sequence[str] = ()) -> str:
    devices = select.by_device(select.latest(rows))
    parts = [_part(f"d{k}", name, of_device) for k, (name, of_device) in enumerate(devices.items())]
    lead = paragraph(
        "Each figure is a median over interleaved, shuffled rounds, taken only after outputs and gradients were compared with "
        "float64. Both sides pay for their matrix products, in the same precision and mode. Speed-up: torch's time over ours; "
        "above 1 this package is ahead."
    )
    if problems:
        lead += paragraph(
            f"{len(problems)} lines of the files are not rows, and left out. The first: {problems[0]}", "note"
        )
    if not parts:
        lead += paragraph("There are no rows yet.", "note")
    return page.html("lstm_triton beside cuDNN and others", lead, parts)


def _part(id: str, name: str, rows: Sequence[Row]) -> Part:
    notes = [f"{schema.CPU_LABEL}."] if rows[0]["device"]["type"] == "cpu" else []
    notes += (
        ["SYNTHETIC rows, made up to test this page: not results."] if any(row["synthetic"] for row in rows) else []
    )
    makers: Sequence[tuple[str, str, str, Callable[[Sequence[Row]], str]]] = (
        ("hidden-sizes", "Speed-up against hidden size", "hidden-sizes", _hidden_sizes),
        ("batch", "Hidden size by batch", "batch", _heat),
        ("length", "Scaling in the number of steps", "length", _length),
        ("cell", "One step: the cell", "cell", _cell),
        ("real", "LSTMs that people run", "real", _real),
        ("features", "What features cost", "features", _features),
        ("memory", "Memory", "memory", _memory),
        ("accuracy", "Accuracy against float64", "accuracy", _accuracy),
        ("overhead", "Host time of a call", "overhead", lambda r: _table(tables.overhead(r), True)),
        ("cold-start", "The first call", "cold-start", lambda r: _table(tables.cold_start(r), True)),
        ("losses", "What loses, and why", "", _losses),
        ("roofs", "Roofs and floors", "roofs", _roofs),
        ("environment", "Environment and drift", "", _environment),
    )
    l2, threads = cases.settings(rows[0])
    device = f" --device cpu --threads {threads}" if rows[0]["device"]["type"] == "cpu" else ""
    device += " --flush-l2" if l2 == "flushed" else ""
    sections = []
    for key, title, suite, make in makers:
        body = make(rows) or paragraph("No rows of this yet.", "quiet")
        command = f"lstm-triton bench --suite {suite}{device}" if suite else ""
        sections.append(Section(f"{id}-{key}", title, body, command))
    return Part(id, name, " ".join(notes), sections)


def _table(table: tables.Table, texts: bool = False) -> str:
    if not table.rows:
        return ""
    html = table.html()
    return f'<div class="texts">{html}</div>' if texts else html


def _dtype_names(found: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(g.case.dtype_name for g in found))


def _hidden_sizes(rows: Sequence[Row]) -> str:
    parts = []
    for mode, title in MODES.items():
        found = [g for g in select.groups(rows, "hidden-sizes", mode) if g.execution == "eager"]
        series: list[charts.Series] = []
        for way, dtype in itertools.product(select.WAYS, _dtype_names(found)):
            chosen = [(g.case.hidden_size, select.SPEEDUPS[way](g)) for g in found if g.case.dtype_name == dtype]
            points = [(H, s) for H, s in chosen if s is not None]
            if points and len(series) < charts.STYLES:
                series.append(charts.Series(f"{dtype}, {way}", points, len(series)))
        if series:
            case = found[0].case
            picture = charts.lines(
                f"{title}: speed-up by hidden size", "hidden size", "speed-up over torch.nn.LSTM", series, 1.0
            )
            meanings = ". ".join(MEANINGS.values())
            parts.append(figure(picture, f"{title}; batch {case.batch}, {case.length} steps. {meanings}."))
    if not parts:
        return ""
    return "".join(parts) + details("All figures", tables.headline(rows).html())


def _heat(rows: Sequence[Row]) -> str:
    parts = []
    found = select.groups(rows, "batch")
    for dtype, (mode, title), way in itertools.product(_dtype_names(found), MODES.items(), select.WAYS):
        hidden, batches, grid = tables.heat(rows, dtype, mode, way)
        if grid:
            head = "<tr><th>H \\ B</th>" + "".join(f"<th>{b}</th>" for b in batches) + "</tr>"
            body = []
            for h in hidden:
                cells = [_heat_cell(select.SPEEDUPS[way](grid[h, b]) if (h, b) in grid else None) for b in batches]
                body.append(f"<tr><th>{h}</th>{''.join(cells)}</tr>")
            length = next(iter(grid.values())).case.length
            table = f'<div class="scroll"><table class="heat"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'
            parts.append(
                figure(table, f"Speed-up, {dtype}, {length} steps. {title}. ▲ ahead, ▼ behind. {MEANINGS[way]}.")
            )
    if not parts:
        return ""
    return "".join(parts) + details("All figures", tables.headline(rows, "batch").html())


def _heat_cell(speedup: float | None) -> str:
    if speedup is None:
        return "<td></td>"
    share = min(abs(math.log2(speedup)) / 2, 1.0) * 70  # full colour at x4 and x1/4
    hue = "--s0" if speedup >= 1 else "--s1"
    return f'<td style="--hue:var({hue});--share:{share:.0f}%">{speedup:.2f} {"▲" if speedup >= 1 else "▼"}</td>'


def _length(rows: Sequence[Row]) -> str:
    parts = []
    for mode, title in MODES.items():
        found = [g for g in select.groups(rows, "length", mode) if g.execution == "eager"]
        names = [n for n in providers.all_providers() if any(g.us(n) for g in found)][: charts.STYLES]
        series = []
        for style, name in enumerate(names):
            points = [(float(g.case.length), t / g.case.length) for g in found if (t := g.us(name)) is not None]
            series.append(charts.Series(name, points, style))
        if series:
            case = found[0].case
            picture = charts.lines(f"{title}: time per step by length", "steps", "microseconds per step", series)
            parts.append(
                figure(picture, f"{title}; hidden size {case.hidden_size}, batch {case.batch}, {case.dtype_name}.")
            )
    return "".join(parts)


def _cell(rows: Sequence[Row]) -> str:
    parts = []
    for mode, title in MODES.items():
        found = select.groups(rows, "cell", mode)
        dtype = "float32 ieee" if "float32 ieee" in _dtype_names(found) else next(iter(_dtype_names(found)), "")
        found = [g for g in found if g.case.dtype_name == dtype]
        batches = sorted({g.case.batch for g in found})
        series: list[charts.Series] = []
        for batch in (batches[:1] + batches[len(batches) // 2 :][:1]) if len(batches) > 1 else batches:
            for execution in ("eager", "graph"):
                chosen = [g for g in found if g.case.batch == batch and g.execution == execution]
                points = [(float(g.case.hidden_size), s) for g in chosen if (s := g.auto_speedup()) is not None]
                if points:
                    series.append(charts.Series(f"batch {batch}, {execution}", points, len(series)))
        if series:
            picture = charts.lines(
                f"{title}: speed-up by hidden size", "hidden size", "speed-up over nn.LSTMCell", series, 1.0
            )
            text = f"One step of a cell, {dtype}, as backend auto takes it. {title}. Eager calls, and replays of a CUDA graph."
            parts.append(figure(picture, text))
    if not parts:
        return ""
    return "".join(parts) + details("All figures", tables.cells(rows).html())


def _real(rows: Sequence[Row]) -> str:
    known = {w.id: w for w in workloads.load()}
    found = [g for g in select.groups(rows, "real") if any(s(g) is not None for s in select.SPEEDUPS.values())]
    if not found:
        return ""
    body = ""
    for way, speedup_of in select.SPEEDUPS.items():
        ahead = [(s, g) for g in found if (s := speedup_of(g)) is not None]
        bars = []
        for s, g in sorted(ahead, key=lambda pair: -pair[0]):
            project = known[g.case.name].project if g.case.name in known else g.case.name
            graph = ", graph" if g.execution == "graph" else ""
            bars.append(charts.Bar(f"{project}: {g.case.describe()}{graph}", s, f"{s:.2f}x"))
        if bars:
            picture = charts.ratios(bars, "this package ahead", "torch ahead")
            text = f"Speed-up over torch.nn.LSTM (cells: torch.nn.LSTMCell), logarithmic. {MEANINGS[way]}."
            body += figure(picture, text)
    listed = []
    for g in found:
        w, ours = known.get(g.case.name), g.ours()
        speedups = [f"{s:.2f}" if (s := speedup_of(g)) else "" for speedup_of in select.SPEEDUPS.values()]
        listed.append([g.case.name, g.case.describe(), ours[0] if ours else "", *speedups, g.case.note,
                       w.source if w else ""])  # fmt: skip
    head = (
        "workload",
        "what was run",
        "fastest kernels",
        "speed-up of kernels",
        "of auto",
        "remark",
        "source of the shape",
    )
    body += details("Each workload and its source", _table(tables.Table(head, listed), True))
    missing = [[w.project, w.reason] for w in known.values() if w.case is None]
    return body + details("Not run", _table(tables.Table(("workload", "why"), missing), True))


def _features(rows: Sequence[Row]) -> str:
    body = _table(tables.features(rows))
    promises = " and ".join(f"{name}, {limit:g} times the padded time" for name, limit in tables.PROMISES.items())
    return body and paragraph(f"Promised of this package at most: {promises}. ▼ beside a ratio: more.", "quiet") + body


def _memory(rows: Sequence[Row]) -> str:
    body = _table(tables.memory(rows))
    return (
        body
        and paragraph("What one training step holds between forward and backward, and at its peak.", "quiet") + body
    )


def _accuracy(rows: Sequence[Row]) -> str:
    body = _table(tables.accuracy(rows))
    if not body:
        return ""
    text = "The largest max and RMS error over all shapes, in units of the true tensor's largest value; the truth is float64."
    by_shape = details("By hidden size and length", _table(tables.accuracy(rows, by_shape=True)))
    return paragraph(text, "quiet") + body + by_shape


def _losses(rows: Sequence[Row]) -> str:
    timed = select.groups(rows)
    parts = []
    for way in select.WAYS:
        compared = sum(select.SPEEDUPS[way](g) is not None for g in timed)
        if compared:
            behind = select.losses(timed, way)
            text = f"Of {compared} comparisons torch is ahead in {len(behind)}, beyond what the samples leave open."
            parts.append(paragraph(f"{MEANINGS[way]}. {text}") + _table(tables.lost(rows, way), True))
    wrong = tables.not_timed(rows)
    if wrong.rows:
        parts.append(paragraph("Not timed: results that were wrong, failures, and what could not be tried."))
        parts.append(_table(wrong, True))
    return "".join(parts)


def _roofs(rows: Sequence[Row]) -> str:
    body = _table(tables.roofs(rows))
    if not body:
        return ""
    text = (
        "The floor of a step: one exchange between programs + max(tensor, memory). Distances stand in the tables above."
    )
    return paragraph(text, "quiet") + body


def _environment(rows: Sequence[Row]) -> str:
    row = max(rows, key=lambda r: r["date"])
    device, versions, source = row["device"], row["versions"], row["source"]
    facts = [(name, str(value)) for name, value in [*device.items(), *versions.items()] if value is not None]
    commits = sorted(
        {f"{r['source']['commit'] or 'installed'}{' with changes' if r['source']['dirty'] else ''}" for r in rows}
    )
    facts += [("commits of the rows", ", ".join(commits)), ("digest of the newest code", source["digest"])]
    facts += [("rows", f"{len(rows)}, from {min(r['date'] for r in rows)} to {row['date']}")]
    facts += [("L2 cache", ", ".join(sorted({r["l2"] for r in rows if r["l2"]})) or "not stated")]
    for name in ("sm_clock_mhz", "power_w", "temperature_c"):
        seen = [r["state"][name] for r in rows if r["state"].get(name) is not None]
        if seen:
            facts.append((name, f"{min(seen):g} to {max(seen):g}"))
    facts.append(("commands", "; ".join(sorted({r["command"] for r in rows})[:8])))
    body = '<div class="texts">' + tables.Table(("what", "is"), facts).html() + "</div>"
    return body + drift(rows)


def drift(rows: Sequence[Row]) -> str:
    """What the repeated anchor case says of the machine's steadiness."""
    anchors = sorted(select.of_kind(rows, "anchor", "ok"), key=lambda r: r["date"])
    if len(anchors) < 2:
        return paragraph("The anchor case has run too seldom to show drift.", "quiet")
    times = [r["timing"]["p50_us"] for r in anchors]
    spread = (max(times) / min(times) - 1) * 100
    note = "quiet" if spread < 5 else "note"
    text = f"The same anchor case, measured {len(times)} times along the way, moved by {spread:.1f} %."
    return paragraph(text + (" Smaller differences than that mean nothing here." if spread >= 5 else ""), note) + (
        f'<p class="quiet">{escape(", ".join(f"{t:.4g}" for t in times[:40]))} us</p>'
    )
