"""Two sets of rows side by side: two GPUs, two commits."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import page, select
from .cases import Case, row_key
from .select import Row
from .tables import Table


@dataclass(frozen=True)
class Pair:
    """The same measurement on both sides. Times in microseconds per call; clear: the confidence intervals do not meet."""

    case: Case
    provider: str
    execution: str
    a_us: float
    b_us: float
    clear: bool


@dataclass(frozen=True)
class Comparison:
    """Pairs in order of the first side, and how many measurements have no other half."""

    pairs: Sequence[Pair]
    only_a: int
    only_b: int


def compare(a: Sequence[Row], b: Sequence[Row]) -> Comparison:
    """Pairs of timed rows of the same case, provider and execution; of repeated ones the newest."""
    sides = []
    for rows in (a, b):
        timed = [row for row in select.latest(rows) if row["kind"] == "timing" and row["timing"]]
        # Machines differ in their numbers of threads: those are no part of what is compared, the state of the cache is.
        sides.append({(row_key(row)[:-1], row["l2"]): row for row in timed})
    pairs = []
    for key, first in sides[0].items():
        if key in sides[1]:
            one, two = first["timing"], sides[1][key]["timing"]
            apart = one["ci_high_us"] < two["ci_low_us"] or two["ci_high_us"] < one["ci_low_us"]
            case = Case.from_json(first["case"])
            pairs.append(Pair(case, first["provider"], first["execution"], one["p50_us"], two["p50_us"], apart))
    both = len(pairs)
    return Comparison(pairs, len(sides[0]) - both, len(sides[1]) - both)


def name_of(rows: Sequence[Row], fallback: str) -> str:
    """What distinguishes a set of rows: its device and commit."""
    if not rows:
        return fallback
    devices = sorted({row["device"]["name"] for row in rows})
    commits = sorted({(row["source"]["commit"] or row["source"]["digest"])[:10] for row in rows})
    return f"{fallback} ({', '.join(devices)}; {', '.join(commits[:3])})"


def table(found: Comparison) -> Table:
    body: list[list[str]] = []
    marks: set[tuple[int, int]] = set()
    for pair in found.pairs:
        ratio = pair.a_us / pair.b_us
        if pair.clear and ratio < 1:
            marks.add((len(body), 4))
        how = "" if pair.clear else "within the noise"
        body.append([f"{pair.case.describe()}, {pair.execution}", pair.provider, f"{pair.a_us:.4g}", f"{pair.b_us:.4g}",
                     f"{ratio:.3f}", how])  # fmt: skip
    return Table(("case", "provider", "A, us", "B, us", "A / B", ""), body, frozenset(marks))


def text(found: Comparison, a: str, b: str) -> str:
    """For the terminal."""
    lines = [f"A: {a}", f"B: {b}", "A / B above 1: B is faster", ""]
    rows = [table(found).head, *table(found).rows]
    widths = [max(len(row[k]) for row in rows) for k in range(6)]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    lines.append("")
    lines.append(f"{len(found.pairs)} measurements on both sides; {found.only_a} only in A, {found.only_b} only in B")
    return "\n".join(lines)


def write(path: Path, found: Comparison, a: str, b: str) -> None:
    """The same as a page."""
    lead = page.paragraph(f"A: {a}") + page.paragraph(f"B: {b}") + page.paragraph("A / B above 1: B is faster.")
    lead += page.paragraph(f"{found.only_a} measurements only in A, {found.only_b} only in B.", "quiet")
    section = page.Section(
        "pairs", "Both sides", table(found).html() if found.pairs else page.paragraph("Nothing in common.")
    )
    html = page.html("lstm_triton: two sets of rows", lead, [page.Part("compared", "Side by side", "", [section])])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(html, encoding="utf-8")
    os.replace(unfinished, path)
