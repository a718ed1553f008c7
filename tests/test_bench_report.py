"""What is made of rows: the page, the tables of the README, two sets side by side. All rows here are made up."""

import re
from dataclasses import replace

import pytest
from support.benches import FLOOR, IEEE, Page, make_row

from lstm_triton.bench import __main__ as cli
from lstm_triton.bench import cases, rows
from lstm_triton.bench.cases import MODES, Case, UsageError
from lstm_triton.bench.providers import CUDNN, OURS, TORCH_CELL
from lstm_triton.tolerance import Errors

report = pytest.importorskip("lstm_triton.bench.report", reason="needs the libraries of the extra [bench]")
tables, DataFrame = report.tables, report.DataFrame
GPU = rows.Device("cuda", "A GPU that does not exist", "0")
PERSISTENT, STEPWISE, OUR_CUDNN = (f"lstm_triton {name}" for name in ("triton-persistent", "triton-stepwise", "cudnn"))
SPLIT, LOOP = "torch by hand: split", "torch by hand: loop"
F32, H512 = dict(dtype="float32"), Case("H512", 512, 16, 128)
PACKED = {OURS: 14.0, PERSISTENT: 16.0, CUDNN: 90.0, STEPWISE: 29.0}
TIMES = [  # suite, case and microseconds of a call, of both modes
    ("hidden-sizes", Case("H64", 64, 16, 128), {OURS: 5.0, PERSISTENT: 5.0, CUDNN: 10.0, "flashrnn": 70.0, "<i>": 1.0}),
    ("hidden-sizes", H512, {OURS: 40.0, PERSISTENT: 90.0, STEPWISE: 80.0, CUDNN: 40.0, OUR_CUDNN: 39.0}),
    ("hidden-sizes", Case("H1024", 1024, 16, 128), {OURS: 90.0, PERSISTENT: 81.0, CUDNN: 40.0, "flashrnn": 70.0}),
    ("batch", Case("b", 64, 64, 128), {OURS: 5.0, PERSISTENT: 5.0, CUDNN: 30.0}),
    ("batch", Case("b", 1024, 64, 128), {OURS: 60.0, PERSISTENT: 60.0, CUDNN: 30.0}),
    ("cell", Case("c", 64, 16, 1, form="cell", **F32), {OURS: 9.0, TORCH_CELL: 4.0}),
    ("length", Case("t", 512, 16, 1), {OURS: 3.0, CUDNN: 5.0}),
    ("length", Case("t", 512, 16, 1024), {OURS: 3000.0, CUDNN: 5000.0}),
    ("features", Case("padded", 64, 8, 16, **F32), {OURS: 10.0, PERSISTENT: 10.0, CUDNN: 20.0}),
    ("features", Case("p", 64, 8, 16, rows="packed", **F32), PACKED),
    ("real", Case("nlp_awd", 64, 8, 70, layers=3, **F32), {OURS: 30.0, CUDNN: 20.0}),
    ("segments", Case("r", 64, 16, 64, resets=0.1, **F32), {OURS: 11.0, CUDNN: 50.0, SPLIT: 10.0, LOOP: 12.0}),
]


def timed(case, times, suite="hidden-sizes", **changes):
    """Timing rows, by provider, of a GPU on which auto takes cuDNN for layers, and the kernels for cells."""
    auto = {OURS: "cudnn" if case.form == "layer" else "triton", CUDNN: None}
    given = dict(device=GPU, floor=FLOOR) | changes
    backends = {name: auto.get(name, name.removeprefix("lstm_triton ")) for name in times}
    found = [make_row(case, name, us, suite, backend=backends[name], **given) for name, us in times.items()]
    return [replace(row, algorithm="STANDARD") if row.provider == CUDNN else row for row in found]


def accurate(H, T, error, **options):
    errors = {"y": Errors(9, error, error / 9), "dx": Errors(9, error / 2, error / 3)}
    case = Case("a", H, 4, T, mode="train", **IEEE, **options)
    return dict(case=case, kind="accuracy", suite="accuracy", errors=errors)


def sample_rows():
    """Rows of every suite, of a GPU that does not exist."""
    found = timed(Case("s", 64, 1, 1, carried=True, **F32), {OURS: 3.0, CUDNN: 4.0}, "step")
    for suite, case, times in TIMES:
        for execution in ("eager", "graph") if suite == "cell" else ("eager",):
            for mode in MODES:
                found += timed(replace(case, mode=mode), times, suite, execution=execution)
    for measured in (
        *(accurate(512, 1024, 4e-6), accurate(19, 7, 2e-6), accurate(512, 1, 3e-6, form="cell")),
        dict(kind="memory", suite="memory", values={"saved_bytes": 3 * 10**6, "outputs_bytes": 5}),
        dict(kind="overhead", suite="overhead"),
        dict(kind="cold-start", suite="cold-start", values={"empty_first_call_s": 2.0}),
        dict(kind="roof", suite="roofs", values={"copy_bytes_per_s": 3e12, "exchange_us": 0.6}),
        dict(provider="haste", status="skipped"),
        dict(provider="torchrl", status="wrong"),
        dict(provider="<script>alert(1)</script>", status="failed", reason="a <b> & c"),
        *(dict(kind="anchor", suite="anchor", us=100.0 + 4 * k, date=f"2030-01-01T00:0{k}:00+00:00") for k in range(3)),
    ):
        found.append(make_row(device=GPU, **measured))
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


def test_the_page_has_every_section_and_fetches_nothing(render):
    text = render(sample_rows())
    assert Page(text).fetched == {"data:,"}
    assert "<script" not in text and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "http" not in re.sub(r"<td>[^<]*</td>", "", text)
    assert re.findall("<h3>(.*?)</h3>", text) == [view["title"] for view in report.VIEWS]
    of = {view.get("suite", view["table"]) for view in report.VIEWS}
    assert of == {*cases.SUITES, "count_lost", "lost", "not_timed", "environment"}
    for said in (
        *("SYNTHETIC", "wrong", "a reason", "a &lt;b&gt; &amp; c", "&lt;i&gt;", "moved by 8.0%"),
        *(f">{SPLIT}, us/step</th>", "lstm-triton bench --suite hidden-sizes"),
        *("prefers-color-scheme: dark", "width=device-width"),
    ):
        assert said in text, said
    assert "No rows of this yet" not in text and "<i>" not in text
    # Figures: time per step, and torch's time over each.
    step, ratio = text[text.index('id="d0-0">') : text.index("</figure>")].split("<svg")[1:]
    assert [name for name in (CUDNN, "kernels", "auto", "flashrnn", "floor") if f">{name}</text>" not in step] == []
    assert "microseconds per step" in step and "hidden size" in step and "time over theirs" in ratio
    assert ">floor</text>" not in ratio and ">flashrnn</text>" in ratio
    assert "var(--s1)" in step and "#04040" not in step + ratio, "colours are the page's"
    heat = re.findall(r'<span class="heat" style="--hue:var\(--(s\d)\);--share:(\d+)%">([^<]*)</span>', text)
    assert {("s0", "23", "2.00 ▲"), ("s1", "23", "0.50 ▼")} <= set(heat)
    # Few rows, or none.
    few = render([make_row()], ["a.jsonl:3: not JSON"])
    assert Page(few).text and "No rows of this yet" in few and "a.jsonl:3: not JSON" in few and rows.CPU_LABEL in few
    assert "There are no rows yet" in render([])


def test_losses_are_shown_with_what_is_known():
    given = compared(sample_rows())
    lost = {way: tables.lost(*given, (way,)) for way in tables.WAYS}
    assert all(len(of) and all(ratio < 1 for ratio in of["speed-up"]) for of in lost.values())
    assert len(tables.lost(*given)) == sum(map(len, lost.values()))
    counts = tables.count_lost(*given)["torch is ahead in"]
    assert [count.split()[0] for count in counts] == [str(len(of)) for of in lost.values()]
    # cuDNN, called by this package, hides no loss of its kernels.
    found = given[1].set_index("of")
    one = found[found["case"] == H512].loc[["kernels", "auto"]]
    assert [row.provider for row in one["row"]] == [STEPWISE, OURS]
    assert {row.provider for row in one["torch"]} == {CUDNN}
    assert list(one["ratio"]) == pytest.approx([0.5, 1.0]) and list(one["lost"]) == [True, False]
    name = H512.describe()
    assert name in lost["kernels"].index and name not in lost["auto"].index
    by_cudnn = tables.lost(*given, ("kernels",), CUDNN)
    assert by_cudnn.loc[name, "what ran"] == STEPWISE
    assert "cuDNN: STANDARD" in by_cudnn.loc[name, "what is known of why"]
    assert [sum("cell" in name for name in of.index) for of in (lost["kernels"], by_cudnn)] == [4, 0], (
        "no cell is cuDNN's"
    )
    segments = found[found["suite"] == "segments"].loc["auto"].iloc[0]
    assert segments["torch"].provider == SPLIT and segments["ratio"] == pytest.approx(10 / 11)
    assert list(tables.comparisons([make_row(H512, CUDNN)])["of"]) == [CUDNN]


def test_features_stand_beside_the_padded_time_and_readings_beside_cases():
    newest, found = compared(sample_rows())
    table = tables.timings(newest, found[found["suite"] == "features"], base="padded")
    packed = next(line for case, line in table.iterrows() if case.startswith("p: "))
    multiples = [packed[f"{name}, us/step"].partition(" ")[2] for name in PACKED]
    assert multiples == ["(x1.40)", "(x1.60)", "(x4.50)", ""]
    assert list(tables.readings([row for row in newest if row.suite == "accuracy"], None)[OURS].items()) == [
        ("H512 B4 T1 cell float32 ieee train", "max 3.0e-06 (y), RMS 1.0e-06 (dx)"),
        ("H19 B4 T7 float32 ieee train", "max 2.0e-06 (y), RMS 6.7e-07 (dx)"),
        ("H512 B4 T1024 float32 ieee train", "max 4.0e-06 (y), RMS 1.3e-06 (dx)"),
    ]
    held = [row for row in newest if row.kind == "memory"]
    (line,) = tables.readings([*held, replace(held[0], provider=CUDNN)], None).itertuples(index=False)
    assert list(line) == ["saved_bytes 3 M, outputs_bytes 5"] * 2


def test_the_newest_row_counts_and_other_settings_stand_apart(render):
    warm, flushed = (
        timed(H512, {OURS: us}, l2=l2, date=f"2030-01-0{day}T00:00:00+00:00")[0]
        for us, l2, day in ((10.0, "warm", 1), (20.0, "flushed", 2))
    )
    newer = replace(warm, date="2030-01-02T00:00:00+00:00")
    assert [*tables.newest([newer, warm]).values()] == [[newer]]
    assert tables.newest([flushed, warm]) == {
        GPU.name: [warm],
        f"{GPU.name}, L2 cache flushed before each call": [flushed],
    }
    assert "--suite hidden-sizes --flush-l2" in render([flushed])
    cpu = make_row()
    one, two = (replace(cpu, device=replace(cpu.device, threads=n)) for n in (1, 2))
    assert [name.rpartition(", ")[2] for name in tables.newest([one, two])] == ["1 thread", "2 threads"]
    assert len(tables.side_by_side([one], [two])[0]) == 1, "machines with other numbers of threads are compared"
    assert not len(tables.side_by_side([warm], [flushed])[0])


def test_figures_bear_one_point_none_and_large_ranges():
    labels = ("a", "x", "y")
    one = report.curves(labels, DataFrame({"s": {4.0: 2.0}, "t": {}}), (1.0, "a level"))
    assert one.startswith("<svg") and ">s</text>" in one and ">t</text>" not in one and ">a level</text>" in one
    assert report.curves(labels, DataFrame({"s": {}})) == ""
    wide = report.curves(labels, DataFrame({"s": {1.0: 1e-3, 1e6: 1e7}}))
    assert wide.count("<text") < 40
    Page(one + wide)  # ids differ


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
    assert headline in text and GPU.name in text and "Memory" in text and "| ▼ 0.50 | 1.00 |" in text
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
    assert re.search(rf"{OURS} .* 2.000 *\n", out) and re.search(rf"{CUDNN} .* 1.000 +within the noise", out)
    assert "1 only in A" in out and Page(page.read_text()).tags
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
