"""What is measured, by whom, and what it is held against: cases, suites, their order, real workloads, providers, cuDNN's
algorithms, floors."""

import re
from dataclasses import replace
from itertools import product

import pytest
from support.benches import make_row

from lstm_triton import dispatch
from lstm_triton.bench import cases, providers, roofs
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.providers import CUDNN, KERNELS, OURS, TORCH_CELL

WRONG_CASES = [
    *(({name: size}, "above 0") for name, size in (("hidden_size", 0), ("batch", -1), ("length", 0), ("scale", 0.0))),
    ({"resets": 2.0}, "a share, from 0 to 1"),
    ({"dtype": "float8"}, "no dtype is 'float8'"),
    ({"form": "cell"}, "a cell is one step"),
    ({"rows": "packed", "cell": "gru"}, "a GRU is a layer"),
    ({"carried": True}, "a carried state"),
]


def test_what_makes_a_case():
    case = Case("a", 8, 1, 4)
    assert replace(case, dtype="float32").precision == "tf32"  # as torch has it
    assert Case("a", 8, 1, 1, form="cell", dtype="float32").precision == "ieee"
    assert replace(case, dtype="float16", precision="tf32").precision == ""
    assert replace(case, note="n") == case != replace(case, length=5)
    unusual = Case("a", 8, 1, 4, "loop", 3, bidirectional=True, resets=0.5, dtype="float32")
    assert unusual.describe() == "H8 B1 T4 loop input size 3 bidirectional resets 0.5 float32 ieee forward"
    assert replace(case, mode="train").describe() == "H8 B1 T4 bfloat16 train"
    for changes, message in WRONG_CASES:
        with pytest.raises(ValueError, match=f"case: .*{message}"):
            replace(case, **changes)


def test_every_suite_has_cases_at_every_scale():
    named = "hidden-sizes batch length cell real memory accuracy overhead cold-start step features segments roofs"
    assert set(cases.SUITES) == set(named.split())
    for scale, device in product(cases.SIZES, ("cpu", "cuda")):
        everything = cases.tasks(cases.SUITES, scale, device)
        assert len(set(everything)) == len(everything) and {task.suite for task in everything} == set(cases.SUITES)
    for task in cases.tasks(cases.SUITES, "cpu", "cpu"):  # no graphs and no TF32 there, nor what takes minutes
        assert list(task.executions) == ["eager"]
        assert task.case.precision in ("ieee", "") and task.case.flops() < 1e11


def test_a_short_run_tells_the_story_and_what_users_ask_for_is_there():
    order = cases.tasks(cases.SUITES, "gpu", "cuda")
    headline = [(t.case.hidden_size, t.case.batch, t.case.length, t.case.dtype, t.case.mode) for t in order[1:7]]
    assert order[0].kind == "roof"
    assert sorted(headline) == sorted(product([768], [16], [1024], ("bfloat16", "float16", "float32"), cases.MODES))
    assert {t.suite for t in order[:60]} >= set("hidden-sizes cell accuracy real memory overhead features".split())
    cells, carried = [t for t in order if t.suite == "cell"], [t for t in order if t.case.carried]
    assert all("torch.compile" in t.providers for t in cells), "compiled at every size"
    assert {(t.suite, t.case.form) for t in carried} >= {("step", "layer"), ("step", "cell"), ("real", "cell")}
    assert all(list(t.executions) == ["eager", "graph"] for t in [*cells, *carried])
    sizes = {t.case.hidden_size for t in order if t.suite == "hidden-sizes"}
    grid = {(t.case.hidden_size, t.case.batch) for t in cells}
    assert (min(sizes), max(sizes), len(grid)) == (32, 4096, 35) and {(64, 1), (4096, 1024)} <= grid
    assert {(t.suite, t.case.mode) for t in order if t.case.cell == "gru"} == {
        ("features", mode) for mode in cases.MODES
    }


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
            is_range = ".." in row[field] and not row[field].endswith("..")
            given = range(given[0], given[-1] + 1) if is_range else given
            given = given[:1] if row[field].startswith((">=", "<=")) else given
            assert value in given, (case.name, field)
        assert case.bidirectional == (row["bidir"] == "1")
        assert case.precision == "ieee" or "no TF32" not in row["extras"], case.name
        assert (case.mode == "train") == ("bwd" in row["kind"] or case.name == "ts_tft"), case.name
    of = [case for _, case in run]
    assert {case.rows for case in of} == {"padded", "packed", "lengths"}
    assert any(c.proj_size for c in of) and any(c.resets for c in of) and any(c.carried for c in of)


def test_who_is_measured():
    """Roofs and anchors know no choice of providers. Without one every backend is forced on a GPU."""
    (roof,) = cases.tasks(["roofs"], "tiny", "cpu")
    host = next(t for t in cases.tasks(["overhead"], "tiny", "cpu") if t.case.form == "cell")
    for task, kind, asked, expected in (
        (cases.ANCHORS["cuda"], "cuda", (OURS,), [CUDNN]),
        (roof, "cuda", (OURS,), ["copies", "matrix products", "exchange"]),
        (roof, "cpu", None, ["copies", "matrix products"]),
        (host, "cuda", None, [KERNELS, TORCH_CELL]),
        (host, "cpu", None, [OURS, TORCH_CELL]),
    ):
        assert [name for name, _ in providers.pairs_of(task, kind, asked)] == expected
    plain, resets = (Task("s", Case("a", 512, 16, 1024, resets=share)) for share in (0.0, 0.1))
    forced = {f"lstm_triton {backend}" for backend in ("auto", "triton-persistent", "triton-stepwise", "cudnn")}
    assert forced <= {name for name, _ in providers.pairs_of(plain, "cuda")}
    assert "cudnn" not in str(providers.pairs_of(resets, "cuda"))
    assert {f"lstm_triton {backend}" for backend in dispatch.BACKENDS} <= set(providers.PROVIDERS)


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
    usual = Case("a", 768, 16, 100, input_size=768, dtype="float16")
    for expected, changes in ((expected, of) for expected, words in ALGORITHMS.items() for of in words.split()):
        given = {name: int(text) if text.isdigit() else text for name, text in re.findall(r"(\w+)=(\w+)", changes)}
        assert providers.algorithm(replace(usual, **given), (9, 0), 132) == expected, changes
    for capability, sms, expected in (((8, 6), 108, STANDARD), ((8, 0), 97, STANDARD), ((8, 0), 98, STATIC)):
        assert providers.algorithm(usual, capability, sms) == expected


ROOFS = dict(copy_bytes_per_s=1e12, gemm_float32_ieee_flops_per_s=1e13, gemm_bfloat16_flops_per_s=1e15, exchange_us=0.5)


def test_floors_by_hand_and_where_their_roofs_come_from():
    case = Case("a", 1024, 64, 100)
    found = roofs.floor(case, ROOFS)
    # 2 * 4 * 1024 * 1024 * 64 operations a step; x, y of 64 x 1024 and a hundredth of 8 * 1024 * 1024 weights, 2 bytes each
    assert found.tensor_us == pytest.approx(8 * 1024 * 1024 * 64 / 1e15 * 1e6)
    assert found.memory_us == pytest.approx((2 * 64 * 1024 * 2 + 8 * 1024 * 1024 * 2 / 100) / 1e12 * 1e6)
    assert found.us_per_step == pytest.approx(0.5 + max(found.tensor_us, found.memory_us))
    for times, exchange_us, changes in (
        (3, 1.0, {"mode": "train"}),
        (0.75, 0.5, {"cell": "gru"}),
        (4, 0.5, {"layers": 2, "bidirectional": True}),
        (1 / 64, roofs.LOCAL_EXCHANGE_US, {"hidden_size": 128}),
        (1, 0.0, {"length": 1}),
    ):
        other = roofs.floor(replace(case, **changes), ROOFS)
        assert other.tensor_us == pytest.approx(times * found.tensor_us)
        assert other.exchange_us == pytest.approx(exchange_us)
    unmeasured = {name: value for name, value in ROOFS.items() if name != "exchange_us"}
    assert roofs.floor(case, unmeasured).exchange_us == roofs.ASSUMED_EXCHANGE_US
    assert roofs.floor(replace(case, dtype="float16"), ROOFS) is None
    row, failed = (make_row(kind="roof", suite="roofs", values=ROOFS, status=status) for status in ("ok", "failed"))
    assert roofs.from_rows([row], row.device.name) == ROOFS
    assert roofs.from_rows([row], "another") == roofs.from_rows([failed], row.device.name) == {}
