"""Tables for Markdown pages, written between markers from rows only: all of them, or for a README a summary."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from . import schema, select, tables
from .select import Row
from .store import StoreError

BEGIN, END = "<!-- benchmark: begin (written by lstm-triton bench --readme) -->", "<!-- benchmark: end -->"
SUMMARY_BEGIN = "<!-- benchmark summary: begin (written by lstm-triton bench --readme) -->"
SUMMARY_END = "<!-- benchmark summary: end -->"


def update(path: Path, rows: Sequence[Row]) -> None:
    """Replace what stands between the markers of a file: the summary's, those of all tables, or both.

    Raises:
        StoreError: no such file, or no pair of markers in it; rows that are synthetic.
    """
    if any(row["synthetic"] for row in rows):
        raise StoreError("synthetic rows are no results: they do not go into a README")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error
    pairs: Sequence[tuple[str, str, Callable[[Sequence[Row]], str]]] = (
        (SUMMARY_BEGIN, SUMMARY_END, summary),
        (BEGIN, END, markdown),
    )
    found = [(begin, end, make) for begin, end, make in pairs if begin in text or end in text]
    for begin, end, make in found or pairs[1:]:
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise StoreError(
                f"{path} needs one line\n{begin}\nand after it one line\n{end}\n(or, for a summary, {SUMMARY_BEGIN})"
            )
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{make(rows)}\n{end}{rest.split(end)[1]}"
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def markdown(rows: Sequence[Row]) -> str:
    """The tables of every device."""
    return _of_every_device(
        rows,
        (
            ("Speed against hidden size; speed-up above 1: this package is ahead", tables.headline),
            ("One step: the cell", tables.cells),
            ("What features cost", tables.features),
            ("Memory of a training step", tables.memory),
            ("Accuracy against float64, over all shapes", tables.accuracy),
            ("Accuracy against float64, by hidden size and length", lambda r: tables.accuracy(r, by_shape=True)),
            ("Where torch is ahead of the kernels, the worst first", lambda r: tables.lost(r, "kernels", 30)),
            ("Where torch is ahead of what is taken by itself", lambda r: tables.lost(r, "auto", 30)),
        ),
    )


def summary(rows: Sequence[Row]) -> str:
    """The headline of every device, for bfloat16 or the first dtype there is, and how many comparisons are lost."""
    return _of_every_device(rows, (("Speed against hidden size; above 1: this package is ahead", _headline),))


def _headline(rows: Sequence[Row]) -> tables.Table:
    dtypes = [row["case"]["dtype"] for row in rows if row["suite"] == "hidden-sizes"]
    dtype = "bfloat16" if "bfloat16" in dtypes else next(iter(dtypes), "")
    return tables.headline([row for row in rows if row["case"]["dtype"] == dtype])


def _of_every_device(rows: Sequence[Row], makers: Sequence[tuple[str, Callable[[Sequence[Row]], tables.Table]]]) -> str:
    parts = []
    for device, of_device in select.by_device(select.latest(rows)).items():
        is_cpu = of_device[0]["device"]["type"] == "cpu"
        parts.append(f"### {device}" + (f" ({schema.CPU_LABEL})" if is_cpu else ""))
        newest = max(of_device, key=lambda r: r["date"])
        versions, source = newest["versions"], newest["source"]
        commit = (source["commit"] or "installed")[:12] + (" with changes" if source["dirty"] else "")
        parts.append(
            f"torch {versions['torch']}, triton {versions.get('triton')}, {newest['date'][:10]}, commit {commit}"
        )
        for title, make in makers:
            table = make(of_device)
            if table.rows:
                parts += [f"**{title}**", table.markdown()]
        parts += _losses(of_device)
    return "\n\n".join(parts) + "\n"


def _losses(rows: Sequence[Row]) -> list[str]:
    names = {"kernels": "this package's kernels", "auto": "what is taken when no backend is asked for"}
    timed = select.groups(rows)
    found = []
    for way, speedup_of in select.SPEEDUPS.items():
        compared = sum(speedup_of(g) is not None for g in timed)
        if compared:
            found.append(
                f"In {len(select.losses(timed, way))} of {compared} comparisons torch is ahead of {names[way]}."
            )
    return found
