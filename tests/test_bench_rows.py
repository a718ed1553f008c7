"""Rows: the schema, files that were damaged, appends at the same time."""

import dataclasses
import json
import math
import multiprocessing

import pytest
from support.benches import FLOOR, ROOT, make_row

from lstm_triton.bench import rows
from lstm_triton.bench.cases import UsageError
from lstm_triton.tolerance import Errors

# A good row with a member of every kind.
ROW = make_row(errors={"y": Errors(4, 1e-3, 1e-4)}, floor=FLOOR, distance=2.0, values={"total_us": 1.0})


def read(value):
    return rows.decode(json.dumps(value).encode())


def test_a_row_survives_a_round_trip_and_every_field_is_documented():
    assert rows.decode(ROW.encode().encode()) == ROW
    page = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    fields = dataclasses.fields(rows.Row) + dataclasses.fields(rows.Timing) + dataclasses.fields(Errors)
    assert not [field.name for field in fields if f"`{field.name}`" not in page]


# A field, or a member of one, of every kind: values that it may not have, and where a rule says so, its words.
WRONG = {
    "schema": [1],  # one of a few
    "case.dtype": ["float8", ["float32"]],
    "provider": [None, 3],  # text
    "synthetic": [1],  # yes or no
    "case.hidden_size": ["64", True, 1.5],  # a count
    "timing.p50_us": ["fast", 0, -1.0, math.nan, math.inf, 10**400, None, True],  # a number
    "distance": [True, -1.0, math.nan],  # or none
    "source.commit": [5],
    "values.total_us": ["long", -1],  # by name
    "errors.y": [0.1, *({"n": 1, "rms": 0.0} | more for more in ({}, {"largest": -1.0}, {"largest": "large"}))],
    "date: isoformat": ["yesterday"],
    "extra: unexpected.*'extra'": [1],
    "label: carries a label": [None],
    "timing: has a timing": [None],
    "timing: row.timing.*'p20_us'": [{"p50_us": 1.0}],
    "timing.ci_low_us: another time is 0": [0],
    "timing.confidence": [95],
    "case.hidden_size: above 0": [0],
    "case.form: a cell is": ["cell"],
    "floor.us_per_step: a floor is 0": [0],
    "values.copy_bytes_per_s: a rate or a floor is 0": [0],
}


def test_what_is_no_row_is_named():
    row = json.loads(ROW.encode())
    assert read(row) == ROW
    for what, values in WRONG.items():
        name, _, said = what.partition(": ")
        field, _, member = name.partition(".")
        for value in values:
            with pytest.raises(ValueError, match=said or rf"{member or field}|row\.{field}"):
                read(row | {field: {**row[field], member: value} if member else value})
    for status, changes in (("reason is empty", {"timing": None}), ("there is a timing", {"reason": "so"})):
        with pytest.raises(ValueError, match=f"status is 'wrong' and {status}"):
            read(row | {"status": "wrong"} | changes)
    with pytest.raises(ValueError, match="missing.*'date'"):
        read({name: value for name, value in row.items() if name != "date"})


def test_good_rows_around_damage_are_kept(tmp_path):
    path = tmp_path / "a" / "rows.jsonl"
    for us in (1.0, 2.0):
        rows.append(path, make_row(us=us))
    first, second = path.read_text().splitlines()
    nan = first.replace('"p50_us":1.0', '"p50_us":NaN')
    half = first.replace('"run":"run"', '"run":"\\ud800"')  # of a surrogate pair
    deep = first.replace('"state":{}', '"state":' + '{"a":' * 400 + "1" + "}" * 400)
    bad = ['{"foreign": true}', "[" * 100_000, '{"a":' * 100_000, "9" * 10_000, nan, half, deep]
    assert first not in bad
    path.write_bytes("\n".join([first, *bad, "", second, ""]).encode() + b"\xff\xfe\n" + first[:100].encode())
    found, problems = rows.read_all([path])
    assert [row.timing.p50_us for row in found] == [1.0, 2.0]
    assert [int(p.split(": ")[0].rpartition(":")[2]) for p in problems] == [*range(2, 9), 11, 12]
    assert "'foreign'" in problems[0] and "nested too deeply" in problems[1] and "cut off" in problems[-1]
    # what a crash cut off does not spoil the next row
    rows.append(path, make_row(us=3.0))
    assert len(rows.read_all([path])[0]) == 3
    # a file without a good row is an error
    path.write_text("dear diary\n")
    (tmp_path / "b" / "folder.jsonl").mkdir(parents=True)
    said = {path: "no benchmark rows.*rows.jsonl:1", tmp_path / "absent": "no such file", tmp_path / "b": "directory"}
    for where, text in said.items():
        with pytest.raises(UsageError, match=text):
            rows.read_all([where])


def _append_forty(path, name):
    for k in range(40):
        rows.append(path, dataclasses.replace(ROW, run=f"{name}{k}"))


def test_two_processes_append_at_once_and_two_runs_do_not_share_a_folder(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(_append_forty, [(tmp_path / "a.jsonl", name) for name in "ab"], chunksize=1)
    found, problems = rows.read_all([tmp_path])
    assert not problems and sorted(row.run for row in found) == sorted(f"{name}{k}" for name in "ab" for k in range(40))
    with rows.one_run_at_a_time(tmp_path):
        with pytest.raises(UsageError, match="another benchmark run"), rows.one_run_at_a_time(tmp_path):
            pass
    with rows.one_run_at_a_time(tmp_path):
        pass
