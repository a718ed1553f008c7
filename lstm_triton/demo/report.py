"""The demo's report: one HTML page, made as the benchmark's is."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from lstm_triton import check, environment
from lstm_triton.bench import figures, rows, tables
from lstm_triton.bench.report import Part, Section, figure, page, paragraph
from lstm_triton.demo import timing
from lstm_triton.demo.train import Point


@dataclass(frozen=True)
class Contents:
    """What the page shows; a part that did not run is the reason why, as text."""

    accuracy: check.Report | str
    curve: list[Point]
    unigram_bits: float
    machine: str
    model: str
    backend: str  # what trained the model, and why
    text: str
    prompt: str
    sample: str
    timing: timing.Report | str


def write(path: Path, contents: Contents) -> None:
    """Write the page to `path`; a page from an earlier run is replaced at once or not at all."""
    rows.replace_text(path, render(contents))


def render(contents: Contents) -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    lead = [contents.machine, f"Version {environment.__version__}, {now}."]
    sections = [Section("training", "A language model, trained character by character", _training(contents))]
    if contents.sample:
        drawn = Markup(
            "<p>Drawn one character at a time from Y<sub>t</sub> = softmax(h<sub>t</sub> W + b), beginning with "
            "<code>{}</code>.</p><pre>{}</pre>"
        ).format(repr(contents.prompt), contents.sample)
        sections.append(Section("sample", "What it writes", drawn))
    sections.append(Section("accuracy", "Accuracy of the fused cell", _accuracy(contents.accuracy)))
    sections.append(Section("timing", "Time per timestep", _timing(contents.timing)))
    return page("lstm_triton on this machine", lead, [Part("demo", "", "", sections)])


def _training(contents: Contents) -> Markup:
    if not contents.curve:
        return paragraph(contents.text) + paragraph("Training ended before the first measurement.")
    last, unigram = contents.curve[-1], contents.unigram_bits
    lines = {
        "training": [(p.tokens, p.train_bits) for p in contents.curve if p.step > 0],
        "validation": [(p.tokens, p.validation_bits) for p in contents.curve],
    }
    title, frequencies = "bits per character", f"character frequencies alone: {unigram:.2f}"
    picture = figures.curves(title, "characters trained on", title, lines, level=unigram, level_name=frequencies,
                             logarithmic=False)  # fmt: skip
    said = Markup(
        "<p>Held-out files cost <strong>{:.2f} bits per character</strong> after {:,} characters in {:.0f} s ({:,.0f} a "
        "second): {:.2f} {} the {:.2f} of character frequencies alone.</p>"
    ).format(last.validation_bits, last.tokens, last.seconds, last.tokens / last.seconds if last.seconds else 0.0,
             abs(unigram - last.validation_bits), "below" if last.validation_bits < unigram else "above", unigram)  # fmt: skip
    trained = paragraph(f"What trained it: {contents.backend}")
    return paragraph(contents.text) + said + figure(contents.model, picture) + trained


def _accuracy(report: check.Report | str) -> Markup:
    if isinstance(report, str):
        return paragraph(report)
    body = paragraph(
        f"{report.label}. Outputs and every gradient against the float64 reference, relative to the largest true value, with "
        "the error of torch.nn.LSTMCell in the same dtype after the slash."
    )
    for title, ours, theirs in (("largest", "max_error", "torch_max_error"), ("RMS", "rms_error", "torch_rms_error")):
        lines: dict[str, dict[str, str]] = {quantity: {f"{title} error": quantity} for quantity in check.QUANTITIES}
        for row in report.rows:
            lines[row.quantity][row.dtype] = f"{getattr(row, ours):.1e} / {getattr(row, theirs):.1e}"
        body += tables.html(tables.text_table(list(lines.values())))
    verdict = f"{'Passed' if report.passed else 'Failed'}: {check.bar(report)}."
    failures = [f"{row.dtype} {row.quantity}: {failure}" for row in report.rows for failure in row.failures]
    return body + Markup("").join(paragraph(t, "quiet" if report.passed else "bad") for t in [verdict, *failures])


def _timing(report: timing.Report | str) -> Markup:
    if isinstance(report, str):
        return paragraph(report)
    pictures = []
    for mode, title in timing.NAMES.items():
        found = {name: timing.per_step(t) for (m, name), t in report.timings.items() if m == mode}
        bars = [(name, *times, f"{times[0]:,.{0 if times[0] >= 100 else 1}f} µs") for name, times in found.items()]
        pictures.append(
            Markup("<div><b>{}</b>{}</div>").format(title, figures.bars(f"Time per timestep, {title}", bars))
        )
    samples = min(t.samples for t in report.timings.values())
    caption = (
        f"Medians of {samples} interleaved rounds, shorter is faster; the stroke spans the 20th to the 80th percentile."
    )
    return paragraph(f"{report.label}.") + figure(caption, *pictures) + paragraph(report.note)
