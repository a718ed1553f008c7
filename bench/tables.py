"""The tables, each as data that becomes HTML or Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from . import providers
from .cases import Case
from .select import SPEEDUPS, Group, Row, groups, losses, number, of_kind


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is text, the others are figures. marks: (row, column) that need a second look."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marks: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def html(self) -> str:
        head = "".join(f"<th>{escape(text)}</th>" for text in self.head)
        body = []
        for i, row in enumerate(self.rows):
            cells = [f"<th>{escape(row[0])}</th>"]
            for j, text in enumerate(row[1:], 1):
                cells.append(f"<td{' class=mark' if (i, j) in self.marks else ''}>{escape(text)}</td>")
            body.append(f"<tr>{''.join(cells)}</tr>")
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

        rule = ["---", *["---:"] * (len(self.head) - 1)]
        return "\n".join([line(self.head), line(rule), *(line(row) for row in self.rows)])


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def headline(rows: Sequence[Row], suite: str = "hidden-sizes") -> Table:
    """By hidden size, dtype and mode: microseconds per step of this package (its fastest kernels, and what auto takes) and
    of torch, cuDNN's algorithm, the distance of the kernels from the floor.
    """
    found = [g for g in groups(rows, suite) if g.execution == "eager"]
    found.sort(key=lambda g: (g.case.hidden_size, g.case.batch, g.case.length, g.case.dtype_name, g.case.mode))
    body: list[list[str]] = []
    marks: set[tuple[int, int]] = set()
    for g in found:
        ours, auto, theirs = g.ours(), g.auto(), g.theirs()
        if ours is None and auto is None and theirs is None:
            continue
        steps = g.case.length
        row = g.rows[ours[0]] if ours else {}
        speedups = g.speedup(), g.auto_speedup()
        marks |= {(len(body), 6 + k) for k, s in enumerate(speedups) if s is not None and s < 1}
        body.append(
            [
                f"H{g.case.hidden_size} B{g.case.batch} T{steps} {g.case.dtype_name} {g.case.mode}",
                _us(ours[1] / steps) if ours else "",
                ours[0].removeprefix("lstm_triton ") if ours else "",
                _us(auto[1] / steps) if auto else "",
                (g.rows[auto[0]]["backend"] or "") if auto else "",
                _us(theirs[1] / steps) if theirs else "",
                *map(_ratio, speedups),
                (g.rows[theirs[0]]["algorithm"] or "") if theirs else "",
                _ratio(row.get("distance")),
            ]
        )
    head = ("case", "kernels, us/step", "way", "auto, us/step", "auto takes", "torch, us/step", "speed-up of kernels",
            "of auto", "cuDNN algorithm", "kernels, times the floor")  # fmt: skip
    return Table(head, body, frozenset(marks))


def cells(rows: Sequence[Row]) -> Table:
    """One step: microseconds of each provider, eager and in a graph."""
    found = sorted(
        groups(rows, "cell"), key=lambda g: (g.case.dtype, g.case.mode, g.case.hidden_size, g.case.batch, g.execution)
    )
    names = [n for n in (providers.OURS, providers.TORCH_CELL, "torch.compile") if any(n in g.rows for g in found)]
    body: list[list[str]] = []
    marks: set[tuple[int, int]] = set()
    for g in found:
        label = f"H{g.case.hidden_size} B{g.case.batch} {g.case.dtype_name} {g.case.mode}, {g.execution}"
        speedup = g.auto_speedup()
        if speedup is not None and speedup < 1:
            marks.add((len(body), len(names) + 1))
        body.append([label, *(_us(g.us(n)) for n in names), _ratio(speedup)])
    return Table(("case", *(f"{n}, us" for n in names), "speed-up of auto"), body, frozenset(marks))


# What the layer promises: a variant's time over that of padded rows without resets, of the same provider.
PROMISES = {"packed": 1.5, "resets": 1.05}
FEATURE_PROVIDERS = (providers.OURS, "lstm_triton triton-persistent", "lstm_triton triton-stepwise", providers.CUDNN)


def features(rows: Sequence[Row]) -> Table:
    """What a feature costs: each variant's time, and over the padded one's of the same provider; broken PROMISES are marked."""
    found = [g for g in groups(rows, "features") if g.execution == "eager"]
    plain = {g.case.mode: g for g in found if g.case.name == "padded"}
    names = [n for n in FEATURE_PROVIDERS if any(g.us(n) for g in found)]
    body: list[list[str]] = []
    marks: set[tuple[int, int]] = set()
    for g in sorted(found, key=lambda g: g.case.mode):
        cells: list[str] = [f"{g.case.name}, {g.case.mode}"]
        for name in names:
            time = g.us(name)
            base = plain[g.case.mode].us(name) if g.case.mode in plain else None
            ratio = time / base if time and base else None
            if ratio and ratio > PROMISES.get(g.case.name, ratio) and name != providers.CUDNN:
                marks.add((len(body), len(cells) + 1))
            cells += [_us(time), f"x{ratio:.2f}" if ratio else ""]
        body.append([*cells, _ratio(g.speedup()), _ratio(g.auto_speedup())])
    heads = [text for n in names for text in (f"{n}, us", "of padded")]
    return Table(("variant", *heads, "speed-up of kernels", "of auto"), body, frozenset(marks))


def memory(rows: Sequence[Row]) -> Table:
    """Bytes held for the backward, in MiB."""
    body = []
    for row in sorted(of_kind(rows, "memory", "ok"), key=lambda r: (r["case"]["name"], r["case"]["dtype"])):
        held = row["bytes"]
        mib = [f"{held[name] / 2**20:,.1f}" if name in held else "" for name in ("saved", "after_forward", "peak")]
        body.append([f"{row['case']['name']} {row['case']['dtype']}", row["provider"], *mib])
    return Table(("case", "provider", "saved by autograd, MiB", "held after forward, MiB", "peak, MiB"), body)


def _column(name: str) -> str:
    """The column of the accuracy table that a tensor's errors go into: all weights' gradients into one."""
    return {"h_n": "h_n, c_n", "c_n": "h_n, c_n", "dh0": "dh0, dc0", "dc0": "dh0, dc0"}.get(
        name, "dW, db" if name.startswith(("dweight", "dbias")) else name
    )


_COLUMNS = ("y", "h_n, c_n", "dx", "dh0, dc0", "dW, db")


def accuracy(rows: Sequence[Row], by_shape: bool = False) -> Table:
    """The largest max error and the largest RMS error of each provider by dtype and input scale: over all shapes, or for
    each hidden size and length.
    """
    worst: dict[tuple, dict[str, tuple[float, float]]] = {}
    for row in of_kind(rows, "accuracy", "ok", "wrong"):
        if not row["errors"]:
            continue
        case = Case.from_json(row["case"])
        interpreted = " (interpreted)" if "interpreter" in (row["label"] or "") else ""
        shape = (case.form != "cell", case.hidden_size, case.length) if by_shape else ()
        entry = worst.setdefault((shape, case.dtype_name, case.scale, row["provider"] + interpreted), {})
        for name, e in row["errors"].items():
            old = entry.get(_column(name), (0.0, 0.0))
            entry[_column(name)] = max(old[0], number(e["max"])), max(old[1], number(e["rms"]))
    body = []
    for (shape, dtype, scale, provider), entry in sorted(worst.items()):
        cells = [f"{entry[c][0]:.1e} / {entry[c][1]:.1e}" if c in entry else "" for c in _COLUMNS]
        sizes = (f"layer H{shape[1]} T{shape[2]}, " if shape[0] else f"cell H{shape[1]}, ") if shape else ""
        body.append([f"{sizes}{dtype}, input x{scale:g}", provider, *cells])
    first = "shape, dtype, scale" if by_shape else "dtype, scale"
    return Table((first, "provider", *(f"{c}: max / RMS" for c in _COLUMNS)), body)


def overhead(rows: Sequence[Row]) -> Table:
    """Host microseconds per call."""
    body = []
    for row in of_kind(rows, "overhead", "ok"):
        v = row["values"]
        parts = [_us(v.get(name)) for name in ("total_us", "checks_us", "dispatch_us", "launch_us")]
        body.append([f"{row['case']['name']}, {row['case']['mode']}", row["provider"], *parts, row["label"] or ""])
    return Table(("call", "provider", "in all, us", "checks and the rest", "dispatch", "launches", "remark"), body)


def cold_start(rows: Sequence[Row]) -> Table:
    """Seconds."""
    body = []
    for row in of_kind(rows, "cold-start", "ok"):
        v = row["values"]
        names = ("empty_import_s", "empty_first_call_s", "warm_first_call_s", "empty_second_call_s")
        body.append(
            [
                row["case"]["name"],
                row["provider"],
                *(f"{v[n]:.3g}" if n in v else "" for n in names),
                row["label"] or "",
            ]
        )
    head = (
        "call",
        "provider",
        "import, s",
        "first call, no kernels yet, s",
        "first call, kernels on disk, s",
        "second call, s",
        "remark",
    )
    return Table(head, body)


def heat(
    rows: Sequence[Row], dtype_name: str, mode: str, way: str
) -> tuple[list[int], list[int], dict[tuple[int, int], Group]]:
    """Hidden sizes, batches, and the group of each (hidden size, batch) of the heat map of one of WAYS."""
    found = {}
    for g in groups(rows, "batch", mode):
        if g.case.dtype_name == dtype_name and g.execution == "eager" and SPEEDUPS[way](g) is not None:
            found[g.case.hidden_size, g.case.batch] = g
    return sorted({h for h, _ in found}), sorted({b for _, b in found}), found


def roofs(rows: Sequence[Row]) -> Table:
    body = []
    for row in of_kind(rows, "roof", "ok"):
        for name, value in row["values"].items():
            if name.endswith("bytes_per_s"):
                body.append([name.removesuffix("_bytes_per_s"), f"{value / 1e9:,.0f} GB/s"])
            elif name.endswith("flops_per_s"):
                body.append([name.removesuffix("_flops_per_s").replace("_", " "), f"{value / 1e12:,.3g} TFLOP/s"])
            else:
                body.append([name.removesuffix("_us").replace("_", " "), f"{value:.3g} us"])
    return Table(("roof", "measured"), body)


def lost(rows: Sequence[Row], way: str, most: int = 60) -> Table:
    """Where torch is ahead of one of WAYS, the worst first, with what the rows know of the reason."""
    body = []
    for loss in losses(groups(rows), way)[:most]:
        g, theirs = loss.group, loss.group.theirs()
        assert theirs
        mine, algorithm = g.rows[loss.provider], g.rows[theirs[0]]["algorithm"]
        distance = f"{mine['distance']:.1f} times the floor" if mine["distance"] else ""
        why = (mine["backend_reason"], algorithm and f"cuDNN: {algorithm}", distance)
        took = mine["backend"] if way == "auto" else loss.provider
        body.append(
            [f"{g.case.describe()}, {g.execution}", f"{loss.speedup:.2f}", took or "", "; ".join(t for t in why if t)]
        )
    return Table(("case", "speed-up", "way", "what is known of the reason"), body)


def not_timed(rows: Sequence[Row]) -> Table:
    """What was wrong, failed or was skipped, and why; equal reasons once."""
    found: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["status"] != "ok" and row["kind"] != "anchor":
            key = row["status"], row["provider"], row["reason"]
            found[key] = found.get(key, 0) + 1
    order = {"wrong": 0, "failed": 1, "skipped": 2}
    body = [[status, provider, reason, str(n)] for (status, provider, reason), n in
            sorted(found.items(), key=lambda item: (order[item[0][0]], item[0]))]  # fmt: skip
    return Table(("what", "provider", "why", "rows"), body)
