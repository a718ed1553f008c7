"""Rows: the schema, files that were damaged, appends at the same time. And rows for the other tests of the benchmark."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from lstm_triton.bench import rows, schema, store, timing
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.providers import CUDNN, OURS

ROOT = Path(__file__).resolve().parent.parent
maker = rows.RowMaker(torch.device("cpu"), "a test", "run", synthetic=True)


def make_row(
    case=None, provider=OURS, us=10.0, suite="hidden-sizes", kind="timing", status="ok", execution="eager", **changes
):
    """A synthetic row: a timing of `us` microseconds a call."""
    case = case or Case("H64", 64, 8, 16, dtype="float32", precision="ieee")
    task = Task(suite, case, kind)
    measured = {}
    if kind in ("timing", "anchor") and status == "ok":
        samples = timing.Samples(1, [us * (1 + 0.001 * k) for k in range(-5, 6)], [us] * 11)
        measured["timing"] = samples.to_json(case.length, timing.HostClock())
    reason = None if status == "ok" else "a reason"
    return maker.make(task, provider, execution, status, reason, state={}, **measured) | changes


def test_a_row_survives_a_round_trip():
    row = make_row(errors={"y": {"max": 1e-3, "rms": 1e-4}})
    assert schema.decode(schema.encode(row)) == row


def test_infinite_errors_are_written_as_words():
    row = make_row(errors={"y": {"max": float("inf"), "rms": float("nan")}})
    assert schema.decode(schema.encode(row))["errors"]["y"] == {"max": "inf", "rms": "nan"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"kind": "guess"}, "'kind' is 'guess'"),
        ({"provider": None}, "'provider' is null"),
        ({"provider": 3}, "'provider' is int"),
        ({"synthetic": 1}, "'synthetic' is int"),
        ({"distance": True}, "'distance' is bool"),
        ({"timing": {"p50_us": 1.0}}, "'timing' has no 'p20_us'"),
        ({"timing": None}, "has a timing"),
        ({"status": "wrong", "timing": None}, "reason is empty"),
        ({"status": "failed", "reason": "so"}, "there is a timing"),
        ({"label": None}, "carries a label"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_what_is_no_row_is_named(changes, message):
    with pytest.raises(schema.RowError, match=message):
        schema.check(make_row() | changes)


def with_member(name, value, **changes):
    """A row with one member of an object replaced: "timing.p50_us"."""
    row = make_row(errors={"y": {"max": 1e-3, "rms": 1e-4}}, floor=FLOOR, distance=2.0, bytes={"saved": 5}) | changes
    field, _, member = name.partition(".")
    return row | {field: {**(row[field] or {}), member: value}}


FLOOR = {"us_per_step": 1.0, "exchange_us": 0.5, "tensor_us": 0.5, "memory_us": 0.1, "roofs": "assumed"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timing.p50_us", value) for value in ("fast", 0, -1.0, float("nan"), float("inf"), None, True)),
        pytest.param("timing.p50_us", 10**400, id="more than a float holds"),
        *(("timing.ci_low_us", value) for value in (0, [])),
        ("timing.confidence", 95), ("timing.samples", 1.5), ("timing.clock", None),
        ("case.dtype", "float8"), ("case.dtype", ["float32"]), ("case.hidden_size", "64"), ("case.hidden_size", 0),
        ("case.batch", True), ("case.length", -1), ("case.scale", float("nan")), ("case.bidirectional", 1),
        ("case.mode", "backward"), ("case.form", "cell"), ("case.name", None),
        ("device.name", None), ("device.type", "tpu"), ("device.threads", "many"),
        ("versions.torch", None), ("source.commit", 5), ("source.dirty", "yes"), ("source.digest", None),
        ("errors.y", 0.1), ("errors.y", {"max": 1.0}), ("errors.y", {"max": -1.0, "rms": 0.0}),
        ("errors.y", {"max": "large", "rms": 0.0}),
        ("bytes.saved", -1), ("bytes.saved", "1 MiB"), ("floor.us_per_step", 0), ("floor.exchange_us", None),
        ("values.copy_bytes_per_s", 0), ("values.total_us", "long"), ("state.power_w", "[N/A]"), ("precision.cudnn_rnn", None),
    ],
)  # fmt: skip
def test_what_stands_in_the_objects_is_checked(name, value):
    schema.check(with_member("timing.p50_us", 10.0))
    with pytest.raises(schema.RowError, match="a cell is" if name == "case.form" else name.rpartition(".")[2]):
        schema.check(with_member(name, value))


@pytest.mark.parametrize(("field", "value"), [("distance", 0.0), ("distance", float("nan")), ("date", "yesterday")])
def test_figures_and_dates_are_checked(field, value):
    with pytest.raises(schema.RowError, match=field):
        schema.check(make_row() | {field: value})


def test_lines_that_no_parser_likes_lose_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    good = schema.encode(make_row())
    nan = good.replace('"p50_us":10.0', '"p50_us":NaN')
    half = good.replace('"run":"run"', '"run":"\\ud800"')
    deep = good.replace('"state":{}', '"state":' + '{"a":' * 400 + "1" + "}" * 400)
    bad = ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, nan, half, deep]
    assert good not in bad
    path.write_text("\n".join([good, *bad, good]) + "\n")
    found = store.read(path)
    assert len(found.rows) == 2 and len(found.problems) == len(bad)
    assert "a.jsonl:2: nested too deeply" in found.problems[0]


def test_a_missing_field_is_named():
    row = make_row()
    del row["date"]
    with pytest.raises(schema.RowError, match="'date' is missing"):
        schema.check(row)


def test_every_field_is_documented():
    page = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    for name in schema.FIELDS:
        assert f"`{name}`" in page, name
    for name in schema.FIELDS["timing"].required_keys:
        assert f"`{name}`" in page, name


def test_good_rows_around_damage_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    for us in (1.0, 2.0):
        store.append(path, make_row(us=us))
    good = path.read_bytes()
    first, second = good.splitlines(keepends=True)
    path.write_bytes(first + b'{"foreign": true}\n' + b"\xff\xfe\n" + b"\n" + second + first[:100])
    found = store.read(path)
    assert [row["timing"]["p50_us"] for row in found.rows] == [1.0, 2.0]
    assert [p.split(": ")[0].rpartition(":")[2] for p in found.problems] == ["2", "3", "6"]
    assert "cut off" in found.problems[-1] and "schema is None" in found.problems[0]
    # what a crash cut off does not spoil the next row
    store.append(path, make_row(us=3.0))
    assert len(store.read(path).rows) == 3


def test_a_file_without_rows_is_an_error(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("dear diary\n")
    with pytest.raises(store.StoreError, match="holds no benchmark rows.*notes.jsonl:1"):
        store.read(path)
    with pytest.raises(store.StoreError, match="no such file"):
        store.read_all([tmp_path / "absent"])
    assert store.read(tmp_path / "absent.jsonl").rows == []
    with pytest.raises(store.StoreError, match="a folder|Is a directory|directory"):
        store.read(tmp_path)


def _append_forty(path, name):
    for k in range(40):
        store.append(path, make_row() | {"run": f"{name}{k}"})


def test_two_processes_append_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_append_forty, args=(path, name)) for name in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    found = store.read(path)
    assert not found.problems
    assert sorted(row["run"] for row in found.rows) == sorted(f"{name}{k}" for name in "ab" for k in range(40))


def test_two_runs_do_not_share_a_folder(tmp_path):
    with store.one_run_at_a_time(tmp_path):
        with pytest.raises(store.StoreError, match="another benchmark run"), store.one_run_at_a_time(tmp_path):
            pass
    with store.one_run_at_a_time(tmp_path):
        pass


def test_a_row_says_what_ran():
    row = make_row(provider=CUDNN)
    assert row["label"].startswith(schema.CPU_LABEL)
    assert set(row["precision"]) == {"cudnn_rnn", "cuda_matmul", "lstm_triton"}
    assert row["versions"]["torch"] == torch.__version__ and len(row["source"]["digest"]) == 12
    assert row["date"].endswith("+00:00")
