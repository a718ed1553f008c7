"""What is measured and what it is held against: suites, their order, real workloads, cuDNN's algorithms, floors, statistics."""

import re

import pytest
from support.benches import make_row

from lstm_triton import timing
from lstm_triton.bench import cases, providers, roofs, rows
from lstm_triton.bench.cases import Case

STATIC, SMALL, STANDARD = "PERSIST_STATIC", "PERSIST_STATIC_SMALL_H", "STANDARD"
ALGORITHMS = {
    STATIC: "{} batch=128 hidden_size=1024",
    STANDARD: """batch=136 batch=12 hidden_size=1152 hidden_size=500 input_size=100 layers=2 bidirectional=1 proj_size=64
        rows=packed rows=lengths dtype=bfloat16 dtype=float32 hidden_size=193,dtype=bfloat16 hidden_size=64,dtype=float64
        hidden_size=64,rows=packed""",
    SMALL: "hidden_size=192,dtype=bfloat16 hidden_size=128,dtype=float32,mode=train",
    f"{SMALL} forward, STANDARD backward": "hidden_size=192,dtype=float32,mode=train",
}


def test_cudnn_algorithm():
    usual = {"hidden_size": 768, "input_size": 768, "batch": 16, "length": 100, "dtype": "float16"}
    for expected, changes in ((expected, of) for expected, words in ALGORITHMS.items() for of in words.split()):
        given = {name: int(text) if text.isdigit() else text for name, text in re.findall(r"(\w+)=(\w+)", changes)}
        assert providers.algorithm(Case("a", **(usual | given)), (9, 0), 132) == expected, changes
    for capability, sms, expected in (((8, 6), 108, STANDARD), ((8, 0), 97, STANDARD), ((8, 0), 98, STATIC)):
        assert providers.algorithm(Case("a", **usual), capability, sms) == expected


ROOFS = dict(copy_bytes_per_s=1e12, gemm_float32_ieee_flops_per_s=1e13, gemm_bfloat16_flops_per_s=1e15, exchange_us=0.5)


def test_floors_by_hand_and_where_their_roofs_come_from():
    found = roofs.floor(Case("a", 1024, 64, 100), ROOFS)
    # 2 * 4 * 1024 * 1024 * 64 operations a step; x, y of 64 x 1024 and a hundredth of 8 * 1024 * 1024 weights, 2 bytes each
    assert found.tensor_us == pytest.approx(8 * 1024 * 1024 * 64 / 1e15 * 1e6)
    assert found.memory_us == pytest.approx((2 * 64 * 1024 * 2 + 8 * 1024 * 1024 * 2 / 100) / 1e12 * 1e6)
    assert found.us_per_step == pytest.approx(0.5 + max(found.tensor_us, found.memory_us))
    both = {"layers": 2, "bidirectional": True}
    for times, exchange_us, changes in ((3, 1.0, {"mode": "train"}), (0.75, 0.5, {"cell": "gru"}), (4, 0.5, both)):
        other = roofs.floor(Case("a", 1024, 64, 100, **changes), ROOFS)
        assert other.tensor_us == pytest.approx(times * found.tensor_us)
        assert other.exchange_us == pytest.approx(exchange_us)
    assert roofs.floor(Case("a", 128, 1, 100), ROOFS).exchange_us == roofs.LOCAL_EXCHANGE_US
    assert roofs.floor(Case("a", 512, 1, 1), ROOFS).exchange_us == 0
    unmeasured = {name: value for name, value in ROOFS.items() if name != "exchange_us"}
    assert roofs.floor(Case("a", 512, 1, 100), unmeasured).exchange_us == roofs.ASSUMED_EXCHANGE_US
    assert roofs.floor(Case("a", 512, 1, 100, dtype="float16"), ROOFS) is None
    row, failed = (make_row(kind="roof", suite="roofs", values=ROOFS, status=status) for status in ("ok", "failed"))
    assert roofs.from_rows([row], row.device.name) == ROOFS
    assert roofs.from_rows([row], "another") == roofs.from_rows([failed], row.device.name) == {}


def test_statistics_of_known_samples():
    found = rows.Timing.of(timing.Samples(3, [4.0, 1, 3, 2, 5], [7.0]), 2, "a clock")
    assert (found.p20_us, found.p50_us, found.p80_us) == (pytest.approx(1.8), 3, pytest.approx(4.2))
    assert (found.us_per_step, found.wall_p50_us, found.samples, found.calls_per_sample) == (1.5, 7, 5, 3)
    # from tables of the sign test: n = 6: ranks 1 and 6, 96.9 %; n = 10: 2 and 9, 97.9 %; n = 20: 6 and 15, 95.9 %
    for n, low, high, confidence in ((6, 1, 6, 0.96875), (10, 2, 9, 0.978515625), (20, 6, 15, 0.9586)):
        assert timing.median_interval(range(1, n + 1)) == (low, high, pytest.approx(confidence, abs=1e-4))
    assert timing.median_interval([3.0]) == (3.0, 3.0, 0.0)
    assert timing.median_interval([1, 2, 3])[2] == pytest.approx(0.75)
    assert [timing.is_settled(values) for values in ([1.0] * 5, [1.0] * 6, [1.0, 2.0] * 20)] == [False, True, False]


def test_every_suite_has_cases_at_every_scale():
    named = "hidden-sizes batch length cell real memory accuracy overhead cold-start step features segments roofs"
    assert set(cases.SUITES) == set(named.split())
    for scale, device in ((scale, device) for scale in cases.SIZES for device in ("cpu", "cuda")):
        everything = cases.tasks(cases.SUITES, scale, device)
        assert len(set(everything)) == len(everything) and {task.suite for task in everything} == set(cases.SUITES)
    for task in cases.tasks(cases.SUITES, "cpu", "cpu"):  # no graphs and no TF32 there, nor what takes minutes
        assert list(task.executions) == ["eager"]
        assert task.case.precision in ("ieee", "") and task.case.flops() < 1e11


def test_a_short_run_tells_the_story_and_what_users_ask_for_is_there():
    order = cases.tasks(cases.SUITES, "gpu", "cuda")
    assert order[0].kind == "roof"
    headline = [t.case for t in order[1:7]]
    assert {(c.hidden_size, c.batch, c.length) for c in headline} == {(768, 16, 1024)}
    dtypes = "bfloat16", "float16", "float32"
    assert {(c.dtype, c.mode) for c in headline} == {(d, m) for d in dtypes for m in ("forward", "train")}
    assert {t.suite for t in order[:60]} >= set("hidden-sizes cell accuracy real memory overhead features".split())
    sizes = {t.case.hidden_size for t in order if t.suite == "hidden-sizes"}
    assert min(sizes) == 32 and max(sizes) == 4096
    cell_tasks = [t for t in order if t.suite == "cell"]
    cells = {(t.case.hidden_size, t.case.batch) for t in cell_tasks}
    assert {(64, 1), (4096, 1024)} <= cells
    assert len(cells) == 35 and all("torch.compile" in t.providers for t in cell_tasks), "compiled at every size"
    steps, carried = [t for t in order if t.suite == "step"], [t for t in order if t.case.carried]
    assert {t.case.form for t in steps} == {"layer", "cell"} and {t.suite for t in carried} == {"step", "real"}
    assert all(list(t.executions) == ["eager", "graph"] for t in [*cell_tasks, *steps, *carried])
    spoken = [t.case for t in order if t.case.name.startswith("diar_infer")]
    assert {(c.hidden_size, c.layers, c.bidirectional, c.length, c.precision, c.batch) for c in spoken} == {
        (128, 4, True, 589, "ieee", batch) for batch in (1, 32)
    }
    grus = {(t.case.mode, t.suite) for t in order if t.case.cell == "gru"}
    assert grus == {("forward", "features"), ("train", "features")}


def test_what_makes_a_case():
    assert Case("a", 8, 1, 4, dtype="float32").precision == "tf32"  # as torch has it
    assert Case("a", 8, 1, 1, form="cell", dtype="float32").precision == "ieee"
    assert Case("a", 8, 1, 4, dtype="float16", precision="tf32").precision == ""
    assert Case("a", 8, 1, 4, note="n") == Case("a", 8, 1, 4) != Case("a", 8, 1, 5)
    unusual = Case("a", 8, 1, 4, "loop", 3, bidirectional=True, resets=0.5, dtype="float32")
    assert unusual.describe() == "H8 B1 T4 loop input size 3 bidirectional resets 0.5 float32 ieee forward"
    assert Case("a", 8, 1, 4, mode="train").describe() == "H8 B1 T4 bfloat16 train"
    for changes, message in (
        *(
            ({name: size}, "above 0")
            for name, size in (("hidden_size", 0), ("batch", -1), ("length", 0), ("scale", 0.0))
        ),
        ({"resets": 2.0}, "a share, from 0 to 1"),
        ({"dtype": "float8"}, "no dtype is 'float8'"),
        ({"form": "cell"}, "a cell is one step"),
        ({"rows": "packed", "cell": "gru"}, "a GRU is a layer"),
        ({"carried": True}, "a carried state"),
    ):
        with pytest.raises(ValueError, match=f"case: .*{message}"):
            Case(**({"name": "a", "hidden_size": 8, "batch": 1, "length": 4} | changes))


def test_real_workloads_lie_in_their_ranges():
    loaded = cases.workloads()
    assert len(loaded) == len({row["id"] for row, _ in loaded}) == 52 and all(row["source"] for row, _ in loaded)
    run = [(row, case) for row, case in loaded if case is not None]
    assert len(run) >= 24 and sum(row["domain"] == "RL" for row, _ in run) == 18
    assert all(len(row["run"]) > 9 for row, case in loaded if case is None), "a reason"
    names = dict(input_size="input_size", hidden_size="hidden_size", layers="layers", B="batch", T="length")
    for row, case in run:
        for field, value in ((field, getattr(case, name)) for field, name in names.items()):
            given = [int(n) for n in re.findall(r"(?<!x)\d+", row[field].split("(")[0])]
            if ".." in row[field] and not row[field].endswith(".."):
                assert given[0] <= value <= given[-1], (case.name, field)
            elif row[field].startswith((">=", "<=")):
                assert value == given[0], (case.name, field)
            else:
                assert value in given, (case.name, field)
        assert case.bidirectional == (row["bidir"] == "1")
        assert (case.mode == "train") == ("bwd" in row["kind"] or case.name == "ts_tft"), case.name
    of = [case for _, case in run]
    assert {case.rows for case in of} == {"padded", "packed", "lengths"}
    assert any(c.proj_size for c in of) and any(c.resets for c in of) and any(c.carried for c in of)
