"""The demo's report: one HTML page, made as the benchmark's is."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from lstm_triton import environment
from lstm_triton.bench import figures
from lstm_triton.bench.report import Part, Section, figure, write_page
from lstm_triton.demo.train import Point


def write(path: Path, curve: Sequence[Point], unigram: float, said: Mapping[str, Sequence[str]]) -> None:
    """Write the page to `path`; a page from an earlier run is replaced at once or not at all.

    unigram: bits per character of character frequencies alone; said: by the title of a section what was printed of it. The
    figure stands in the first one.
    """
    lines = {
        "training": [(p.tokens, p.train_bits) for p in curve if p.step > 0],
        "validation": [(p.tokens, p.validation_bits) for p in curve],
    }
    labels = ("bits per character", "characters trained on", "bits per character")
    picture = figures.curves(labels, lines, (unigram, f"character frequencies alone: {unigram:.2f}"), log=False)
    sections = []
    for k, (title, texts) in enumerate(said.items()):
        body = figure("Training and held-out text.", picture) if k == 0 else Markup("")
        sections.append(Section(f"part{k}", title, Markup("").join(map(_paragraph, texts)) + body))
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    lead = [f"Version {environment.__version__}, {now}."]
    write_page(path, "lstm_triton on this machine", lead, [Part("demo", "", "", sections)])


def _paragraph(text: str) -> Markup:
    """Text of several lines stands as it was printed."""
    return Markup('<div class="scroll"><pre>{}</pre></div>' if "\n" in text else "<p>{}</p>").format(text)
