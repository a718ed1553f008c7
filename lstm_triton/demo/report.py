"""The demo's report: one HTML page, made as the benchmark's is."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from lstm_triton import check, environment
from lstm_triton.bench import figures, tables
from lstm_triton.bench.report import Part, Section, figure, paragraph, write_page
from lstm_triton.demo import timing
from lstm_triton.demo.train import Point


def write(
    path: Path,
    said: Sequence[str],
    curve: Sequence[Point],
    unigram_bits: float,
    sample: tuple[str, str],
    accuracy: check.Report | str,
    timings: timing.Report | str,
) -> None:
    """Write the page to `path`; a page from an earlier run is replaced at once or not at all.

    said: sentences about the machine, the text, the model and the training; sample: how it began, and the text. A part that did
    not run is the reason why, as text.
    """
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    lines = {
        "training": [(p.tokens, p.train_bits) for p in curve if p.step > 0],
        "validation": [(p.tokens, p.validation_bits) for p in curve],
    }
    title, frequencies = "bits per character", f"character frequencies alone: {unigram_bits:.2f}"
    picture = figures.curves(
        title, "characters trained on", title, lines, level=unigram_bits, level_name=frequencies, logarithmic=False
    )
    training = Markup("").join(map(paragraph, said[1:])) + figure("Training and held-out text.", picture)
    drawn = Markup(
        "<p>Drawn one character at a time from Y<sub>t</sub> = softmax(h<sub>t</sub> W + b), beginning with "
        "<code>{}</code>.</p><pre>{}</pre>"
    ).format(repr(sample[0]), sample[1])
    sections = [
        Section("training", "A language model, trained character by character", training),
        Section("sample", "What it writes", drawn),
        Section("accuracy", "Accuracy of the fused cell", _accuracy(accuracy)),
        Section("timing", "Time per timestep", _timing(timings)),
    ]
    lead = [said[0], f"Version {environment.__version__}, {now}."]
    write_page(path, "lstm_triton on this machine", lead, [Part("demo", "", "", sections)])


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
        times = {name: timing.per_step(t) for (m, name), t in report.timings.items() if m == mode}
        bars = [(name, *t, f"{t[0]:,.{0 if t[0] >= 100 else 1}f} µs") for name, t in times.items()]
        pictures.append(
            Markup("<div><b>{}</b>{}</div>").format(title, figures.bars(f"Time per timestep, {title}", bars))
        )
    samples = min(t.samples for t in report.timings.values())
    caption = (
        f"Medians of {samples} interleaved rounds, shorter is faster; the stroke spans the 20th to the 80th percentile."
    )
    return paragraph(f"{report.label}.") + figure(caption, *pictures) + paragraph(report.note)
