"""What is made of rows: the page, the tables of the README, two sets side by side. All rows here are made up."""

import dataclasses
import functools
import html.parser
import re
import tempfile
from pathlib import Path

import pytest
from test_bench_rows import FLOOR, make_row

from lstm_triton.bench import __main__ as cli
from lstm_triton.bench import rows
from lstm_triton.bench.cases import Case
from lstm_triton.bench.providers import CUDNN, OURS, TORCH_CELL
from lstm_triton.tolerance import Errors

figures, report, tables = (
    pytest.importorskip(f"lstm_triton.bench.{name}", reason="needs the libraries of the extra [bench]")
    for name in ("figures", "report", "tables")
)
GPU = rows.Device("cuda", "A GPU that does not exist", "0")
PERSISTENT, STEPWISE = "lstm_triton triton-persistent", "lstm_triton triton-stepwise"
BACKENDS = {PERSISTENT: "triton-persistent", STEPWISE: "triton-stepwise"}


def timed(case, provider, us, suite="hidden-sizes", **changes):
    """A timing row of a GPU on which auto takes cuDNN for layers, and the kernels for cells."""
    auto = "cudnn" if case.form == "layer" else "triton"
    backend = BACKENDS.get(provider, auto if provider == OURS else None)
    return make_row(case, provider, us, suite, **({"device": GPU, "backend": backend} | changes))


def sample_rows():
    """Rows of every suite, of a GPU that does not exist."""
    found = []

    def add(case, times, suite, **changes):
        for provider, us in times.items():
            found.append(timed(case, provider, us, suite, **changes))

    for mode in ("forward", "train"):
        for H, ours in ((64, 5.0), (512, 20.0), (1024, 90.0)):
            add(
                Case(f"H{H}", H, 16, 128, mode=mode),
                {OURS: ours, PERSISTENT: ours * 0.9, CUDNN: 40.0, "flashrnn": 70.0},
                "hidden-sizes",
                floor=FLOOR,
            )
            for B in (1, 64):
                add(Case("b", H, B, 128, mode=mode), {OURS: ours, PERSISTENT: ours, CUDNN: 30.0}, "batch")
            cell = Case("c", H, 16, 1, form="cell", dtype="float32", mode=mode)
            add(cell, {OURS: 4.0, TORCH_CELL: 9.0}, "cell")
            add(cell, {OURS: 2.0, TORCH_CELL: 3.0}, "cell", execution="graph")
        for T in (1, 64, 1024):
            add(Case("t", 512, 16, T, mode=mode), {OURS: 3.0 * T, CUDNN: 5.0 * T}, "length")
        for name in ("padded", "packed"):
            case = Case(name, 64, 8, 16, dtype="float32", mode=mode, rows=name)
            add(case, {OURS: 10.0, PERSISTENT: 9.0, STEPWISE: 40.0, CUDNN: 50.0}, "features")
        case = Case("resets 0.1", 64, 16, 64, dtype="float32", mode=mode, resets=0.1)
        add(case, {OURS: 11.0, CUDNN: 50.0, "torch by hand: split": 10.0, "torch by hand: loop": 12.0}, "segments")
    add(Case("rl_puffer_train", 128, 256, 64, dtype="float32", mode="train"), {OURS: 10.0, CUDNN: 20.0}, "real")
    add(Case("nlp_awd", 1150, 80, 70, dtype="float32", mode="train", layers=3), {OURS: 30.0, CUDNN: 20.0}, "real")
    for form, torchs in (("layer", CUDNN), ("cell", TORCH_CELL)):
        add(Case("s", 64, 1, 1, form=form, dtype="float32", carried=True), {OURS: 3.0, torchs: 4.0}, "step")
    errors = {name: Errors(9, 2e-3, 3e-4) for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0", "dweight_hh_l0")}
    found.append(make_row(kind="accuracy", suite="accuracy", device=GPU, errors=errors))
    found.append(
        make_row(kind="memory", suite="memory", device=GPU, bytes={"saved": 2**20, "outputs": 5, "peak": 2**21})
    )
    found.append(make_row(kind="overhead", suite="overhead", device=GPU))
    found.append(make_row(kind="cold-start", suite="cold-start", device=GPU, values={"empty_first_call_s": 2.0}))
    found.append(
        make_row(kind="roof", suite="roofs", device=GPU, values={"copy_bytes_per_s": 3e12, "exchange_us": 0.6})
    )
    found.append(make_row(provider="haste", status="skipped", device=GPU))
    found.append(make_row(provider="torchrl", status="wrong", device=GPU))
    for k in range(3):
        found.append(
            make_row(kind="anchor", suite="anchor", us=100.0 + 4 * k, device=GPU, date=f"2030-01-01T00:0{k}:00+00:00")
        )
    return found


def render(found, problems=()):
    """The text of the page of these rows."""
    with tempfile.TemporaryDirectory() as folder:
        report.write(Path(folder) / "new" / "report.html", found, problems)
        return (Path(folder) / "new" / "report.html").read_text(encoding="utf-8")


@functools.cache
def sample_page():
    return render(sample_rows())


class Page(html.parser.HTMLParser):
    """Checks that tags close, and gathers what a browser would fetch."""

    VOID = {"meta", "link", "br", "circle", "rect", "path", "line", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.ids, self.links = [], [], set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data"):
                if value.startswith("#"):
                    self.links.add(value[1:])
                else:
                    self.fetched.append(value)
            if name == "id":
                assert value not in self.ids, f"two elements are called {value}"
                self.ids.add(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_has_every_section_and_fetches_nothing():
    text = sample_page()
    page = Page(text)
    assert page.open == [] and page.links <= page.ids
    assert all(value == "data:," for value in page.fetched)
    assert "<script" not in text and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "http" not in re.sub(r"<td>[^<]*</td>", "", text)
    for title in (
        "Time per step against hidden size",
        "Where cuDNN still wins",
        "Hidden size by batch",
        "Scaling in the number of steps",
        "One step: the cell",
        "One step a call, the state carried",
        "LSTMs that people run",
        "Sources of their shapes",
        "What features cost",
        "Beside what torch alone can do",
        "Memory of a training step",
        "Accuracy against float64",
        "Host time of a call",
        "The first call",
        "Where torch is ahead, the worst first",
        "Not timed: wrong, failed, skipped",
        "Roofs and floors",
        "Environment and drift",
    ):
        assert f"<h3>{title}</h3>" in text, title
    assert "No rows of this yet" not in text
    assert ">torch by hand: split, us/step</th>" in text
    assert "SYNTHETIC" in text and "lstm-triton bench --suite hidden-sizes" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "moved by 8.0%" in text


def test_the_first_figure_has_everyone_the_floor_and_the_ratio_beside_it():
    section = re.search(r'id="d0-0">.*?</section>', sample_page(), re.DOTALL)[0]
    first = section[: section.index("</figure>")]
    step, ratio = first.split("<svg")[1:]
    for name in (CUDNN, "kernels", "auto", "flashrnn", "floor"):
        assert f">{name}</text>" in step, name
    assert "microseconds per step" in step and "hidden size" in step and "time over theirs" in ratio
    assert ">floor</text>" not in ratio and ">flashrnn</text>" in ratio
    assert re.search(r"var\(--s1\)", step) and "#04040" not in first, "colours are the page's"


def compared(found):
    """The rows of the one machine, and their comparisons."""
    (newest,) = tables.newest(found).values()
    return newest, tables.comparisons(newest)


def test_losses_are_shown_with_what_is_known():
    text = sample_page()
    given = compared(sample_rows())
    lost = [tables.lost(*given, (way,)) for way in tables.WAYS]
    assert all(len(of) and all(ratio < 1 for ratio in of["speed-up"]) for of in lost)
    assert len(tables.lost(*given)) == sum(map(len, lost))
    counts = tables.count_lost(*given)["torch is ahead in"]
    assert [text.split()[0] for text in counts] == [str(len(of)) for of in lost]
    assert all(f"<td>{count}</td>" in text for count in counts)
    assert "wrong" in text and "a reason" in text


def test_cudnn_called_by_this_package_hides_no_loss_of_its_kernels():
    case = Case("H512", 512, 16, 128)
    found = [timed(case, p, us) for p, us in ((OURS, 40.0), (PERSISTENT, 90.0), (STEPWISE, 80.0))]
    found += [timed(case, CUDNN, 40.0, algorithm="STANDARD")]
    found += [
        timed(case, "lstm_triton cudnn", 39.0, backend="cudnn"),
        timed(case, "lstm_triton torch", 1.0, backend="torch"),
    ]
    given = compared(found)
    (one,) = given[1]
    assert one.kernels.provider == STEPWISE and one.ratio("kernels") == pytest.approx(0.5) and one.lost("kernels")
    assert one.ratio("auto") == pytest.approx(1.0) and not one.lost("auto")
    won = tables.lost(*given, ("kernels",), CUDNN)
    assert won["what ran"].item() == STEPWISE and "cuDNN: STANDARD" in won["what is known of why"].item()
    assert not len(tables.lost(*given, ("auto",)))
    assert list(tables.count_lost(*given)["torch is ahead in"]) == ["1 of 1", "0 of 1"]
    assert "| ▼ 0.50 | 1.00 |" in report.markdown(found)
    cell = Case("c", 64, 4, 1, form="cell")
    cells = compared([timed(cell, OURS, 9.0), timed(cell, TORCH_CELL, 4.0)])
    assert len(tables.lost(*cells, ("kernels",)))
    assert not len(tables.lost(*cells, ("kernels",), CUDNN)), "no cell is cuDNN's"


def test_rows_under_other_settings_stand_apart():
    case = Case("H512", 512, 16, 128)
    warm, flushed = (
        timed(case, OURS, us, l2=l2, date=f"2030-01-0{day}T00:00:00+00:00")
        for us, l2, day in ((10.0, "warm", 1), (20.0, "flushed", 2))
    )
    assert [*tables.newest([warm, flushed]).values()] == [[warm], [flushed]], "the newer row is of another measurement"
    parts = tables.newest([flushed, warm, timed(case, CUDNN, 9.0, l2="warm")])
    assert list(parts) == [GPU.name, f"{GPU.name}, L2 cache flushed before each call"]
    text = render([warm, flushed])
    assert "--suite hidden-sizes --flush-l2" in text
    cpu = make_row()
    one, two = (dataclasses.replace(cpu, device=dataclasses.replace(cpu.device, threads=n)) for n in (1, 2))
    assert [name.rpartition(", ")[2] for name in tables.newest([one, two])] == ["1 thread", "2 threads"]
    assert len(tables.side_by_side([one], [two])[0]) == 1, "machines with other numbers of threads are compared"
    assert not len(tables.side_by_side([warm], [flushed])[0])


def test_features_stand_beside_the_padded_time():
    def rows(name, times, **options):
        case = Case(name, 64, 8, 16, dtype="float32", **options)
        return [timed(case, p, us, "features") for p, us in times.items()]

    found = rows("padded", {OURS: 10.0, PERSISTENT: 10.0, CUDNN: 20.0})
    found += rows("packed", {OURS: 14.0, PERSISTENT: 16.0, CUDNN: 90.0, STEPWISE: 29.0}, rows="packed")
    table = tables.timings(*compared(found), base="padded")
    (packed,) = (line for case, line in table.iterrows() if case.startswith("packed: "))
    multiples = [packed[f"{name}, us/step"].partition(" ")[2] for name in (OURS, PERSISTENT, CUDNN, STEPWISE)]
    assert multiples == ["(x1.40)", "(x1.60)", "(x4.50)", ""]


def test_what_has_no_time_is_said_by_case_and_provider():
    def row(H, T, error, **options):
        case = Case("a", H, 4, T, dtype="float32", precision="ieee", mode="train", **options)
        errors = {"y": Errors(9, error, error / 9), "dx": Errors(9, error / 2, error / 3)}
        return make_row(case, kind="accuracy", suite="accuracy", device=GPU, errors=errors)

    found = [row(512, 128, 1e-6), row(512, 1024, 4e-6), row(19, 7, 2e-6), row(512, 1, 3e-6, form="cell")]
    table = tables.readings(*compared(found))
    assert [(case, text) for case, text in table[OURS].items()] == [
        ("H512 B4 T1 cell float32 ieee train", "max 3.0e-06 (y), RMS 1.0e-06 (dx)"),
        ("H19 B4 T7 float32 ieee train", "max 2.0e-06 (y), RMS 6.7e-07 (dx)"),
        ("H512 B4 T128 float32 ieee train", "max 1.0e-06 (y), RMS 3.3e-07 (dx)"),
        ("H512 B4 T1024 float32 ieee train", "max 4.0e-06 (y), RMS 1.3e-06 (dx)"),
    ]
    held = [
        make_row(kind="memory", bytes={"saved": 3 * 10**6}),
        make_row(provider=CUDNN, kind="memory", bytes={"saved": 5}),
    ]
    (line,) = tables.readings(held, []).itertuples(index=False)
    assert list(line) == ["saved_bytes 3 M", "saved_bytes 5"]


def test_an_empty_or_partial_set_of_rows_is_no_error():
    assert "There are no rows yet" in render([])
    text = render([make_row()], ["a.jsonl:3: not JSON"])
    Page(text)
    assert "No rows of this yet" in text and "a.jsonl:3: not JSON" in text and rows.CPU_LABEL in text


def test_text_of_rows_cannot_become_markup():
    found = [make_row(provider="<script>alert(1)</script>", status="failed", device=GPU, reason="a <b> & c")]
    found += [timed(Case("a", 64, 1, 2), "<i>x</i>", 1.0), timed(Case("a", 64, 1, 2), CUDNN, 1.0)]
    text = render(found)
    assert "<script>" not in text and "a &lt;b&gt; &amp; c" in text and "<i>x" not in text and "&lt;i&gt;x" in text


def test_the_newest_row_counts():
    old, new = make_row(us=10.0, date="2030-01-01T00:00:00+00:00"), make_row(us=20.0, date="2030-01-02T00:00:00+00:00")
    assert [*tables.newest([new, old]).values()] == [[new]]
    assert len(tables.newest([new, make_row(device=GPU)])) == 2


def test_speedup_of_the_fastest_way_and_of_auto():
    case = Case("a", 64, 8, 16)
    (one,) = tables.comparisons([timed(case, p, us) for p, us in ((OURS, 20.0), (PERSISTENT, 5.0), (CUDNN, 10.0))])
    assert one.ratio("kernels") == pytest.approx(2.0) and one.ratio("auto") == pytest.approx(0.5)
    assert one.kernels.provider == PERSISTENT and one.torchs.provider == CUDNN
    (alone,) = tables.comparisons([make_row(case, CUDNN)])
    assert alone.ratio("kernels") is None and alone.kernels is None


def test_figures_bear_one_point_none_and_large_ranges():
    labels = ("a", "x", "y")
    one = figures.curves(labels, {"s": {4.0: 2.0}, "t": {}}, (1.0, "a level"))
    assert one.startswith("<svg") and ">s</text>" in one and ">t</text>" not in one and ">a level</text>" in one
    assert figures.curves(labels, {"s": {}}) == ""
    wide = figures.curves(labels, {"s": {1.0: 1e-3, 1e6: 1e7}})
    assert wide.count("<text") < 40
    ids = re.findall(r' id="([^"]+)"', one + wide)
    assert len(set(ids)) == len(ids)


def test_speed_ups_are_coloured_by_who_is_ahead():
    case = Case("a", 64, 8, 16)
    text = render([timed(case, p, us) for p, us in ((OURS, 20.0), (PERSISTENT, 5.0), (CUDNN, 10.0))])
    heat = re.findall(r'<span class="heat" style="--hue:var\(--(s\d)\);--share:(\d+)%">([^<]*)</span>', text)
    assert set(heat) == {("s0", "23", "2.00 ▲"), ("s1", "23", "0.50 ▼")}


SUMMARY_BEGIN = "<!-- benchmark summary: begin (written by lstm-triton bench --readme) -->"
SUMMARY_END = "<!-- benchmark summary: end -->"
BEGIN, END = SUMMARY_BEGIN.replace(" summary", ""), SUMMARY_END.replace(" summary", "")


def test_readme_tables_between_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    found = [dataclasses.replace(row, synthetic=False) for row in sample_rows()]
    report.update_markdown(path, found)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| H512 B16 T128 bfloat16 forward |" in text and GPU.name in text
    once = text
    report.update_markdown(path, found)
    assert path.read_text() == once
    with pytest.raises(rows.StoreError, match="synthetic rows are no results"):
        report.update_markdown(path, sample_rows())
    path.write_text(f"before\n{SUMMARY_BEGIN}\n{SUMMARY_END}\nafter\n")
    report.update_markdown(path, found)
    short = path.read_text()
    assert "| H512 B16 T128 bfloat16 forward |" in short and short.endswith(f"{SUMMARY_END}\nafter\n")
    assert "torch is ahead in" in short and "Memory" in text and "Memory" not in short
    path.write_text("no markers")
    with pytest.raises(rows.StoreError, match="needs one line"):
        report.update_markdown(path, found)


def test_two_sets_side_by_side(tmp_path, capsys):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    case = Case("a", 64, 8, 16)
    for path, factor in ((a, 1.0), (b, 0.5)):
        for provider in (OURS, CUDNN):
            rows.append(path, make_row(case, provider, 10.0 * (factor if provider == OURS else 1.0)))
    rows.append(a, make_row(case, TORCH_CELL))
    assert cli.main(["--compare", str(a), str(b), "--report", str(tmp_path / "c.html")]) == 0
    out = capsys.readouterr().out
    assert "2.000" in out and "within the noise" in out and "1 only in A" in out
    Page((tmp_path / "c.html").read_text())
    table, _ = tables.side_by_side(rows.read_all([a])[0], rows.read_all([b])[0])
    assert dict(zip(table["provider"], table[""])) == {OURS: "", CUDNN: "within the noise"}
    assert cli.main(["--compare", str(a), str(a)]) == 0, "with itself"
    assert capsys.readouterr().out.count("within the noise") == 3


def test_report_and_validation_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    for row in sample_rows():
        rows.append(path, row)
    assert cli.main(["--report", "--rows", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert cli.main(["--validate", str(path)]) == 0
    with path.open("a") as file:
        file.write('{"schema":1,')
    assert cli.main(["--validate", str(path)]) == 1
    assert cli.main(["--report", str(tmp_path / "other.html"), "--rows", str(path)]) == 1
    assert "cut off" in capsys.readouterr().err and (tmp_path / "other.html").is_file()
