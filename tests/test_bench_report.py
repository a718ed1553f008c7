"""What is made of rows: the page, the tables of the README, two sets side by side. All rows here are made up."""

import re
from dataclasses import replace

import pytest
from support.benches import FLOOR, IEEE, Page, make_row

from lstm_triton.bench import __main__ as cli
from lstm_triton.bench import rows
from lstm_triton.bench.cases import Case, UsageError
from lstm_triton.bench.providers import CUDNN, OURS, TORCH_CELL
from lstm_triton.tolerance import Errors

report = pytest.importorskip("lstm_triton.bench.report", reason="needs the libraries of the extra [bench]")
tables, DataFrame = report.tables, report.DataFrame
GPU = rows.Device("cuda", "A GPU that does not exist", "0")
PERSISTENT, STEPWISE = "lstm_triton triton-persistent", "lstm_triton triton-stepwise"
BACKENDS = {PERSISTENT: "triton-persistent", STEPWISE: "triton-stepwise"}
SPLIT, LOOP = "torch by hand: split", "torch by hand: loop"


def timed(case, times, suite="hidden-sizes", **changes):
    """Timing rows, by provider, of a GPU on which auto takes cuDNN for layers, and the kernels for cells."""
    auto = {OURS: "cudnn" if case.form == "layer" else "triton"}
    return [
        make_row(case, name, us, suite, **({"device": GPU, "backend": (BACKENDS | auto).get(name)} | changes))
        for name, us in times.items()
    ]


def sample_rows():
    """Rows of every suite, of a GPU that does not exist."""
    found = []
    for mode in ("forward", "train"):
        f32 = dict(dtype="float32", mode=mode)
        for H, ours in ((64, 5.0), (512, 20.0), (1024, 90.0)):
            times = {OURS: ours, PERSISTENT: ours * 0.9, CUDNN: 40.0, "flashrnn": 70.0}
            found += timed(Case(f"H{H}", H, 16, 128, mode=mode), times, floor=FLOOR)
            found += timed(Case("b", H, 64, 128, mode=mode), {OURS: ours, PERSISTENT: ours, CUDNN: 30.0}, "batch")
        for execution, ours in (("eager", 4.0), ("graph", 2.0)):
            cell = Case("c", 64, 16, 1, form="cell", **f32)
            found += timed(cell, {OURS: ours, TORCH_CELL: 9.0}, "cell", execution=execution)
        for T in (1, 1024):
            found += timed(Case("t", 512, 16, T, mode=mode), {OURS: 3.0 * T, CUDNN: 5.0 * T}, "length")
        times = {OURS: 10.0, PERSISTENT: 9.0, STEPWISE: 40.0, CUDNN: 50.0}
        found += timed(Case("padded", 64, 8, 16, **f32), times, "features")
        found += timed(Case("nlp_awd", 64, 8, 70, layers=3, **f32), {OURS: 30.0, CUDNN: 20.0}, "real")
        times = {OURS: 11.0, CUDNN: 50.0, SPLIT: 10.0, LOOP: 12.0}
        found += timed(Case("resets 0.1", 64, 16, 64, resets=0.1, **f32), times, "segments")
    found += timed(Case("s", 64, 1, 1, dtype="float32", carried=True), {OURS: 3.0, CUDNN: 4.0}, "step")
    for kind, suite, measured in (
        ("accuracy", "accuracy", dict(errors={"y": Errors(9, 2e-3, 3e-4)})),
        ("memory", "memory", dict(values={"saved_bytes": 2**20, "outputs_bytes": 5, "peak_bytes": 2**21})),
        ("overhead", "overhead", {}),
        ("cold-start", "cold-start", dict(values={"empty_first_call_s": 2.0})),
        ("roof", "roofs", dict(values={"copy_bytes_per_s": 3e12, "exchange_us": 0.6})),
        ("timing", "hidden-sizes", dict(provider="haste", status="skipped")),
        ("timing", "hidden-sizes", dict(provider="torchrl", status="wrong")),
        *(("anchor", "anchor", dict(us=100.0 + 4 * k, date=f"2030-01-01T00:0{k}:00+00:00")) for k in range(3)),
    ):
        found.append(make_row(kind=kind, suite=suite, device=GPU, **measured))
    return found


@pytest.fixture
def render(tmp_path):
    """render(rows, problems): the text of their page."""

    def rendered(found, problems=()):
        report.write(path := tmp_path / "new" / "report.html", found, problems)
        return path.read_text(encoding="utf-8")

    return rendered


def compared(found):
    """The rows of the one machine, and their comparisons."""
    (newest,) = tables.newest(found).values()
    return newest, tables.comparisons(newest)


TITLES = """Time per step against hidden size|Comparisons that torch wins|Where cuDNN still wins|Hidden size by batch
Scaling in the number of steps|One step: the cell|One step a call, the state carried|LSTMs that people run
Sources of their shapes|What features cost|Beside what torch alone can do|Memory of a training step
Accuracy against float64|Host time of a call|The first call|Where torch is ahead, the worst first
Not timed: wrong, failed, skipped|Roofs and floors|Environment and drift"""


def test_the_page_has_every_section_and_fetches_nothing(render):
    text = render(sample_rows())
    page = Page(text)
    assert page.open == [] and page.links <= page.ids and set(page.fetched) == {"data:,"}
    assert "<script" not in text and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "http" not in re.sub(r"<td>[^<]*</td>", "", text)
    assert re.findall("<h3>(.*?)</h3>", text) == re.split(r"[|\n]", TITLES)
    assert "No rows of this yet" not in text and "wrong" in text and "a reason" in text
    assert f">{SPLIT}, us/step</th>" in text
    assert "SYNTHETIC" in text and "lstm-triton bench --suite hidden-sizes" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "moved by 8.0%" in text
    first = text[text.index('id="d0-0">') : text.index("</figure>")]
    step, ratio = first.split("<svg")[1:]
    assert [name for name in (CUDNN, "kernels", "auto", "flashrnn", "floor") if f">{name}</text>" not in step] == []
    assert "microseconds per step" in step and "hidden size" in step and "time over theirs" in ratio
    assert ">floor</text>" not in ratio and ">flashrnn</text>" in ratio
    assert re.search(r"var\(--s1\)", step) and "#04040" not in first, "colours are the page's"
    # Losses are shown with what is known.
    given = compared(sample_rows())
    lost = [tables.lost(*given, (way,)) for way in tables.WAYS]
    assert all(len(of) and all(ratio < 1 for ratio in of["speed-up"]) for of in lost)
    assert len(tables.lost(*given)) == sum(map(len, lost))
    counts = tables.count_lost(*given)["torch is ahead in"]
    assert [count.split()[0] for count in counts] == [str(len(of)) for of in lost]
    assert all(f"<td>{count}</td>" in text for count in counts)


def test_cudnn_called_by_this_package_hides_no_loss_of_its_kernels():
    case = Case("H512", 512, 16, 128)
    found = timed(case, {OURS: 40.0, PERSISTENT: 90.0, STEPWISE: 80.0})
    found += timed(case, {CUDNN: 40.0}, algorithm="STANDARD")
    for backend, us in (("cudnn", 39.0), ("torch", 1.0)):
        found += timed(case, {f"lstm_triton {backend}": us}, backend=backend)
    given = compared(found)
    one = given[1].set_index("of").loc[["kernels", "auto"]]
    assert [row.provider for row in one["row"]] == [STEPWISE, OURS] and {row.provider for row in one["torch"]} == {
        CUDNN
    }
    assert list(one["ratio"]) == pytest.approx([0.5, 1.0]) and list(one["lost"]) == [True, False]
    won = tables.lost(*given, ("kernels",), CUDNN)
    assert won["what ran"].item() == STEPWISE and "cuDNN: STANDARD" in won["what is known of why"].item()
    assert not len(tables.lost(*given, ("auto",)))
    assert list(tables.count_lost(*given)["torch is ahead in"]) == ["1 of 1", "0 of 1"]
    assert "| ▼ 0.50 | 1.00 |" in report.markdown(found)
    cells = compared(timed(Case("c", 64, 4, 1, form="cell"), {OURS: 9.0, TORCH_CELL: 4.0}))
    assert len(tables.lost(*cells, ("kernels",)))
    assert not len(tables.lost(*cells, ("kernels",), CUDNN)), "no cell is cuDNN's"
    times = {OURS: 11.0, CUDNN: 50.0, SPLIT: 10.0, LOOP: 12.0}
    segments = compared(timed(Case("r", 64, 4, 9, resets=0.1), times))[1].set_index("of").loc["auto"]
    assert segments["torch"].provider == SPLIT and segments["ratio"] == pytest.approx(10 / 11)
    assert list(tables.comparisons([make_row(case, CUDNN)])["of"]) == [CUDNN]


def test_the_newest_row_counts_and_other_settings_stand_apart(render):
    case = Case("H512", 512, 16, 128)
    warm, flushed = (
        timed(case, {OURS: us}, l2=l2, date=f"2030-01-0{day}T00:00:00+00:00")[0]
        for us, l2, day in ((10.0, "warm", 1), (20.0, "flushed", 2))
    )
    newer = replace(warm, date="2030-01-02T00:00:00+00:00")
    assert [*tables.newest([newer, warm]).values()] == [[newer]]
    assert [*tables.newest([warm, flushed]).values()] == [[warm], [flushed]], "the newer row is of another measurement"
    parts = tables.newest([flushed, warm, *timed(case, {CUDNN: 9.0}, l2="warm")])
    assert list(parts) == [GPU.name, f"{GPU.name}, L2 cache flushed before each call"]
    assert "--suite hidden-sizes --flush-l2" in render([flushed])
    cpu = make_row()
    one, two = (replace(cpu, device=replace(cpu.device, threads=n)) for n in (1, 2))
    assert [name.rpartition(", ")[2] for name in tables.newest([one, two])] == ["1 thread", "2 threads"]
    assert len(tables.side_by_side([one], [two])[0]) == 1, "machines with other numbers of threads are compared"
    assert not len(tables.side_by_side([warm], [flushed])[0])


def test_features_stand_beside_the_padded_time_and_readings_beside_cases():
    f32 = dict(dtype="float32")
    found = timed(Case("padded", 64, 8, 16, **f32), {OURS: 10.0, PERSISTENT: 10.0, CUDNN: 20.0}, "features")
    times = {OURS: 14.0, PERSISTENT: 16.0, CUDNN: 90.0, STEPWISE: 29.0}
    found += timed(Case("packed", 64, 8, 16, rows="packed", **f32), times, "features")
    table = tables.timings(*compared(found), base="padded")
    (packed,) = (line for case, line in table.iterrows() if case.startswith("packed: "))
    multiples = [packed[f"{name}, us/step"].partition(" ")[2] for name in times]
    assert multiples == ["(x1.40)", "(x1.60)", "(x4.50)", ""]

    def row(H, T, error, **options):
        errors = {"y": Errors(9, error, error / 9), "dx": Errors(9, error / 2, error / 3)}
        case = Case("a", H, 4, T, mode="train", **IEEE, **options)
        return make_row(case, kind="accuracy", suite="accuracy", device=GPU, errors=errors)

    found = [row(512, 1024, 4e-6), row(19, 7, 2e-6), row(512, 1, 3e-6, form="cell")]
    assert list(tables.readings(*compared(found))[OURS].items()) == [
        ("H512 B4 T1 cell float32 ieee train", "max 3.0e-06 (y), RMS 1.0e-06 (dx)"),
        ("H19 B4 T7 float32 ieee train", "max 2.0e-06 (y), RMS 6.7e-07 (dx)"),
        ("H512 B4 T1024 float32 ieee train", "max 4.0e-06 (y), RMS 1.3e-06 (dx)"),
    ]
    held = [make_row(provider=p, kind="memory", values={"saved_bytes": n}) for p, n in ((OURS, 3 * 10**6), (CUDNN, 5))]
    (line,) = tables.readings(held, None).itertuples(index=False)
    assert list(line) == ["saved_bytes 3 M", "saved_bytes 5"]


def test_pages_of_few_rows_escape_cells_and_colour_them_by_who_is_ahead(render):
    assert "There are no rows yet" in render([])
    text = render([make_row()], ["a.jsonl:3: not JSON"])
    assert Page(text).open == []
    assert "No rows of this yet" in text and "a.jsonl:3: not JSON" in text and rows.CPU_LABEL in text
    found = [make_row(provider="<script>alert(1)</script>", status="failed", device=GPU, reason="a <b> & c")]
    found += timed(Case("a", 64, 8, 16), {OURS: 20.0, PERSISTENT: 5.0, CUDNN: 10.0, "<i>x</i>": 1.0})
    text = render(found)
    assert "<script>" not in text and "a &lt;b&gt; &amp; c" in text and "<i>x" not in text and "&lt;i&gt;x" in text
    heat = re.findall(r'<span class="heat" style="--hue:var\(--(s\d)\);--share:(\d+)%">([^<]*)</span>', text)
    assert set(heat) == {("s0", "23", "2.00 ▲"), ("s1", "23", "0.50 ▼")}


def test_figures_bear_one_point_none_and_large_ranges():
    labels = ("a", "x", "y")
    one = report.curves(labels, DataFrame({"s": {4.0: 2.0}, "t": {}}), (1.0, "a level"))
    assert one.startswith("<svg") and ">s</text>" in one and ">t</text>" not in one and ">a level</text>" in one
    assert report.curves(labels, DataFrame({"s": {}})) == ""
    wide = report.curves(labels, DataFrame({"s": {1.0: 1e-3, 1e6: 1e7}}))
    assert wide.count("<text") < 40
    ids = re.findall(r' id="([^"]+)"', one + wide)
    assert len(set(ids)) == len(ids)


def test_readme_tables_between_markers(tmp_path):
    path, written = tmp_path / "README.md", "begin (written by lstm-triton bench --readme) -->"
    real = [replace(row, synthetic=False) for row in sample_rows()]

    def updated(text, found=real):
        path.write_text(text)
        report.update_markdown(path, found)
        return path.read_text()

    begin, end = f"before\n<!-- benchmark: {written}\n", "<!-- benchmark: end -->\nafter\n"
    text = updated(f"{begin}old\n{end}")
    assert text.startswith(begin) and text.endswith(f"\n{end}") and "old" not in text
    headline = "| H512 B16 T128 bfloat16 forward |"
    assert headline in text and GPU.name in text and "Memory" in text
    assert updated(text) == text, "once more"
    short = updated(f"before\n<!-- benchmark summary: {written}\n<!-- benchmark summary: end -->\nafter\n")
    assert headline in short and "torch is ahead in" in short and "Memory" not in short
    for given, found, message in ((text, sample_rows(), "synthetic rows are no"), ("none", real, "needs one line")):
        with pytest.raises(UsageError, match=message):
            updated(given, found)


def test_two_sets_side_by_side_and_pages_from_the_command_line(tmp_path, capsys):
    a, b, page = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.html"
    case = Case("a", 64, 8, 16)
    for path, ours in ((a, 10.0), (b, 5.0)):
        for provider, us in ((OURS, ours), (CUDNN, 10.0)):
            rows.append(path, make_row(case, provider, us))
    rows.append(a, make_row(case, TORCH_CELL))
    assert cli.main(["--compare", str(a), str(b), "--report", str(page)]) == 0
    out = capsys.readouterr().out
    assert "2.000" in out and "within the noise" in out and "1 only in A" in out
    assert Page(page.read_text()).open == []
    table, _ = tables.side_by_side(rows.read_all([a])[0], rows.read_all([b])[0])
    assert dict(zip(table["provider"], table[""])) == {OURS: "", CUDNN: "within the noise"}
    assert cli.main(["--compare", str(a), str(a)]) == 0, "with itself"
    assert capsys.readouterr().out.count("within the noise") == 3
    assert cli.main(["--report", "--rows", str(tmp_path)]) == 0 and (tmp_path / "report.html").is_file()
    assert cli.main(["--validate", str(a)]) == 0
    with a.open("a") as file:
        file.write('{"schema":2,')
    assert cli.main(["--validate", str(a)]) == 1
    page.unlink()
    assert cli.main(["--report", str(page), "--rows", str(a)]) == 1
    assert "cut off" in capsys.readouterr().err and page.is_file()
