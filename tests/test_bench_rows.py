"""Rows: the schema, files that were damaged, appends at the same time. And rows for the other tests of the benchmark."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from lstm_triton import timing
from lstm_triton.bench import rows
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.device import RowMaker
from lstm_triton.bench.providers import CUDNN, OURS
from lstm_triton.tolerance import Errors

ROOT = Path(__file__).resolve().parent.parent
maker = RowMaker(torch.device("cpu"), "a test", "run", synthetic=True)


def make_row(
    case=None, provider=OURS, us=10.0, suite="hidden-sizes", kind="timing", status="ok", execution="eager", **changes
):
    """A synthetic row: a timing of `us` microseconds a call."""
    case = case or Case("H64", 64, 8, 16, dtype="float32", precision="ieee")
    measured = {}
    if kind in ("timing", "anchor", "overhead") and status == "ok":
        samples = timing.Samples(1, [us * (1 + 0.001 * k) for k in range(-5, 6)], [us] * 11)
        measured["timing"] = rows.Timing.of(samples, case.length, "a clock")
    reason = None if status == "ok" else "a reason"
    row = maker.make(Task(suite, case, kind), provider, execution, status, reason, state={}, **measured)
    return dataclasses.replace(row, **changes)


def as_json(**options):
    """A good row as json reads it, with a member of every kind."""
    given = {"errors": {"y": Errors(4, 1e-3, 1e-4)}, "floor": FLOOR, "distance": 2.0, "bytes": {"saved": 5}}
    return json.loads(make_row(**(given | options)).encode())


FLOOR = rows.Floor(1.0, 0.5, 0.5, 0.1, "assumed")


def read(value):
    return rows.decode(json.dumps(value).encode())


def test_a_row_survives_a_round_trip():
    row = make_row(errors={"y": Errors(4, 1e-3, 1e-4)}, floor=FLOOR, distance=2.0, values={"a_us": 1.0})
    assert rows.decode(row.encode().encode()) == row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "'schema' is 1"),
        ({"kind": "guess"}, "'kind' is 'guess'"),
        ({"provider": None}, "'provider' is None"),
        ({"provider": 3}, "'provider' is 3"),
        ({"synthetic": 1}, "'synthetic' is 1"),
        ({"distance": True}, "'distance' is True"),
        ({"timing": {"p50_us": 1.0}}, "row.timing.*'p20_us'"),
        ({"timing": None}, "has a timing"),
        ({"status": "wrong", "timing": None}, "reason is empty"),
        ({"status": "failed", "reason": "so"}, "there is a timing"),
        ({"label": None}, "carries a label"),
        ({"extra": 1}, "unexpected.*'extra'"),
    ],
)
def test_what_is_no_row_is_named(changes, message):
    read(as_json())
    with pytest.raises(ValueError, match=message):
        read(as_json() | changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timing.p50_us", value) for value in ("fast", 0, -1.0, float("nan"), float("inf"), None, True)),
        pytest.param("timing.p50_us", 10**400, id="more than a float holds"),
        *(("timing.ci_low_us", value) for value in (0, [])),
        ("timing.confidence", 95),
        ("timing.samples", 1.5),
        ("timing.clock", None),
        ("case.dtype", "float8"),
        ("case.dtype", ["float32"]),
        ("case.hidden_size", "64"),
        ("case.hidden_size", 0),
        ("case.batch", True),
        ("case.length", -1),
        ("case.scale", float("nan")),
        ("case.bidirectional", 1),
        ("case.mode", "backward"),
        ("case.form", "cell"),
        ("case.name", None),
        ("device.name", None),
        ("device.type", "tpu"),
        ("device.threads", "many"),
        ("versions.torch", None),
        ("source.commit", 5),
        ("source.dirty", "yes"),
        ("source.digest", None),
        ("errors.y", 0.1),
        ("errors.y", {"largest": 1.0}),
        ("errors.y", {"n": 1, "largest": -1.0, "rms": 0.0}),
        ("errors.y", {"n": 1, "largest": "large", "rms": 0.0}),
        ("bytes.saved", -1),
        ("bytes.saved", "1 MiB"),
        ("floor.us_per_step", 0),
        ("floor.exchange_us", None),
        ("values.copy_bytes_per_s", 0),
        ("values.total_us", "long"),
        ("precision.cudnn_rnn", None),
    ],
)
def test_what_stands_in_the_objects_is_checked(name, value):
    field, _, member = name.partition(".")
    row = as_json(values={"total_us": 1.0})
    with pytest.raises(
        ValueError, match="a cell is" if name == "case.form" else rf"{member}|row\.{field}|a rate or a floor is 0"
    ):
        read(row | {field: {**row[field], member: value}})


@pytest.mark.parametrize(("field", "value"), [("distance", -1.0), ("distance", float("nan")), ("date", "yesterday")])
def test_figures_and_dates_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field}|isoformat"):
        read(as_json() | {field: value})


def test_lines_that_no_parser_likes_lose_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    good = make_row().encode()
    nan = good.replace('"p50_us":10.0', '"p50_us":NaN')
    half = good.replace('"run":"run"', '"run":"\\ud800"')
    deep = good.replace('"state":{}', '"state":' + '{"a":' * 400 + "1" + "}" * 400)
    bad = ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, nan, half, deep]
    assert good not in bad
    path.write_text("\n".join([good, *bad, good]) + "\n")
    found, problems = rows.read_all([path])
    assert len(found) == 2 and len(problems) == len(bad)
    assert "a.jsonl:2: nested too deeply" in problems[0]


def test_a_missing_field_is_named():
    row = as_json()
    del row["date"]
    with pytest.raises(ValueError, match="missing.*'date'"):
        read(row)


def test_every_field_is_documented():
    page = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    for field in (*dataclasses.fields(rows.Row), *dataclasses.fields(rows.Timing)):
        assert f"`{field.name}`" in page, field.name


def test_good_rows_around_damage_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    for us in (1.0, 2.0):
        rows.append(path, make_row(us=us))
    good = path.read_bytes()
    first, second = good.splitlines(keepends=True)
    path.write_bytes(first + b'{"foreign": true}\n' + b"\xff\xfe\n" + b"\n" + second + first[:100])
    found, problems = rows.read_all([path])
    assert [row.timing.p50_us for row in found] == [1.0, 2.0]
    assert [p.split(": ")[0].rpartition(":")[2] for p in problems] == ["2", "3", "6"]
    assert "cut off" in problems[-1] and "'foreign'" in problems[0]
    # what a crash cut off does not spoil the next row
    rows.append(path, make_row(us=3.0))
    assert len(rows.read_all([path])[0]) == 3


def test_a_file_without_rows_is_an_error(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("dear diary\n")
    with pytest.raises(rows.StoreError, match="holds no benchmark rows.*notes.jsonl:1"):
        rows.read_all([path])
    with pytest.raises(rows.StoreError, match="no such file"):
        rows.read_all([tmp_path / "absent"])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(rows.StoreError, match="directory"):
        rows.read_all([tmp_path])


def _append_forty(path, name):
    for k in range(40):
        rows.append(path, make_row(run=f"{name}{k}"))


def test_two_processes_append_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_append_forty, args=(path, name)) for name in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    found, problems = rows.read_all([path])
    assert not problems
    assert sorted(row.run for row in found) == sorted(f"{name}{k}" for name in "ab" for k in range(40))


def test_two_runs_do_not_share_a_folder(tmp_path):
    with rows.one_run_at_a_time(tmp_path):
        with pytest.raises(rows.StoreError, match="another benchmark run"), rows.one_run_at_a_time(tmp_path):
            pass
    with rows.one_run_at_a_time(tmp_path):
        pass


def test_a_row_says_what_ran():
    row = make_row(provider=CUDNN)
    assert row.label.startswith(rows.CPU_LABEL)
    assert row.versions.torch == torch.__version__ and len(row.source.digest) == 12
    assert row.date.endswith("+00:00")
