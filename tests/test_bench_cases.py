"""What is measured and what it is held against: suites, their order, real workloads, cuDNN's algorithms, floors, statistics."""

import re

import pytest
from test_bench_rows import make_row

from lstm_triton.bench import cases, cudnn, floor, stats, suites, workloads
from lstm_triton.bench.cases import Case, Task

H100 = cudnn.Gpu((9, 0), 132)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "PERSIST_STATIC"),
        ({"batch": 128}, "PERSIST_STATIC"),
        ({"batch": 136}, "STANDARD"),
        ({"batch": 12}, "STANDARD"),
        ({"hidden_size": 1024}, "PERSIST_STATIC"),
        ({"hidden_size": 1152}, "STANDARD"),
        ({"hidden_size": 500}, "STANDARD"),
        ({"input_size": 100}, "STANDARD"),
        ({"layers": 2}, "STANDARD"),
        ({"bidirectional": True}, "STANDARD"),
        ({"proj_size": 64}, "STANDARD"),
        ({"rows": "packed"}, "STANDARD"),
        ({"rows": "lengths"}, "STANDARD"),
        ({"dtype": "bfloat16"}, "STANDARD"),
        ({"dtype": "float32"}, "STANDARD"),
        ({"hidden_size": 192, "dtype": "bfloat16"}, "PERSIST_STATIC_SMALL_H"),
        ({"hidden_size": 193, "dtype": "bfloat16"}, "STANDARD"),
        ({"hidden_size": 128, "dtype": "float32", "mode": "train"}, "PERSIST_STATIC_SMALL_H"),
        (
            {"hidden_size": 192, "dtype": "float32", "mode": "train"},
            "PERSIST_STATIC_SMALL_H forward, STANDARD backward",
        ),
        ({"hidden_size": 64, "dtype": "float64"}, "STANDARD"),
        ({"hidden_size": 64, "rows": "packed"}, "STANDARD"),
    ],
)
def test_cudnn_algorithm(changes, expected):
    options = {"hidden_size": 768, "input_size": 768, "batch": 16, "length": 100, "dtype": "float16"} | changes
    assert cudnn.algorithm(Case("a", **options), H100) == expected


def test_cudnn_algorithm_depends_on_the_gpu():
    case = Case("a", 768, 16, 100, dtype="float16")
    assert cudnn.algorithm(case, cudnn.Gpu((8, 6), 108)) == "STANDARD"
    assert cudnn.algorithm(case, cudnn.Gpu((8, 0), 97)) == "STANDARD"
    assert cudnn.algorithm(case, cudnn.Gpu((8, 0), 98)) == "PERSIST_STATIC"
    assert "copies" in cudnn.remark(Case("a", 8, 1, 1)) and cudnn.remark(case) is None


ROOFS = floor.Roofs(copy_bytes_per_s=1e12, flops_per_s={"bfloat16": 1e15, "float32 ieee": 1e13}, exchange_us=0.5)


def test_floor_by_hand():
    found = floor.floor(Case("a", 1024, 64, 100), ROOFS)
    # 2 * 4 * 1024 * 1024 * 64 operations a step; x, y of 64 x 1024 and a hundredth of 8 * 1024 * 1024 weights, 2 bytes each
    assert found.tensor_us == pytest.approx(8 * 1024 * 1024 * 64 / 1e15 * 1e6)
    assert found.memory_us == pytest.approx((2 * 64 * 1024 * 2 + 8 * 1024 * 1024 * 2 / 100) / 1e12 * 1e6)
    assert found.us_per_step == pytest.approx(0.5 + max(found.tensor_us, found.memory_us))
    training = floor.floor(Case("a", 1024, 64, 100, mode="train"), ROOFS)
    assert training.exchange_us == pytest.approx(1.0) and training.tensor_us == pytest.approx(3 * found.tensor_us)


def test_floor_exchanges():
    assert floor.floor(Case("a", 128, 1, 100), ROOFS).exchange_us == floor.LOCAL_EXCHANGE_US
    assert floor.floor(Case("a", 512, 1, 1), ROOFS).exchange_us == 0
    unmeasured = floor.Roofs(1e12, {"bfloat16": 1e15}, None)
    assert floor.floor(Case("a", 512, 1, 100), unmeasured).exchange_us == floor.ASSUMED_EXCHANGE_US
    assert floor.floor(Case("a", 512, 1, 100, dtype="float16"), ROOFS) is None
    two = floor.floor(Case("a", 1024, 64, 100, layers=2, bidirectional=True), ROOFS)
    assert two.tensor_us == pytest.approx(4 * floor.floor(Case("a", 1024, 64, 100), ROOFS).tensor_us)


def test_roofs_from_rows():
    values = {
        "copy_bytes_per_s": 1e12,
        "gemm_float32_ieee_flops_per_s": 1e13,
        "gemm_bfloat16_flops_per_s": 1e15,
        "exchange_us": 0.5,
    }
    row = make_row(kind="roof", suite="roofs", values=values)
    assert floor.from_rows([row], row["device"]["name"]) == ROOFS
    assert floor.from_rows([row], "another") is None
    assert floor.from_rows([row | {"status": "failed", "reason": "x"}], row["device"]["name"]) is None


def test_percentiles_of_known_samples():
    assert [stats.percentile([4, 1, 3, 2, 5], p) for p in (0, 20, 50, 80, 100)] == [1, 1.8, 3, 4.2, 5]
    assert stats.percentile([7], 80) == 7


def test_median_interval_of_known_samples():
    # from tables of the sign test: n = 6: ranks 1 and 6, 96.9 %; n = 10: 2 and 9, 97.9 %; n = 20: 6 and 15, 95.9 %
    for n, low, high, confidence in ((6, 1, 6, 0.96875), (10, 2, 9, 0.978515625), (20, 6, 15, 0.9586)):
        found = stats.median_interval(range(1, n + 1))
        assert (found.low, found.high) == (low, high) and found.confidence == pytest.approx(confidence, abs=1e-4)
    assert stats.median_interval([3.0]) == stats.Interval(3.0, 3.0, 0.0)
    assert stats.median_interval([1, 2, 3]).confidence == pytest.approx(0.75)


def test_settled_is_for_steady_samples():
    assert not stats.is_settled([1.0] * 5, 0.01)
    assert stats.is_settled([1.0] * 6, 0.01)
    assert not stats.is_settled([1.0, 2.0] * 20, 0.01)


def test_every_suite_has_cases_at_every_scale():
    for scale in suites.SCALES:
        for device in ("cpu", "cuda"):
            for suite in suites.SUITES:
                assert suites.tasks([suite], scale, device), (scale, device, suite)
            everything = suites.tasks(suites.SUITES, scale, device)
            keys = [(t.suite, t.kind, t.interpreter, t.case.name, cases.case_key(t.case.to_json())) for t in everything]
            assert len(set(keys)) == len(keys)
    assert set(suites.SUITES) >= {
        "hidden-sizes", "batch", "length", "cell", "real", "memory", "accuracy", "overhead", "cold-start",
    }  # fmt: skip


def test_a_short_run_tells_the_story():
    order = suites.tasks(suites.SUITES, "gpu", "cuda")
    assert order[0].kind == "roof"
    headline = [t.case for t in order[1:7]]
    assert {(c.hidden_size, c.batch, c.length) for c in headline} == {(768, 16, 1024)}
    assert {(c.dtype, c.mode) for c in headline} == {
        (d, m) for d in ("bfloat16", "float16", "float32") for m in ("forward", "train")
    }
    assert {t.suite for t in order[:60]} >= {
        "hidden-sizes",
        "cell",
        "accuracy",
        "real",
        "memory",
        "overhead",
        "features",
    }
    sizes = {t.case.hidden_size for t in order if t.suite == "hidden-sizes"}
    assert min(sizes) == 32 and max(sizes) == 4096
    cells = {(t.case.hidden_size, t.case.batch) for t in order if t.suite == "cell"}
    assert {(64, 1), (4096, 1024)} <= cells
    cell_tasks = [t for t in order if t.suite == "cell"]
    assert all(t.executions == ("eager", "graph") for t in cell_tasks)
    assert len(cells) == 35 and all("torch.compile" in t.providers for t in cell_tasks), "compiled at every size"


def test_a_cpu_gets_neither_graphs_nor_tf32():
    for task in suites.tasks(suites.SUITES, "cpu", "cpu"):
        assert task.executions == ("eager",)
        assert task.case.precision in ("ieee", "") and task.case.flops() < 1e11


def test_float32_products_default_to_what_torch_does():
    assert Case("a", 8, 1, 4, dtype="float32").precision == "tf32"
    assert Case("a", 8, 1, 1, form="cell", dtype="float32").precision == "ieee"
    assert Case("a", 8, 1, 4, dtype="float16", precision="tf32").precision == ""


@pytest.mark.parametrize("changes", [{"hidden_size": 0}, {"batch": -1}, {"length": 0}, {"resets": 2.0}, {"scale": 0.0}])
def test_sizes_that_make_no_case(changes):
    with pytest.raises(ValueError, match="less than|share"):
        Case(**({"name": "a", "hidden_size": 8, "batch": 1, "length": 4} | changes))


def test_cases_and_tasks_survive_json():
    case = Case("a", 8, 1, 4, layers=2, bidirectional=True, resets=0.1, note="n")
    assert Case.from_json(case.to_json()) == case
    task = Task("cell", case, "accuracy", ("eager", "graph"), ("x",), True)
    assert Task.from_json(task.to_json()) == task
    with pytest.raises(ValueError, match="'float8' is not one of"):
        Case("a", 8, 1, 1, dtype="float8")
    with pytest.raises(ValueError, match="a cell is one step"):
        Case("a", 8, 1, 2, form="cell")


def test_real_workloads_lie_in_their_ranges():
    import csv

    with workloads.TABLE.open(encoding="utf-8", newline="") as file:
        table = {row["id"]: row for row in csv.DictReader(file)}
    loaded = workloads.load()
    assert len(loaded) == len(table) == 50
    run = [w for w in loaded if w.case is not None]
    assert len(run) >= 24 and all(w.source for w in loaded)
    for w in run:
        row, case = table[w.id], w.case
        for field, value in (
            ("input_size", case.input_size), ("hidden_size", case.hidden_size), ("layers", case.layers), ("B", case.batch),
            ("T", case.length),
        ):  # fmt: skip
            given = [int(n) for n in re.findall(r"(?<!x)\d+", row[field].split("(")[0])]
            if ".." in row[field] and not row[field].endswith(".."):
                assert given[0] <= value <= given[-1], (w.id, field)
            elif row[field].startswith((">=", "<=")):
                assert value == given[0], (w.id, field)
            else:
                assert value in given, (w.id, field)
        assert case.bidirectional == (row["bidir"] == "1")
        assert (case.mode == "train") == ("bwd" in row["kind"] or w.id == "ts_tft"), w.id
    assert {w.case.rows for w in run} == {"padded", "packed", "lengths"}
    assert any(w.case.proj_size for w in run) and any(w.case.resets for w in run) and any(w.in_graph for w in run)
    assert all(w.reason for w in loaded if w.case is None)
