"""From rows to tables: DataFrames of text whose index is the first column, shown as HTML and Markdown alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas
from markupsafe import Markup
from pandas import DataFrame

from .providers import CUDNN, OURS, TORCH_CELL
from .rows import Row

# This package is compared in two ways: its kernels, each forced, of which the fastest counts, and what auto takes.
WAYS = ("kernels", "auto")
# What the layer promises: a variant's time over that of padded batch rows without resets, of the same provider.
PROMISES = {"packed": 1.5, "resets": 1.05}


def newest(rows: Iterable[Row]) -> DataFrame:
    """The newest row of each measurement on each machine, one line each, GPUs before CPUs.

    A machine is a device under its settings: a flushed L2 cache, or another number of threads, makes another one.
    """
    ordered = sorted(rows, key=lambda r: (r.device.type == "cpu", r.l2 == "flushed"))
    table = DataFrame({
        "row": [*ordered],
        "machine": [_machine(r) for r in ordered],
        "key": [(r.kind == "anchor" and r.date, r.key) for r in ordered],
        **{name: [getattr(r, name) for r in ordered] for name in ("suite", "kind", "status", "provider", "execution", "case")},
        "date": [r.date for r in ordered],
        "us": pandas.Series([r.timing.p50_us if r.timing else None for r in ordered], dtype=float),
    })  # fmt: skip
    return table.loc[
        table.groupby(["machine", "key"], sort=False)["date"].transform("max") == table["date"]
    ].drop_duplicates(["machine", "key"], keep="last")


def _machine(row: Row) -> str:
    threads = row.device.threads
    name = row.device.name + (", L2 cache flushed before each call" if row.l2 == "flushed" else "")
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}" if threads else name


def comparisons(table: DataFrame, suite: str | None = None) -> DataFrame:
    """One line for each case and execution that was timed: `rows` by provider, and for kernels, auto and torchs the row,
    the times in microseconds per step and torch's over ours; whether torch is ahead beyond what the samples leave open.
    """
    timed = table[(table["kind"] == "timing") & table["us"].notna()]
    timed = timed if suite is None else timed[timed["suite"] == suite]
    found = []
    for _, group in timed.groupby(["suite", "case", "execution"], sort=False):
        by = dict(zip(group["provider"], group["row"]))
        first = next(iter(by.values()))
        kernels = [
            r for r in by.values() if r.provider.startswith("lstm_triton") and (r.backend or "").startswith("triton")
        ]
        torchs: Any = by.get(CUDNN if first.case.form == "layer" else TORCH_CELL)
        line: dict[str, Any] = {"suite": first.suite, "case": first.case, "execution": first.execution, "rows": by}
        line |= {
            "kernels": min(kernels, key=lambda r: r.timing.p50_us, default=None),
            "auto": by.get(OURS),
            "torchs": torchs,
        }
        for way in WAYS:
            ours: Any = line[way]
            both = ours is not None and torchs is not None
            line[f"{way}_ratio"] = torchs.timing.p50_us / ours.timing.p50_us if both else None
            line[f"{way}_lost"] = both and ours.timing.ci_low_us > torchs.timing.ci_high_us
        found.append(line)
    columns = ["suite", "case", "execution", "rows", "kernels", "auto", "torchs"]
    columns += [f"{way}_{what}" for way in WAYS for what in ("ratio", "lost")]
    return DataFrame(found, columns=columns, dtype=object)


def text_table(lines: Sequence[Mapping[str, str]]) -> DataFrame:
    """A table of text; its first column becomes the index."""
    table = DataFrame(list(lines), dtype=object).fillna("")
    return table.set_index(table.columns[0]) if len(table) else table


def html(table: DataFrame, texts: bool = False) -> Markup:
    """The table for the page; empty without rows. texts: cells are sentences, not figures."""
    if not len(table):
        return Markup("")
    return Markup('<div class="scroll{}">').format(" texts" if texts else "") + Markup(
        table.rename_axis(None).rename_axis(columns=table.index.name).to_html(border=0) + "</div>"
    )


def markdown(table: DataFrame) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(text).replace("|", "\\|") for text in cells) + " |"

    head = [line([table.index.name, *table.columns]), line(["---", *["---:"] * len(table.columns)])]
    return "\n".join([*head, *(line(cells) for cells in table.itertuples())])


def plain(table: DataFrame) -> str:
    """The table for a terminal."""
    return table.reset_index().to_string(index=False, justify="left") if len(table) else ""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    """A speed-up, marked where torch is ahead."""
    return "" if value is None else f"{'▼ ' if value < 1 else ''}{value:.2f}"


def timings(found: DataFrame, base: str | None = None) -> DataFrame:
    """Microseconds per step of every provider, the speed-ups, cuDNN's algorithm, the kernels' distance from the floor.

    base: the name of a case; beside each time stands its multiple of the same provider's there, marked beyond PROMISES.
    """
    providers = list(dict.fromkeys(name for rows in found["rows"] for name in rows))
    bases = {line.case.mode: line.rows for line in found.itertuples() if line.case.name == base}
    lines = []
    order = sorted(found.itertuples(), key=lambda g: (g.case.hidden_size, g.case.batch, g.case.length, g.case.dtype_name,
                                                      g.case.mode, g.execution) if base is None else g.case.mode)  # fmt: skip
    for line in order:
        name = f"{line.case.name}: " if base else ""
        cells = {"case": f"{name}{line.case.describe()}{', graph' if line.execution == 'graph' else ''}"}
        for provider in providers:
            row = line.rows.get(provider)
            text = _figure(row.timing.us_per_step) if row else ""
            if row and provider in bases.get(line.case.mode, {}):
                multiple = row.timing.p50_us / bases[line.case.mode][provider].timing.p50_us
                broken = provider.startswith("lstm_triton") and multiple > PROMISES.get(line.case.name, multiple)
                text += f" ({'▼ ' if broken else ''}x{multiple:.2f})"
            cells[f"{provider}, us/step"] = text
        cells |= {"speed-up of kernels": _ratio(line.kernels_ratio), "of auto": _ratio(line.auto_ratio)}
        cells["auto takes"] = line.auto.backend or "" if line.auto else ""
        cells["cuDNN algorithm"] = line.torchs.algorithm or "" if line.torchs else ""
        cells["kernels, times the floor"] = _figure(line.kernels.distance if line.kernels else None)
        lines.append(cells)
    return text_table(lines)


def _of_kind(table: DataFrame, kind: str, *statuses: str) -> list[Row]:
    return list(table[(table["kind"] == kind) & table["status"].isin(statuses or ("ok",))]["row"])


def memory(table: DataFrame) -> DataFrame:
    """Bytes held for the backward, in MiB."""
    names = {"saved": "saved by autograd, MiB", "after_forward": "held after forward, MiB", "peak": "peak, MiB"}
    rows = sorted(_of_kind(table, "memory"), key=lambda r: (r.case.name, r.case.dtype))
    return text_table([
        {"case": f"{r.case.name} {r.case.dtype}", "provider": r.provider}
        | {head: f"{r.bytes[name] / 2**20:,.1f}" for name, head in names.items() if r.bytes and name in r.bytes}
        for r in rows
    ])  # fmt: skip


def accuracy(table: DataFrame, by_shape: bool = False) -> DataFrame:
    """The largest max and RMS error of each provider by dtype and input scale: over all shapes, or for each of them."""
    worst: dict[tuple, dict[str, tuple[float, float]]] = {}
    for row in _of_kind(table, "accuracy", "ok", "wrong"):
        case, who = row.case, row.provider + (" (interpreted)" if "interpreter" in (row.label or "") else "")
        shape = (case.form != "cell", case.hidden_size, case.length) if by_shape else ()
        entry = worst.setdefault((shape, case.dtype_name, case.scale, who), {})
        for name, e in (row.errors or {}).items():
            column = "dW, db" if name.startswith(("dweight", "dbias")) else _STATES.get(name, name)
            old = entry.get(column, (0.0, 0.0))
            entry[column] = max(old[0], e.max), max(old[1], e.rms)
    lines = []
    for (shape, dtype, scale, who), entry in sorted(worst.items()):
        sizes = (f"layer H{shape[1]} T{shape[2]}, " if shape[0] else f"cell H{shape[1]}, ") if shape else ""
        cells = {"case": f"{sizes}{dtype}, input x{scale:g}", "provider": who}
        order = [c for c in ("y", "h_n, c_n", "dx", "dh0, dc0", "dW, db") if c in entry]
        lines.append(cells | {f"{c}: max / RMS": f"{entry[c][0]:.1e} / {entry[c][1]:.1e}" for c in order})
    return text_table(lines)


_STATES = {"h_n": "h_n, c_n", "c_n": "h_n, c_n", "dh0": "dh0, dc0", "dc0": "dh0, dc0"}


def values(kind: str, names: Mapping[str, str]) -> Callable[[DataFrame], DataFrame]:
    """A maker of the table of rows of `kind`: a column for each of `names`, by the names of its values."""

    def make(table: DataFrame) -> DataFrame:
        return text_table([
            {"call": f"{r.case.name}, {r.case.mode}", "provider": r.provider}
            | {head: _figure((r.values or {}).get(name)) for name, head in names.items()}
            | {"remark": r.label or ""}
            for r in _of_kind(table, kind)
        ])  # fmt: skip

    return make


overhead = values("overhead", {"total_us": "in all, us", "checks_us": "checks and the rest", "dispatch_us": "dispatch",
                               "launch_us": "launches"})  # fmt: skip
cold_start = values("cold-start", {
    "empty_import_s": "import, s", "empty_first_call_s": "first call, no kernels yet, s",
    "warm_first_call_s": "first call, kernels on disk, s", "empty_second_call_s": "second call, s",
})  # fmt: skip


def roofs(table: DataFrame) -> DataFrame:
    units = (("_bytes_per_s", 1e9, "GB/s"), ("_flops_per_s", 1e12, "TFLOP/s"), ("_us", 1.0, "us"))
    lines = []
    for name, value in ((n, v) for r in _of_kind(table, "roof") for n, v in (r.values or {}).items()):
        end, size, unit = next(u for u in units if name.endswith(u[0]))
        lines.append({"roof": name.removesuffix(end).replace("_", " "), "measured": f"{value / size:,.4g} {unit}"})
    return text_table(lines)


def lost(found: DataFrame, way: str, torchs: str | None = None, most: int = 60) -> DataFrame:
    """Where torch (or only its provider `torchs`) is ahead of a way, the worst first, with what the rows know of why."""
    lines = []
    for line in sorted(found[found[f"{way}_lost"] == True].itertuples(), key=lambda g: getattr(g, f"{way}_ratio")):  # noqa: E712
        mine, theirs = getattr(line, way), line.torchs
        if torchs in (None, theirs.provider):
            distance = f"{mine.distance:.1f} times the floor" if mine.distance else ""
            why = (mine.backend_reason, theirs.algorithm and f"cuDNN: {theirs.algorithm}", distance)
            lines.append({
                "case": line.case.describe() + (", graph" if line.execution == "graph" else ""),
                "speed-up": f"{getattr(line, f'{way}_ratio'):.2f}",
                "ours, us/step": _figure(mine.timing.us_per_step), "torch, us/step": _figure(theirs.timing.us_per_step),
                "way": mine.backend if way == "auto" else mine.provider, "what is known of why": "; ".join(t for t in why if t),
            })  # fmt: skip
    return text_table(lines[:most])


def not_timed(table: DataFrame) -> DataFrame:
    """What was wrong, failed or was skipped, and why; equal reasons once."""
    bad = [r for r in table["row"] if r.status != "ok" and r.kind != "anchor"]
    counts: dict[tuple, int] = {}
    for r in sorted(bad, key=lambda r: (("wrong", "failed", "skipped").index(r.status), r.provider, r.reason)):
        counts[r.status, r.provider, r.reason] = counts.get((r.status, r.provider, r.reason), 0) + 1
    return text_table([{"what": s, "provider": p, "why": w, "rows": str(n)} for (s, p, w), n in counts.items()])


def side_by_side(a: Sequence[Row], b: Sequence[Row]) -> tuple[DataFrame, str]:
    """Timed rows of the same case, provider and execution, and a sentence on how many there are on one side only."""
    sides = []
    for rows in (a, b):
        table = newest(rows)
        table = table[(table["kind"] == "timing") & table["us"].notna()]
        # Machines differ in their numbers of threads: those are no part of what is compared, the state of the cache is.
        sides.append(table.assign(key=[r.key[:-1] for r in table["row"]]))
    both = sides[0].merge(sides[1], on="key", how="outer", indicator=True, sort=False)
    lines = []
    for one, two in both[both["_merge"] == "both"][["row_x", "row_y"]].itertuples(index=False):
        s, t = one.timing, two.timing
        apart, ratio = s.ci_high_us < t.ci_low_us or t.ci_high_us < s.ci_low_us, s.p50_us / t.p50_us
        lines.append({
            "case": f"{one.case.describe()}, {one.execution}", "provider": one.provider, "A, us": f"{s.p50_us:.4g}",
            "B, us": f"{t.p50_us:.4g}", "A / B": f"{'▼ ' if apart and ratio < 1 else ''}{ratio:.3f}",
            "": "" if apart else "within the noise",
        })  # fmt: skip
    only = both["_merge"].value_counts()
    said = f"{len(lines)} measurements on both sides; {only['left_only']} only in A, {only['right_only']} only in B"
    return text_table(lines), said


def name_of(rows: Sequence[Row], fallback: str) -> str:
    """What distinguishes a set of rows: its device and commit."""
    devices = sorted({row.device.name for row in rows})
    commits = sorted({(row.source.commit or row.source.digest)[:10] for row in rows})
    return f"{fallback} ({', '.join(devices)}; {', '.join(commits[:3])})" if rows else fallback
