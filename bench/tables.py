"""From rows to tables: DataFrames of text whose index is the first column, shown as HTML and Markdown alike."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    names = ("suite", "kind", "status", "provider", "execution", "case", "date")
    found: dict[tuple, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: (r.device.type == "cpu", r.l2 == "flushed")):
        machine = row.device.name + (", L2 cache flushed before each call" if row.l2 == "flushed" else "")
        machine += f", {n} thread{'s' * (n > 1)}" if (n := row.device.threads) else ""
        key = machine, row.kind == "anchor" and row.date, row.key
        if key not in found or row.date >= found[key]["date"]:
            line = {name: getattr(row, name) for name in names}
            found[key] = line | {"row": row, "machine": machine, "us": row.timing.p50_us if row.timing else None}
    return DataFrame(list(found.values()), columns=[*names, "row", "machine", "us"])


def comparisons(table: DataFrame) -> DataFrame:
    """One line for each suite, case and execution that was timed: `rows` by provider, and for kernels, auto and torchs the
    row; torch's time over that of kernels and of auto, and whether torch is ahead beyond what the samples leave open.
    """
    timed = table[(table["kind"] == "timing") & table["us"].notna()]
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
            both = line[way] and torchs
            line[f"{way}_ratio"] = torchs.timing.p50_us / line[way].timing.p50_us if both else None
            line[f"{way}_lost"] = bool(both and line[way].timing.ci_low_us > torchs.timing.ci_high_us)
        found.append(line)
    columns = ["suite", "case", "execution", "rows", "kernels", "auto", "torchs"]
    return DataFrame(
        found, columns=columns + [f"{way}_{what}" for way in WAYS for what in ("ratio", "lost")], dtype=object
    )


def of_suite(found: DataFrame, suite: str) -> DataFrame:
    return found[found["suite"] == suite]


def text_table(lines: Sequence[Mapping[str, str]]) -> DataFrame:
    """A table of text; its first column becomes the index."""
    table = DataFrame(list(lines), dtype=object).fillna("")
    return table.set_index(table.columns[0]) if len(table) else table


def count_lost(found: DataFrame) -> DataFrame:
    """In how many comparisons torch is ahead of each way, beyond what the samples leave open."""
    who = {"kernels": "this package's kernels", "auto": "what is taken when no backend is asked for"}
    counts = {way: (sum(found[f"{way}_lost"]), int(found[f"{way}_ratio"].notna().sum())) for way in WAYS}
    lines = [{"compared": who[w], "torch is ahead in": f"{lost} of {n}"} for w, (lost, n) in counts.items() if n]
    return text_table(lines)


def html(table: DataFrame, texts: bool = False) -> Markup:
    """The table for the page; empty without rows. texts: cells are sentences, not figures."""
    if not len(table):
        return Markup("")
    shown = table.rename_axis(None).rename_axis(table.index.name, axis=1).to_html(border=0)
    return Markup('<div class="scroll{}">{}</div>').format(" texts" if texts else "", Markup(shown))


def markdown(table: DataFrame) -> str:
    lines = [[table.index.name, *table.columns], ["---", *["---:"] * len(table.columns)], *table.itertuples()]
    return "\n".join(f"| {' | '.join(str(text).replace('|', chr(92) + '|') for text in line)} |" for line in lines)


def plain(table: DataFrame) -> str:
    """The table for a terminal."""
    return table.reset_index().to_string(index=False, justify="left") if len(table) else ""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    """A speed-up, marked where torch is ahead."""
    return "" if value is None else f"{'▼ ' if value < 1 else ''}{value:.2f}"


def _described(line: Any) -> str:
    return line.case.describe() + (", graph" if line.execution == "graph" else "")


def timings(found: DataFrame, base: str | None = None) -> DataFrame:
    """Microseconds per step of every provider, the speed-ups, cuDNN's algorithm, the kernels' distance from the floor.

    base: the name of a case; beside each time stands its multiple of the same provider's there, marked beyond PROMISES.
    """
    providers = list(dict.fromkeys(name for rows in found["rows"] for name in rows))
    bases = {line.case.mode: line.rows for line in found.itertuples() if line.case.name == base}

    def order(line: Any) -> Any:
        c = line.case
        return c.mode if base else (c.hidden_size, c.batch, c.length, c.dtype_name, c.mode, line.execution)

    lines = []
    for line in sorted(found.itertuples(), key=order):
        cells = {"case": (f"{line.case.name}: " if base else "") + _described(line)}
        for provider in providers:
            row, other = line.rows.get(provider), bases.get(line.case.mode, {}).get(provider)
            text = _figure(row.timing.us_per_step) if row else ""
            if row and other:
                multiple = row.timing.p50_us / other.timing.p50_us
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


# By the end of a name: what a figure is divided by, and its unit then.
_UNITS = {
    "_bytes_per_s": (1e9, "GB/s"),
    "_flops_per_s": (1e12, "TFLOP/s"),
    "_bytes": (2**20, "MiB"),
    "_us": (1, "us"),
    "_s": (1, "s"),
    "": (1, ""),
}


def readings(table: DataFrame, kind: str) -> DataFrame:
    """The figures of the rows of a kind that have no time: bytes, host times, first calls, roofs."""
    lines = []
    for r in sorted(_of_kind(table, kind), key=lambda r: (r.case.name, r.case.dtype, r.case.mode)):
        cells = {"case": f"{r.case.name}, {r.case.dtype} {r.case.mode}", "provider": r.provider}
        for name, value in (
            (r.values or {}) | {f"{n}_bytes": float(size) for n, size in (r.bytes or {}).items()}
        ).items():
            end, (size, unit) = next((end, how) for end, how in _UNITS.items() if name.endswith(end))
            cells[f"{name.removesuffix(end).replace('_', ' ')}{', ' * (unit != '')}{unit}"] = _figure(value / size)
        lines.append(cells | {"remark": r.label or ""})
    return text_table(lines)


_COLUMNS = {"y": "y", "h_n": "h_n, c_n", "c_n": "h_n, c_n", "dx": "dx", "dh0": "dh0, dc0", "dc0": "dh0, dc0"}


def accuracy(table: DataFrame, by_shape: bool = False) -> DataFrame:
    """The largest max and RMS error of each provider by dtype and input scale: over all shapes, or for each of them."""
    worst: dict[tuple, dict[str, tuple[float, float]]] = {}
    for row in _of_kind(table, "accuracy", "ok", "wrong"):
        case, who = row.case, row.provider + (" (interpreted)" if "interpreter" in (row.label or "") else "")
        shape = (case.form != "cell", case.hidden_size, case.length) if by_shape else ()
        entry = worst.setdefault((shape, case.dtype_name, case.scale, who), {})
        for name, e in (row.errors or {}).items():
            column = _COLUMNS.get(name, "dW, db")
            old = entry.get(column, (0.0, 0.0))
            entry[column] = max(old[0], e.max), max(old[1], e.rms)
    lines = []
    for (shape, dtype, scale, who), entry in sorted(worst.items()):
        sizes = (f"layer H{shape[1]} T{shape[2]}, " if shape[0] else f"cell H{shape[1]}, ") if shape else ""
        order = dict.fromkeys(c for c in [*_COLUMNS.values(), "dW, db"] if c in entry)
        errors = {f"{c}: max / RMS": f"{entry[c][0]:.1e} / {entry[c][1]:.1e}" for c in order}
        lines.append({"case": f"{sizes}{dtype}, input x{scale:g}", "provider": who} | errors)
    return text_table(lines)


def lost(found: DataFrame, way: str, torchs: str | None = None, most: int = 60) -> DataFrame:
    """Where torch (or only its provider `torchs`) is ahead of a way, the worst first, with what the rows know of why."""
    lines = []
    for line in found[found[f"{way}_lost"].astype(bool)].sort_values(f"{way}_ratio").itertuples():
        mine, theirs = getattr(line, way), line.torchs
        if torchs in (None, theirs.provider):
            distance = f"{mine.distance:.1f} times the floor" if mine.distance else ""
            why = (mine.backend_reason, theirs.algorithm and f"cuDNN: {theirs.algorithm}", distance)
            us = {
                "ours, us/step": _figure(mine.timing.us_per_step),
                "torch, us/step": _figure(theirs.timing.us_per_step),
            }
            took = {"way": mine.backend if way == "auto" else mine.provider}
            took |= {"what is known of why": "; ".join(text for text in why if text)}
            lines.append({"case": _described(line), "speed-up": f"{getattr(line, f'{way}_ratio'):.2f}"} | us | took)
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
    for table in map(newest, (a, b)):
        timed = table[(table["kind"] == "timing") & table["us"].notna()]
        # Machines differ in their numbers of threads: those are no part of what is compared, the state of the cache is.
        sides.append(timed.assign(key=[r.key[:-1] for r in timed["row"]]))
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


def name_of(rows: Sequence[Row], fallback: str) -> str:
    """What distinguishes a set of rows: its device and commit."""
    devices = sorted({row.device.name for row in rows})
    commits = sorted({(row.source.commit or row.source.digest)[:10] for row in rows})
    return f"{fallback} ({', '.join(devices)}; {', '.join(commits[:3])})" if rows else fallback
