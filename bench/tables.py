"""Make tables from rows: DataFrames whose index is the first column, of text and of speed-ups, which are numbers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pandas import DataFrame, json_normalize

from .cases import Case, workloads
from .providers import OURS, torchs
from .rows import Row, number, words

# The ways in which this package is compared.
WAYS = {
    "kernels": "the fastest of this package's Triton backends that is right, each forced",
    "auto": "what is taken when no backend is asked for, which may be cuDNN itself",
}


def newest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The newest row of each measurement by machine, GPUs before CPUs. A machine is a device under its settings: a flushed L2
    cache, or another number of threads, makes another one."""
    found: dict[str, dict[tuple, Row]] = {}
    for row in sorted(rows, key=lambda r: (r.device.type == "cpu", r.l2 == "flushed", r.date)):
        machine = row.device.name + (", L2 cache flushed before each call" if row.l2 == "flushed" else "")
        machine += f", {n} thread{'s' * (n > 1)}" if (n := row.device.threads) else ""
        found.setdefault(machine, {})[row.task, row.pair, row.kind == "anchor" and row.date] = row
    return {machine: list(of.values()) for machine, of in found.items()}


def comparisons(rows: Iterable[Row]) -> DataFrame:
    """A line for each time, `of` a provider, and once more for each of WAYS that there is. torch: the row of the fastest that
    torch alone can do with the case, or None; ratio: its time over this one; lost: whether it is ahead beyond what the samples
    leave open."""
    found: dict[tuple[str, Case, str], dict[str, Any]] = {}
    for row in rows:
        if row.kind == "timing" and row.timing:
            found.setdefault((row.suite, row.case, row.execution), {})[row.provider] = row
    lines = []
    for (suite, case, execution), by in found.items():
        kernels = [r for n, r in by.items() if n.startswith("lstm_triton") and (r.backend or "").startswith("triton")]
        theirs = [row for name, row in by.items() if name == torchs(case) or name.startswith("torch by hand")]
        kernel, torch = (min(of, key=lambda r: r.timing.p50_us, default=None) for of in (kernels, theirs))
        said = case.describe() + ", graph" * (execution == "graph")
        about = [suite, case, said, case.dtype_name, case.mode, execution, case.hidden_size, case.batch, case.length]
        everyone: dict[str, Any] = {"kernels": kernel, "auto": by.get(OURS)} | by
        for name, row in everyone.items():
            if row:
                ratio = torch.timing.p50_us / row.timing.p50_us if torch else None
                lost = torch is not None and row.timing.ci_low_us > torch.timing.ci_high_us
                lines.append([*about, name, row, row.timing.us_per_step, torch, ratio, lost])
    about = ["suite", "case", "said", "dtype", "mode", "execution", "hidden size", "batch", "length"]
    return DataFrame(lines, columns=[*about, "of", "row", "us", "torch", "ratio", "lost"])


def frame(lines: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Make a table; its first column becomes the index."""
    table = DataFrame(list(lines), dtype=object)
    table = table.where(table.notna(), "")
    return table.set_index(table.columns[0]) if len(table) else table


def text(cell: Any) -> str:
    """Return a cell as text; a speed-up is marked where torch is ahead."""
    return f"{'▼ ' if cell < 1 else ''}{cell:.2f}" if isinstance(cell, float) else str(cell)


def timings(rows: Sequence[Row], found: DataFrame, base: str | None = None) -> DataFrame:
    """List microseconds per step of every provider, the speed-ups, cuDNN's algorithm, the kernels' distance from the floor.
    base: the name of a case; beside each time stands its multiple of the same provider's there."""
    names = [name for name in found["of"].unique() if name not in WAYS]
    bases = {(of.case.mode, of.of): of.us for of in found.itertuples() if of.case.name == base}

    def time(mode: str, name: str, us: float | None) -> str:
        other = bases.get((mode, name))
        return number(us) + (f" (x{us / other:.2f})" if us and other else "")

    order = ["mode"] if base else ["hidden size", "batch", "length", "dtype", "mode", "execution"]
    of_cases = found.sort_values(order, kind="stable").groupby(["suite", "case", "execution"], sort=False)
    lines = []
    for (suite, case, _), of in of_cases:
        of, first = of.set_index("of"), of.iloc[0]
        us, ratio, row = of["us"], of["ratio"], of["row"]
        lines.append(
            {"case": f"{case.name}: " * bool(base or suite == "real") + first["said"]}
            | {f"{name}, us/step": time(case.mode, name, us.get(name)) for name in names}
            | {"speed-up of kernels": ratio.get("kernels"), "of auto": ratio.get("auto")}
            | {"auto takes": row["auto"].backend if "auto" in of.index else None}
            | {"cuDNN algorithm": first["torch"].algorithm if first["torch"] else None}
            | {"kernels, times the floor": number(row["kernels"].distance) if "kernels" in of.index else ""}
        )
    return frame(lines)


def count_lost(rows: Sequence[Row], found: DataFrame) -> DataFrame:
    """Count in how many comparisons torch is ahead of each way, beyond what the samples leave open."""
    known = found[found["ratio"].notna()]
    by_way = ((f"{way}: {what}", known[known["of"] == way]["lost"]) for way, what in WAYS.items())
    return frame({"compared": what, "torch is ahead in": f"{of.sum()} of {len(of)}"} for what, of in by_way if len(of))


def lost(rows: Sequence[Row], found: DataFrame, ways: Iterable[str] = WAYS, theirs: str | None = None) -> DataFrame:
    """List where torch (or only its provider `theirs`) is ahead, the worst first, with what is known of why; at most 60."""
    lines = []
    for way in ways:
        worse = found[found["lost"] & (found["of"] == way)].sort_values("ratio", kind="stable")
        of_theirs = [of for of in worse.itertuples() if theirs in (None, of.torch.provider)]
        for said, mine, torch, ratio in [(of.said, of.row, of.torch, of.ratio) for of in of_theirs][:60]:
            distance = f"{mine.distance:.1f} times the floor" if mine.distance else ""
            beside = f"cuDNN: {torch.algorithm}" if torch.algorithm else f"beside {torch.provider}"
            cells = {"case": said, "speed-up": ratio, "ours, us/step": number(mine.timing.us_per_step)}
            cells |= {"torch, us/step": number(torch.timing.us_per_step), "compared": way}
            cells |= {"what ran": mine.backend if way == "auto" else mine.provider}
            lines.append(
                cells | {"what is known of why": "; ".join(filter(None, (mine.backend_reason, beside, distance)))}
            )
    return frame(lines)


def sources(rows: Sequence[Row], found: DataFrame) -> DataFrame:
    """List where the shapes of the real workloads come from."""
    return frame(
        {"workload": row["id"], "project": row["project"], "source of the shape": row["source"]}
        | {"remark": case.note if case else f"not run: {row['run'].removeprefix('no: ')}"}
        for row, case in (workloads() if len(found) else ())
    )


def readings(rows: Sequence[Row], found: DataFrame) -> DataFrame:
    """List what rows without a time say, by case and provider: errors, bytes, host times, first calls, roofs."""
    good = sorted((r for r in rows if r.status == "ok"), key=lambda r: (r.case.form, r.case.hidden_size, r.case.length))
    cells: dict[str, dict[str, str]] = {}
    for row in good:
        cells.setdefault(row.case.describe(), {})[row.provider] = words(row)
    return frame({"case": case} | of for case, of in cells.items())


def not_timed(rows: Sequence[Row], found: DataFrame) -> DataFrame:
    """List what was wrong, failed or was skipped, and why; equal reasons appear once."""
    lines = [{"what": r.status, "provider": r.provider, "why": r.reason} for r in rows if r.kind != "anchor"]
    counts = DataFrame(lines, columns=["what", "provider", "why"]).dropna().value_counts(sort=False).reset_index()
    counts = counts.sort_values("what", key=lambda status: status.map("wrong failed skipped".find), kind="stable")
    return counts.rename(columns={"count": "rows"}).astype(str).set_index("what")


def environment(rows: Sequence[Row], found: DataFrame) -> DataFrame:
    """List what the rows were taken on and by, and how steady it was."""
    facts = {"rows": str(len(rows))}
    seen = json_normalize([asdict(row) for row in rows], max_level=1)
    for name, values in seen.filter(regex=r"^(device|versions|source|state)\.|^(date|l2|command)$").items():
        known = list(map(number if values.dtype == float else str, sorted(values.dropna().unique())))
        if known:
            is_range = len(known) > 1 and name.startswith(("state.", "date"))
            facts[name] = f"{known[0]} to {known[-1]}" if is_range else "; ".join(known[:8])
    times = [r.timing.p50_us for r in rows if r.kind == "anchor" and r.timing]
    if len(times) > 1:  # what the repeated anchor case says of the machine's steadiness
        moved = f"measured {len(times)} times, moved by {max(times) / min(times) - 1:.1%}"
        facts["drift"] = f"the same anchor case, {moved}; smaller differences than that mean nothing here"
    return frame({"what": name, "is": value} for name, value in facts.items())


def side_by_side(a: Sequence[Row], b: Sequence[Row]) -> tuple[DataFrame, str]:
    """Pair timed rows of the same case, provider and execution, and say how many there are on one side only."""
    # Machines differ in their numbers of threads: those are no part of what is compared, the state of the cache is.
    timed = ((r for of in newest(side).values() for r in of if r.kind == "timing" and r.timing) for side in (a, b))
    one, two = (dict[tuple, Any](((r.task, r.pair, r.l2), r) for r in side) for side in timed)
    lines = []
    for key in filter(two.__contains__, one):
        row, s, t = one[key], one[key].timing, two[key].timing
        apart, ratio = s.ci_high_us < t.ci_low_us or t.ci_high_us < s.ci_low_us, s.p50_us / t.p50_us
        line = {"case": f"{row.case.describe()}, {row.execution}", "provider": row.provider, "A, us": f"{s.p50_us:.4g}"}
        line |= {"B, us": f"{t.p50_us:.4g}", "A / B": f"{'▼ ' if apart and ratio < 1 else ''}{ratio:.3f}"}
        lines.append(line | {"": "" if apart else "within the noise"})
    only = len(one) - len(lines), len(two) - len(lines)
    return frame(lines), f"{len(lines)} measurements on both sides; {only[0]} only in A, {only[1]} only in B"
