"""The demo's report: one HTML page, made as the benchmark's is."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from lstm_triton import environment
from lstm_triton.bench import tables
from lstm_triton.bench.report import curves, write_page
from lstm_triton.bench.rows import Row
from lstm_triton.demo.train import Point


def write(
    path: Path, curve: Sequence[Point], unigram: float, said: Mapping[str, Sequence[str]], rows: Sequence[Row]
) -> None:
    """Write the page to `path`, at once or not at all. unigram: bits of character frequencies alone; said: what was printed of
    each section, by its title; rows: what was timed."""
    points = DataFrame(curve, columns=Point._fields).set_index("tokens")[["train_bits", "validation_bits"]]
    lines = points.set_axis(["training", "validation"], axis="columns")
    labels = ("bits per character", "characters trained on", "bits per character")
    picture = curves(labels, lines, (unigram, f"character frequencies alone: {unigram:.2f}"), log=False)
    sections: list[dict[str, Any]] = [dict(title=title, texts=texts) for title, texts in said.items()]
    sections[0]["figures"] = [("Training and held-out text.", [picture])]
    sections[-1]["table"] = tables.timings(rows, tables.comparisons(rows))
    lead = f"Version {environment.__version__}, {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}."
    write_page(path, "lstm_triton on this machine", [lead], [dict(sections=sections)])
