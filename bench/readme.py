"""Tables for the README, written between markers from rows only."""

import os
from collections.abc import Sequence
from pathlib import Path

from . import schema, select, tables
from .select import Row
from .store import StoreError

BEGIN, END = "<!-- benchmark: begin (written by lstm-triton bench --readme) -->", "<!-- benchmark: end -->"


def update(path: Path, rows: Sequence[Row]) -> None:
    """Replace what stands between the markers of a file.

    Raises:
        StoreError: no such file, or no pair of markers in it; rows that are synthetic.
    """
    if any(row["synthetic"] for row in rows):
        raise StoreError("synthetic rows are no results: they do not go into a README")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise StoreError(f"{path} needs one line\n{BEGIN}\nand after it one line\n{END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(f"{before}{BEGIN}\n\n{markdown(rows)}\n{END}{after}", encoding="utf-8")
    os.replace(unfinished, path)


def markdown(rows: Sequence[Row]) -> str:
    """The tables of every device."""
    parts = []
    for device, of_device in select.by_device(select.latest(rows)).items():
        is_cpu = of_device[0]["device"]["type"] == "cpu"
        parts.append(f"### {device}" + (f" ({schema.CPU_LABEL})" if is_cpu else ""))
        newest = max(of_device, key=lambda r: r["date"])
        versions = newest["versions"]
        commit = (newest["source"]["commit"] or "installed")[:12] + (
            " with changes" if newest["source"]["dirty"] else ""
        )
        parts.append(
            f"torch {versions['torch']}, triton {versions.get('triton')}, {newest['date'][:10]}, commit {commit}"
        )
        for title, table in (
            ("Speed against hidden size; speed-up above 1: this package is ahead", tables.headline(of_device)),
            ("Memory of a training step", tables.memory(of_device)),
            ("Accuracy against float64", tables.accuracy(of_device)),
        ):
            if table.rows:
                parts += [f"**{title}**", table.markdown()]
        behind = select.losses(select.groups(of_device))
        compared = sum(g.speedup() is not None for g in select.groups(of_device))
        if compared:
            parts.append(f"In {len(behind)} of {compared} comparisons torch is ahead.")
    return "\n\n".join(parts) + "\n"
