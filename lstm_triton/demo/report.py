"""The demo's report: one HTML page, complete in itself, readable in light and dark and on a phone."""

import datetime
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lstm_triton import check, environment
from lstm_triton.demo import charts, timing
from lstm_triton.demo.train import Point

_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --text: #1d1f23; --quiet: #5c6370; --rule: #dcdfe4;
  --ours: #1f5fbf; --other: #b3541e; --third: #6b7280; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --text: #e6e7ea; --quiet: #a2a8b3; --rule: #363b44;
  --ours: #6ea8ff; --other: #f0a070; --third: #8b93a1; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
p { margin: .5rem 0; } .quiet { color: var(--quiet); font-size: .9rem; } .bad { color: var(--bad); font-weight: 600; }
figure { margin: 1rem 0; } figcaption { margin-top: .5rem; color: var(--quiet); font-size: .9rem; }
.key { margin-right: 1rem; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px;
  background: var(--colour); }
.key.ours { --colour: var(--ours); } .key.other { --colour: var(--other); } .key.third { --colour: var(--third); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); } th { font-weight: 600; }
tbody + thead th { padding-top: 1.1rem; }
td span { color: var(--quiet); }
pre { padding: .75rem; border: 1px solid var(--rule); border-radius: 4px; font-size: .8rem; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; } svg text { font: 14px system-ui, sans-serif; fill: var(--quiet); }
svg .head { fill: var(--text); font-weight: 600; } .grid { stroke: var(--rule); }
.level { stroke: var(--text); stroke-dasharray: 6 4; } .line { fill: none; stroke-width: 2.5; }
.whisker { stroke: var(--text); }
polyline.ours { stroke: var(--ours); } polyline.other { stroke: var(--other); }
rect.ours, circle.ours { fill: var(--ours); } rect.other, circle.other { fill: var(--other); }
rect.third { fill: var(--third); }
@media (max-width: 34rem) { svg text { font-size: 21px; } }
"""


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
    timing: timing.TimingReport | str


def write(path: Path, contents: Contents) -> None:
    """Write the page to `path`; a page from an earlier run is replaced at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(page(contents), encoding="utf-8")
    os.replace(unfinished, path)


def page(contents: Contents) -> str:
    """The page as HTML."""
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    body = [
        "<h1>lstm_triton on this machine</h1>",
        f"<p>{escape(contents.machine)}</p>",
        f'<p class="quiet">Version {escape(environment.__version__)}, {escape(now)}.</p>',
        *_training(contents),
        *_sample(contents),
        *_accuracy(contents.accuracy),
        *_timing(contents.timing),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>lstm_triton: demo report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _training(contents: Contents) -> list[str]:
    curve = contents.curve
    parts = ["<h2>A language model, trained character by character</h2>", f"<p>{escape(contents.text)}</p>"]
    if not curve:
        return [*parts, "<p>Training ended before the first measurement.</p>"]
    last = curve[-1]
    gain = contents.unigram_bits - last.validation_bits
    rate = last.tokens / last.seconds if last.seconds else 0.0
    lines = [
        charts.Line("training", [(p.tokens, p.train_bits) for p in curve if p.step > 0], "other"),
        charts.Line("validation", [(p.tokens, p.validation_bits) for p in curve], "ours"),
    ]
    level = f"character frequencies alone: {contents.unigram_bits:.2f}"
    picture = charts.line_chart(
        "Bits per character over the characters trained on",
        "characters trained on",
        "bits per character",
        lines,
        contents.unigram_bits,
        level,
    )
    return [
        *parts,
        f"<p>Held-out files cost <strong>{last.validation_bits:.2f} bits per character</strong> after "
        f"{last.tokens:,} characters in {last.seconds:.0f} s ({rate:,.0f} a second): {abs(gain):.2f} "
        f"{'below' if gain > 0 else 'above'} the {contents.unigram_bits:.2f} of character frequencies alone.</p>",
        f'<figure>{picture}<figcaption><span class="key other">training</span><span class="key ours">validation</span>'
        f"{escape(contents.model)}</figcaption></figure>",
        f"<p>What trained it: {escape(contents.backend)}</p>",
    ]


def _sample(contents: Contents) -> list[str]:
    if not contents.sample:
        return []
    return [
        "<h2>What it writes</h2>",
        f"<p>Drawn one character at a time from Y<sub>t</sub> = softmax(h<sub>t</sub> W + b), "
        f"beginning with <code>{escape(repr(contents.prompt))}</code>.</p>",
        f"<pre>{escape(contents.sample)}</pre>",
    ]


def _accuracy(report: check.Report | str) -> list[str]:
    parts = ["<h2>Accuracy of the fused cell</h2>"]
    if isinstance(report, str):
        return [*parts, f"<p>{escape(report)}</p>"]
    dtypes = list(dict.fromkeys(row.dtype for row in report.rows))
    failures = [f"{row.dtype} {row.quantity}: {failure}" for row in report.rows for failure in row.failures]
    parts.append(
        f"<p>{escape(report.label)}. Outputs and every gradient against the float64 reference: largest error, relative "
        "to the largest true value, with the error of torch.nn.LSTMCell in the same dtype after the slash.</p>"
    )
    verdict = "Passed" if report.passed else "Failed"
    bodies = []
    for title, ours, theirs in (("largest", "max_error", "torch_max_error"), ("RMS", "rms_error", "torch_rms_error")):
        head = "".join(f"<th>{escape(dtype)}</th>" for dtype in dtypes)
        rows = []
        for quantity in check.QUANTITIES:
            found = {row.dtype: row for row in report.rows if row.quantity == quantity}
            cells = "".join(
                f"<td>{getattr(found[d], ours):.1e} <span>/ {getattr(found[d], theirs):.1e}</span></td>" for d in dtypes
            )
            rows.append(f"<tr><th>{escape(quantity)}</th>{cells}</tr>")
        bodies.append(f"<thead><tr><th>{title}</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>")
    parts.append(f'<div class="scroll"><table>{"".join(bodies)}</table></div>')
    parts.append(f'<p class="{"quiet" if report.passed else "bad"}">{verdict}: {escape(check.bar(report))}.</p>')
    parts += [f'<p class="bad">{escape(failure)}</p>' for failure in failures]
    return parts


def _timing(report: timing.TimingReport | str) -> list[str]:
    parts = ["<h2>Time per timestep</h2>"]
    if isinstance(report, str):
        return [*parts, f"<p>{escape(report)}</p>"]
    styles = {timing.OUR_LSTM: "ours", timing.OURS: "ours", timing.TORCH_CELL: "other", timing.TORCH_LSTM: "third"}
    bars = [charts.Bar(r.mode, r.provider, r.median, r.low, r.high, styles[r.provider]) for r in report.rows]
    rounds = min(row.rounds for row in report.rows)
    return [
        *parts,
        f"<p>{escape(report.label)}.</p>",
        f"<figure>{charts.bar_chart('Time per timestep', 'µs', bars)}"
        f"<figcaption>Medians of {rounds} interleaved rounds, shorter is faster; the stroke spans the 20th to the 80th "
        "percentile.</figcaption></figure>",
        f"<p>{escape(report.note)}</p>",
    ]
