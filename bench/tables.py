"""From rows to tables: DataFrames of text whose index is the first column, shown as HTML and Markdown alike."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from pandas import DataFrame

from .choice import torchs
from .providers import OURS
from .rows import Row, number

# This package is compared in two ways: its kernels, each forced, of which the fastest counts, and what auto takes.
WAYS = ("kernels", "auto")
# What the layer promises: a variant's time over that of padded batch rows without resets, of the same provider.
PROMISES = {"packed": 1.5, "resets": 1.05}


def newest(rows: Iterable[Row]) -> DataFrame:
    """The newest row of each measurement on each machine, one line each, GPUs before CPUs.

    A machine is a device under its settings: a flushed L2 cache, or another number of threads, makes another one.
    """
    names = ("suite", "kind", "status", "provider", "execution", "case", "date")
    lines = []
    for row in sorted(rows, key=lambda r: (r.device.type == "cpu", r.l2 == "flushed")):
        machine = row.device.name + (", L2 cache flushed before each call" if row.l2 == "flushed" else "")
        machine += f", {n} thread{'s' * (n > 1)}" if (n := row.device.threads) else ""
        line = {"row": row, "machine": machine, "us": row.timing.p50_us if row.timing else None}
        line["key"] = row.key, row.kind == "anchor" and row.date
        lines.append(line | {name: getattr(row, name) for name in names})
    table = DataFrame(lines, columns=["row", "machine", "us", "key", *names])
    return table.sort_values("date", kind="stable").drop_duplicates(["machine", "key"], keep="last").sort_index()


def _timed(table: DataFrame) -> DataFrame:
    return table[(table["kind"] == "timing") & table["us"].notna()]


def comparisons(table: DataFrame) -> DataFrame:
    """One line for each suite, case and execution that was timed: `rows` by provider, and for kernels, auto and torchs the
    row; torch's time over that of kernels and of auto, and whether torch is ahead beyond what the samples leave open.
    """
    found = []
    for (suite, case, execution), group in _timed(table).groupby(["suite", "case", "execution"], sort=False):
        by = dict(zip(group["provider"], group["row"]))
        kernels = [r for n, r in by.items() if n.startswith("lstm_triton") and (r.backend or "").startswith("triton")]
        line: dict[str, Any] = {"suite": suite, "case": case, "execution": execution, "rows": by, "auto": by.get(OURS)}
        line |= {"dtype": case.dtype_name, "mode": case.mode, "H": case.hidden_size, "B": case.batch}
        line["kernels"] = min(kernels, key=lambda r: r.timing.p50_us, default=None)
        theirs: Any = by.get(torchs(case))
        line["torchs"] = theirs
        for way in WAYS:
            mine, both = line[way], line[way] and theirs
            line[f"{way}_ratio"] = theirs.timing.p50_us / mine.timing.p50_us if both else None
            line[f"{way}_lost"] = bool(both and mine.timing.ci_low_us > theirs.timing.ci_high_us)
        found.append(line)
    columns = (
        "suite case execution dtype mode H B rows torchs kernels auto kernels_ratio auto_ratio kernels_lost auto_lost"
    )
    return DataFrame(found, columns=columns.split(), dtype=object)


def text_table(lines: Iterable[Mapping[str, Any]]) -> DataFrame:
    """A table of text; its first column becomes the index."""
    table = DataFrame(list(lines), dtype=object).fillna("")
    return table.set_index(table.columns[0]) if len(table) else table


def html(table: DataFrame, texts: bool = False) -> Markup:
    """The table for the page; empty without rows. texts: cells are sentences, not figures. Markup in cells is kept."""
    if not len(table):
        return Markup("")
    shown = (
        table.rename_axis(None).rename_axis(table.index.name, axis=1).rename(index=Markup.escape, columns=Markup.escape)
    )
    body = Markup(shown.map(Markup.escape).to_html(border=0, escape=False))
    return Markup('<div class="scroll{}">{}</div>').format(" texts" if texts else "", body)


def markdown(table: DataFrame) -> str:
    lines = [[table.index.name, *table.columns], ["---", *["---:"] * len(table.columns)], *table.itertuples()]
    return "\n".join(f"| {' | '.join(str(text).replace('|', chr(92) + '|') for text in line)} |" for line in lines)


def plain(table: DataFrame) -> str:
    """The table for a terminal."""
    return table.reset_index().to_string(index=False, justify="left") if len(table) else ""


def _ratio(value: float | None) -> str:
    """A speed-up, marked where torch is ahead."""
    return "" if value is None else f"{'▼ ' if value < 1 else ''}{value:.2f}"


def _described(line: Any) -> str:
    return line.case.describe() + (", graph" if line.execution == "graph" else "")


def timings(table: DataFrame, found: DataFrame, base: str | None = None) -> DataFrame:
    """Microseconds per step of every provider, the speed-ups, cuDNN's algorithm, the kernels' distance from the floor.

    base: the name of a case; beside each time stands its multiple of the same provider's there, marked beyond PROMISES.
    """
    names = list(dict.fromkeys(name for rows in found["rows"] for name in rows))
    bases = {line.mode: line.rows for line in found.itertuples() if line.case.name == base}

    def order(line: Any) -> Any:
        return line.mode if base else (line.H, line.B, line.case.length, line.dtype, line.mode, line.execution)

    def time(line: Any, name: str) -> str:
        row, other = line.rows.get(name), bases.get(line.mode, {}).get(name)
        if not (row and other):
            return number(row and row.timing.us_per_step)
        multiple = row.timing.p50_us / other.timing.p50_us
        broken = name.startswith("lstm_triton") and multiple > PROMISES.get(line.case.name, multiple)
        return f"{number(row.timing.us_per_step)} ({'▼ ' if broken else ''}x{multiple:.2f})"

    return text_table(
        {"case": (f"{line.case.name}: " if base else "") + _described(line)}
        | {f"{name}, us/step": time(line, name) for name in names}
        | {"speed-up of kernels": _ratio(line.kernels_ratio), "of auto": _ratio(line.auto_ratio)}
        | {"auto takes": line.auto and line.auto.backend, "cuDNN algorithm": line.torchs and line.torchs.algorithm}
        | {"kernels, times the floor": number(line.kernels and line.kernels.distance)}
        for line in sorted(found.itertuples(), key=order)
    )


def count_lost(table: DataFrame, found: DataFrame) -> DataFrame:
    """In how many comparisons torch is ahead of each way, beyond what the samples leave open."""
    who = {"kernels": "this package's kernels", "auto": "what is taken when no backend is asked for"}
    counts = {way: (sum(found[f"{way}_lost"]), int(found[f"{way}_ratio"].notna().sum())) for way in WAYS}
    return text_table(
        {"compared": who[way], "torch is ahead in": f"{lost} of {n}"} for way, (lost, n) in counts.items() if n
    )


def lost(table: DataFrame, found: DataFrame, ways: Sequence[str] = WAYS, theirs: str | None = None) -> DataFrame:
    """Where torch (or only its provider `theirs`) is ahead, the worst first, with what the rows know of why; at most 60."""
    lines = []
    for way in ways:
        for line in found[found[f"{way}_lost"].astype(bool)].sort_values(f"{way}_ratio").head(60).itertuples():
            mine, torch = getattr(line, way), line.torchs
            distance = f"{mine.distance:.1f} times the floor" if mine.distance else ""
            why = mine.backend_reason, torch.algorithm and f"cuDNN: {torch.algorithm}", distance
            cells = {"case": _described(line), "speed-up": f"{getattr(line, f'{way}_ratio'):.2f}"}
            us = {"ours, us/step": mine.timing.us_per_step, "torch, us/step": torch.timing.us_per_step}
            cells |= {name: number(value) for name, value in us.items()}
            cells |= {"compared": way, "what ran": mine.backend if way == "auto" else mine.provider}
            cells |= {"what is known of why": "; ".join(text for text in why if text)}
            lines += [cells] if theirs in (None, torch.provider) else []
    return text_table(lines)


# By the end of a name: what a figure is divided by, and its unit then.
_UNITS = {"_bytes_per_s": (1e9, "GB/s"), "_flops_per_s": (1e12, "TFLOP/s"), "_bytes": (2**20, "MiB")}
_UNITS |= {"_us": (1, "us"), "_s": (1, "s"), "": (1, "")}


def _figures(row: Row) -> dict[str, str]:
    """The figures of a row that has no time, with their units."""
    found = {}
    for name, value in {**(row.values or {}), **{f"{n}_bytes": v for n, v in (row.bytes or {}).items()}}.items():
        end, (size, unit) = next((end, how) for end, how in _UNITS.items() if name.endswith(end))
        found[f"{name.removesuffix(end).replace('_', ' ')}{', ' * (unit != '')}{unit}"] = number(value / size)
    return found


def readings(table: DataFrame, found: DataFrame) -> DataFrame:
    """List the figures of rows that have no time: bytes, host times, first calls."""
    rows = sorted(table[table["status"] == "ok"]["row"], key=lambda r: (r.case.name, r.case.dtype, r.case.mode))
    what = ({"case": f"{r.case.name}, {r.case.dtype} {r.case.mode}", "provider": r.provider} for r in rows)
    return text_table(w | _figures(r) | {"remark": r.label or ""} for w, r in zip(what, rows))


def roofs(table: DataFrame, found: DataFrame) -> DataFrame:
    """List the measured limits of the device."""
    rows = table[table["status"] == "ok"]["row"]
    return text_table({"what": n, "measured": f} for r in rows for n, f in _figures(r).items())


_COLUMNS = {"y": "y", "h_n": "h_n, c_n", "c_n": "h_n, c_n", "dx": "dx", "dh0": "dh0, dc0", "dc0": "dh0, dc0"}


def accuracy(table: DataFrame, found: DataFrame, by_shape: bool = False) -> DataFrame:
    """The largest max and RMS error of each provider by dtype and input scale: over all shapes, or for each of them."""
    names, lines = list(dict.fromkeys([*_COLUMNS.values(), "dW, db"])), []
    for row in table[(table["kind"] == "accuracy") & table["status"].isin(("ok", "wrong"))]["row"]:
        case, who = row.case, row.provider + (" (interpreted)" if "interpreter" in (row.label or "") else "")
        sizes = f"cell H{case.hidden_size}, " if case.form == "cell" else f"layer H{case.hidden_size} T{case.length}, "
        order = (case.form != "cell", case.hidden_size, case.length) if by_shape else ()
        what = (sizes if by_shape else "") + f"{case.dtype_name}, input x{case.scale:g}"
        for name, e in (row.errors or {}).items():
            key = {"order": order, "case": what, "provider": who, "column": _COLUMNS.get(name, "dW, db")}
            lines.append(key | {"max": e.max, "rms": e.rms})
    if not lines:
        return DataFrame()
    worst = DataFrame(lines).groupby(["order", "case", "provider", "column"])[["max", "rms"]].max()
    texts = worst.apply(lambda e: f"{e['max']:.1e} / {e['rms']:.1e}", axis=1).unstack().fillna("")
    texts = texts[[name for name in names if name in texts]].rename(columns="{}: max / RMS".format)
    return texts.reset_index(level="provider").droplevel("order").rename_axis(columns=None)


def not_timed(table: DataFrame, found: DataFrame) -> DataFrame:
    """List what was wrong, failed or was skipped, and why; equal reasons appear once."""
    counts = Counter((r.status, r.provider, r.reason) for r in table["row"] if r.status != "ok" and r.kind != "anchor")
    order = sorted(counts, key=lambda what: (("wrong", "failed", "skipped").index(what[0]), what))
    return text_table({"what": s, "provider": p, "why": w, "rows": str(counts[s, p, w])} for s, p, w in order)


def side_by_side(a: Sequence[Row], b: Sequence[Row]) -> tuple[DataFrame, str]:
    """Timed rows of the same case, provider and execution, and a sentence on how many there are on one side only."""
    # Machines differ in their numbers of threads: those are no part of what is compared, the state of the cache is.
    sides = [t.assign(key=[r.key[:-1] for r in t["row"]]) for t in (_timed(newest(rows)) for rows in (a, b))]
    both = sides[0].merge(sides[1], on="key", how="outer", indicator=True, sort=False)
    lines = []
    for one, two in both[both["_merge"] == "both"][["row_x", "row_y"]].itertuples(index=False):
        s, t = one.timing, two.timing
        apart, ratio = s.ci_high_us < t.ci_low_us or t.ci_high_us < s.ci_low_us, s.p50_us / t.p50_us
        line = {"case": f"{one.case.describe()}, {one.execution}", "provider": one.provider, "A, us": f"{s.p50_us:.4g}"}
        line |= {"B, us": f"{t.p50_us:.4g}", "A / B": f"{'▼ ' if apart and ratio < 1 else ''}{ratio:.3f}"}
        lines.append(line | {"": "" if apart else "within the noise"})
    only = both["_merge"].value_counts()
    said = f"{len(lines)} measurements on both sides; {only['left_only']} only in A, {only['right_only']} only in B"
    return text_table(lines), said
