"""From rows to tables: DataFrames whose index is the first column, of text and of speed-ups, which are numbers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame

from . import suites
from .cases import Case
from .providers import OURS, torchs
from .rows import Row, number, words

# The ways in which this package is compared.
WAYS = {
    "kernels": "the fastest of this package's Triton backends that is right, each forced",
    "auto": "what is taken when no backend is asked for, which may be cuDNN itself",
}


def newest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The newest row of each measurement by machine, GPUs before CPUs.

    A machine is a device under its settings: a flushed L2 cache, or another number of threads, makes another one.
    """
    found: dict[str, dict[tuple, Row]] = {}
    for row in sorted(rows, key=lambda r: (r.device.type == "cpu", r.l2 == "flushed", r.date)):
        machine = row.device.name + (", L2 cache flushed before each call" if row.l2 == "flushed" else "")
        machine += f", {n} thread{'s' * (n > 1)}" if (n := row.device.threads) else ""
        found.setdefault(machine, {})[row.task, row.pair, row.kind == "anchor" and row.date] = row
    return {machine: list(of.values()) for machine, of in found.items()}


@dataclass(frozen=True)
class Comparison:
    """Everyone's rows, by provider, of one case in one suite and execution; and of those the fastest of this package's Triton
    backends, what auto takes, and the fastest that torch alone can do.
    """

    suite: str
    case: Case
    execution: str
    rows: dict[str, Row]
    kernels: Any  # rows, or None
    auto: Any
    torchs: Any

    def ratio(self, way: str) -> float | None:
        """torch's time over that of a way of this package; None where one of them is missing."""
        mine, theirs = getattr(self, way), self.torchs
        return _us(theirs) / _us(mine) if mine and theirs else None

    def lost(self, way: str) -> bool:
        """Whether torch is ahead beyond what the samples leave open."""
        mine, theirs = getattr(self, way), self.torchs
        return bool(mine and theirs) and mine.timing.ci_low_us > theirs.timing.ci_high_us

    def __str__(self) -> str:
        return self.case.describe() + ", graph" * (self.execution == "graph")


def _us(row: Any) -> float:
    return row.timing.p50_us


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """One for each suite, case and execution that was timed."""
    found: dict[tuple[str, Case, str], dict[str, Row]] = {}
    for row in rows:
        if row.kind == "timing" and row.timing:
            found.setdefault((row.suite, row.case, row.execution), {})[row.provider] = row
    made = []
    for key, by in found.items():
        kernels = [r for n, r in by.items() if n.startswith("lstm_triton") and (r.backend or "").startswith("triton")]
        theirs = [row for name, row in by.items() if name == torchs(key[1]) or name.startswith("torch by hand")]
        fastest = (min(some, key=_us, default=None) for some in (kernels, [by[OURS]] if OURS in by else [], theirs))
        made.append(Comparison(*key, by, *fastest))
    return made


def frame(lines: Iterable[Mapping[str, Any]]) -> DataFrame:
    """A table; its first column becomes the index."""
    table = DataFrame(list(lines), dtype=object)
    table = table.where(table.notna(), "")
    return table.set_index(table.columns[0]) if len(table) else table


def text(cell: Any) -> str:
    """A cell as text; a speed-up is marked where torch is ahead."""
    return f"{'▼ ' if cell < 1 else ''}{cell:.2f}" if isinstance(cell, float) else str(cell)


def plain(table: DataFrame) -> str:
    """The table for a terminal."""
    return table.map(text).reset_index().to_string(index=False, justify="left") if len(table) else ""


# ---- The tables: each of rows and of their comparisons.


def timings(rows: Sequence[Row], found: Sequence[Comparison], base: str | None = None) -> DataFrame:
    """Microseconds per step of every provider, the speed-ups, cuDNN's algorithm, the kernels' distance from the floor.

    base: the name of a case; beside each time stands its multiple of the same provider's there.
    """
    names = list(dict.fromkeys(name for c in found for name in c.rows))
    bases = {(c.case.mode, name): row for c in found if c.case.name == base for name, row in c.rows.items()}

    def order(c: Comparison) -> Any:
        k = c.case
        return k.mode if base else (k.hidden_size, k.batch, k.length, k.dtype_name, k.mode, c.execution)

    def time(c: Comparison, name: str) -> str:
        row, other = c.rows.get(name), bases.get((c.case.mode, name))
        us = number(row.timing.us_per_step if row and row.timing else None)
        return f"{us} (x{_us(row) / _us(other):.2f})" if row and other else us

    return frame(
        {"case": f"{c.case.name}: " * bool(base or c.suite == "real") + str(c)}
        | {f"{name}, us/step": time(c, name) for name in names}
        | {"speed-up of kernels": c.ratio("kernels"), "of auto": c.ratio("auto")}
        | {"auto takes": c.auto and c.auto.backend, "cuDNN algorithm": c.torchs and c.torchs.algorithm}
        | {"kernels, times the floor": number(c.kernels and c.kernels.distance)}
        for c in sorted(found, key=order)
    )


def count_lost(rows: Sequence[Row], found: Sequence[Comparison]) -> DataFrame:
    """In how many comparisons torch is ahead of each way, beyond what the samples leave open."""
    counts = {way: (sum(c.lost(way) for c in found), sum(c.ratio(way) is not None for c in found)) for way in WAYS}
    lines = {f"{way}: {WAYS[way]}": f"{lost} of {n}" for way, (lost, n) in counts.items() if n}
    return frame({"compared": what, "torch is ahead in": count} for what, count in lines.items())


def lost(
    rows: Sequence[Row], found: Sequence[Comparison], ways: Iterable[str] = WAYS, theirs: str | None = None
) -> DataFrame:
    """Where torch (or only its provider `theirs`) is ahead, the worst first, with what the rows know of why; at most 60."""
    lines = []
    for way in ways:
        worse = [c for c in found if c.lost(way) and theirs in (None, c.torchs.provider)]
        for c in sorted(worse, key=lambda c: c.ratio(way) or 0.0)[:60]:
            mine, torch = getattr(c, way), c.torchs
            distance = f"{mine.distance:.1f} times the floor" if mine.distance else ""
            beside = f"cuDNN: {torch.algorithm}" if torch.algorithm else f"beside {torch.provider}"
            why = mine.backend_reason, beside, distance
            cells = {"case": str(c), "speed-up": c.ratio(way), "ours, us/step": number(mine.timing.us_per_step)}
            cells |= {"torch, us/step": number(torch.timing.us_per_step), "compared": way}
            cells |= {"what ran": mine.backend if way == "auto" else mine.provider}
            lines.append(cells | {"what is known of why": "; ".join(filter(None, why))})
    return frame(lines)


def sources(rows: Sequence[Row], found: Sequence[Comparison]) -> DataFrame:
    """Where the shapes of the real workloads come from."""
    return frame(
        {"workload": w.id, "project": w.project, "source of the shape": w.source}
        | {"remark": w.case.note if w.case else f"not run: {w.reason}"}
        for w in (suites.workloads() if found else ())
    )


def readings(rows: Sequence[Row], found: Sequence[Comparison]) -> DataFrame:
    """What rows without a time say, by case and provider: errors, bytes, host times, first calls, limits of the device."""
    good = sorted((r for r in rows if r.status == "ok"), key=lambda r: (r.case.form, r.case.hidden_size, r.case.length))
    cells: dict[str, dict[str, str]] = {}
    for row in good:
        cells.setdefault(row.case.describe(), {})[row.provider] = words(row)
    return frame({"case": case} | of for case, of in cells.items())


def not_timed(rows: Sequence[Row], found: Sequence[Comparison]) -> DataFrame:
    """List what was wrong, failed or was skipped, and why; equal reasons appear once."""
    lines = [{"what": r.status, "provider": r.provider, "why": r.reason} for r in rows if r.kind != "anchor"]
    counts = DataFrame(lines, columns=["what", "provider", "why"]).dropna().value_counts(sort=False).reset_index()
    counts = counts.sort_values("what", key=lambda status: status.map("wrong failed skipped".find), kind="stable")
    return counts.rename(columns={"count": "rows"}).astype(str).set_index("what")


def environment(rows: Sequence[Row], found: Sequence[Comparison]) -> DataFrame:
    """What the rows were taken on and by, and how steady it was."""
    rows = sorted(rows, key=lambda r: r.date)
    last, times = rows[-1], [r.timing.p50_us for r in rows if r.kind == "anchor" and r.timing]
    facts = {name: str(value) for name, value in (vars(last.device) | vars(last.versions)).items() if value is not None}
    facts |= {"commits of the rows": ", ".join(sorted({str(r.source) for r in rows}))}
    facts |= {
        "digest of the newest code": last.source.digest,
        "rows": f"{len(rows)}, from {rows[0].date} to {last.date}",
    }
    facts |= {"L2 cache": ", ".join(sorted({r.l2 for r in rows if r.l2})) or "not stated"}
    facts |= {"commands": "; ".join(sorted({r.command for r in rows})[:8])}
    states = DataFrame([r.state for r in rows]).reindex(columns=["sm_clock_mhz", "power_w", "temperature_c"])
    facts |= {str(name): f"{seen.min():g} to {seen.max():g}" for name, seen in states.dropna(axis=1, how="all").items()}
    if len(times) > 1:  # what the repeated anchor case says of the machine's steadiness
        moved = f"measured {len(times)} times, moved by {max(times) / min(times) - 1:.1%}"
        facts["drift"] = f"the same anchor case, {moved}; smaller differences than that mean nothing here"
    return frame({"what": name, "is": value} for name, value in facts.items())


def side_by_side(a: Sequence[Row], b: Sequence[Row]) -> tuple[DataFrame, str]:
    """Timed rows of the same case, provider and execution, and a sentence on how many there are on one side only."""
    # Machines differ in their numbers of threads: those are no part of what is compared, the state of the cache is.
    timed = ((r for of in newest(side).values() for r in of if r.kind == "timing" and r.timing) for side in (a, b))
    one, two = ({(r.task, r.pair, r.l2): r for r in side} for side in timed)
    lines = []
    for key in (key for key in one if key in two):
        row, s, t = one[key], one[key].timing, two[key].timing
        assert s and t
        apart, ratio = s.ci_high_us < t.ci_low_us or t.ci_high_us < s.ci_low_us, s.p50_us / t.p50_us
        line = {"case": f"{row.case.describe()}, {row.execution}", "provider": row.provider, "A, us": f"{s.p50_us:.4g}"}
        line |= {"B, us": f"{t.p50_us:.4g}", "A / B": f"{'▼ ' if apart and ratio < 1 else ''}{ratio:.3f}"}
        lines.append(line | {"": "" if apart else "within the noise"})
    only = len(one) - len(lines), len(two) - len(lines)
    return frame(lines), f"{len(lines)} measurements on both sides; {only[0]} only in A, {only[1]} only in B"
