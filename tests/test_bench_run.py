"""Runs from the command line on the CPU, at sizes that only test the harness: everything but the speed of GPUs."""

import dataclasses
import functools
import io
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from support.benches import ROOT, TINY, Forked, Here, measure, options, rows_of, small

from lstm_triton import cli as package_cli
from lstm_triton import process
from lstm_triton.bench import __main__ as cli
from lstm_triton.bench import device, progress, providers, rows, run, suites
from lstm_triton.bench import measure as measuring
from lstm_triton.bench.cases import Case, Task
from lstm_triton.bench.providers import CUDNN, OURS


def test_every_suite_from_end_to_end(tmp_path, capsys):
    chosen = [
        name for name in suites.SUITES if name not in ("cell", "cold-start", "real")
    ]  # which compile, or are many
    arguments = [*TINY, "--output", str(tmp_path), *(a for name in chosen for a in ("--suite", name))]
    assert package_cli.main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{rows.CPU_LABEL}.") and "rows appended" in out
    found = rows_of(tmp_path)
    assert {row.suite for row in found} == {*chosen, "anchor"}
    assert all(row.label.startswith(rows.CPU_LABEL) for row in found)
    assert not [row.reason for row in found if row.status in ("wrong", "failed")]
    for row in found:
        if row.kind == "timing" and row.status == "ok":
            assert row.timing.p20_us <= row.timing.p50_us <= row.timing.p80_us
            assert row.errors and row.floor.us_per_step > 0 and row.l2 is None
    assert str(tmp_path) not in found[0].command
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert rows.CPU_LABEL in report

    # the same command again: nothing is left to do
    assert package_cli.main(["bench", *arguments, "--no-report"]) == 0
    assert "0 tasks measured" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == len(found)


def test_real_workloads_and_cells_run(tmp_path):
    chosen = [
        t for t in suites.tasks(["real", "cell"], "tiny", "cpu") if t.case.hidden_size <= 32 and t.case.mode == "train"
    ]
    assert {t.suite for t in chosen} == {"real", "cell"}
    measure(tmp_path, chosen)
    found = rows_of(tmp_path)
    assert any("made smaller" in row.label for row in found)
    assert not [row.reason for row in found if row.status in ("wrong", "failed")]


def test_a_run_continues_where_it_stopped(tmp_path):
    first = measure(tmp_path, small(4))
    assert (first.measured, first.before, first.appended) == (1, 0, 2)
    second = measure(tmp_path, small(4, 5))
    assert (second.measured, second.before) == (1, 1)
    third = measure(tmp_path, small(4, 5), provider=(OURS, CUDNN, "torch.nn.LSTMCell"))
    assert third.measured == 2 and third.appended == 2, "only what is new of a task"
    assert measure(tmp_path, small(4), again=True).measured == 1
    maker = Here(options(tmp_path), "run").maker
    assert len(run.done_before(rows_of(tmp_path), maker, False)) == 6
    maker.source = dataclasses.replace(maker.source, digest="0" * 12)
    assert not run.done_before(rows_of(tmp_path), maker, False), "rows of other code do not count"


def test_rows_under_other_settings_are_no_rows_of_this_run(tmp_path):
    before = torch.get_num_threads()
    try:
        assert measure(tmp_path, small(4)).measured == 1
        assert measure(tmp_path, small(4), threads=2).measured == 1, "another number of threads"
        assert measure(tmp_path, small(4), threads=2).before == 1
    finally:
        torch.set_num_threads(before)
    assert {row.device.threads for row in rows_of(tmp_path)} == {1, 2}

    warm = [dataclasses.replace(row, l2="warm") for row in rows_of(tmp_path)]
    maker = Here(options(tmp_path), "run").maker
    maker.l2 = "warm"
    assert run.done_before(warm, maker, False)
    maker.l2 = "flushed"
    assert not run.done_before(warm, maker, False), "another state of the cache"


def test_the_state_of_the_cache_is_in_rows_of_failures_too():
    maker = device.RowMaker(torch.device("cpu"), "a test", "run", "flushed")
    task = small(4)[0]
    assert maker.make(task, OURS, "eager", "skipped", "a reason").l2 == "flushed"
    memory = dataclasses.replace(task, kind="memory")
    assert maker.make(memory, OURS, "eager", "skipped", "a reason").l2 is None


HOST = Task("overhead", Case("host", 16, 1, 1, form="cell", dtype="float32"), "overhead")
CELL, LAYER = "torch.nn.LSTMCell", "lstm_triton reference"


def test_an_interrupted_task_of_first_calls_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_new_process", lambda *arguments: {"first_call_s": 1.0})
    task = dataclasses.replace(HOST, suite="cold-start", kind="cold-start")

    def measured(**changes):
        before = len(rows_of(tmp_path)) if tmp_path.exists() and any(tmp_path.iterdir()) else 0
        measure(tmp_path, [task], provider=None, **changes)
        return [row.provider for row in rows_of(tmp_path)[before:]]

    class Interrupted(Here):
        def ask(self, *arguments):
            yield next(super().ask(*arguments))
            raise TimeoutError

    measure(tmp_path, [task], Interrupted, provider=None)
    assert [row.provider for row in rows_of(tmp_path)] == [OURS]
    assert measured() == [CELL]
    assert measured() == []
    measure(tmp_path, [task], provider=(LAYER, CELL))
    assert [row.provider for row in rows_of(tmp_path)] == [OURS, CELL, LAYER], "--provider counts here too"


def test_roofs_and_anchors_know_no_choice_of_providers():
    assert providers.names_of(run.anchor("cuda"), "cuda", (OURS,)) == [CUDNN]
    roof = Task("roofs", Case("roofs", 1, 1, 1), "roof")
    assert providers.names_of(roof, "cuda", (OURS,)) == ["copies", "matrix products", "exchange"]
    assert providers.names_of(roof, "cpu", None) == ["copies", "matrix products"]
    assert providers.names_of(HOST, "cuda", None) == ["lstm_triton triton", CELL]
    assert providers.names_of(HOST, "cpu", None) == [OURS, CELL]


class Steady(Here):
    """Every task takes 0.3 s, and does not look at the deadline."""

    begun = []

    def ask(self, *arguments):
        self.begun.append(time.monotonic())
        time.sleep(0.3)
        return iter(())


def test_a_task_that_does_not_fit_into_the_budget_is_not_begun(tmp_path):
    Steady.begun.clear()
    outcome = measure(tmp_path, small(*range(4, 40)), Steady, budget=1.0)
    assert outcome.measured == len(Steady.begun) >= 2 and outcome.left == 36 - outcome.measured
    assert Steady.begun[-1] - Steady.begun[0] < 1.0 - 0.29


def test_how_long_a_task_will_take_is_judged_by_those_before(tmp_path):
    given = run.Runner(options(tmp_path, seconds=0.5), None)
    assert given.predict("cell", 4) == 2.0, "before the first, the time of sampling"
    given._took |= {"": [0.5, 4.0], "cell": [4.0]}
    assert given.predict("cell", 4) == 16.0 and given.predict("real", 1) == 4.0
    given._took["real"] = [9.0] + [1.0] * 6 + [3.0] * 2
    assert given.predict("real", 2) == 6.0, "the last eight"


def test_a_budget_counts_from_the_start_of_the_process(monkeypatch, tmp_path):
    assert 0 < process.age_s() < float("inf")
    seen = []

    def runner(options, progress):
        seen.append(options.budget)
        return types.SimpleNamespace(run=len, describe=str, appended=0, before=0)

    monkeypatch.setattr(run, "Runner", runner)
    for age in (0.0, 10.0, 1000.0):
        monkeypatch.setattr(process, "age_s", lambda age=age: age)
        assert cli.main([*TINY, "--suite", "memory", "--budget", "40s", "--output", str(tmp_path)]) == 0
    fresh, slow_start, long_running = seen
    assert 30 < fresh < 38.1 and fresh - slow_start == pytest.approx(10, abs=1)
    assert long_running == pytest.approx(fresh, abs=1), "that process was not started for this run"


def test_the_budget_is_kept(tmp_path):
    outcome = measure(tmp_path, small(*range(4, 400)), budget=1.0)
    assert outcome.left > 0 and outcome.measured + outcome.left == 396
    assert "the same command continues" in outcome.describe()
    before = len(rows_of(tmp_path))
    measure(tmp_path, small(*range(4, 400)), budget=0.5)
    assert len(rows_of(tmp_path)) > before, "it goes on"


def _fault(problem, what):
    if what == "crash":
        os._exit(9)
    if what == "hang":
        time.sleep(600)
    model = providers.torchs_lstm(problem)
    right, calls = model.run, []

    def run(*arguments):
        calls.append(1)
        return os._exit(9) if len(calls) > 1 else right(*arguments)

    model.run = run
    return model


def test_a_provider_that_crashes_or_hangs_gets_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    names = ("crash", "hang", CUDNN, "crash while timed")
    for name in set(names) - {CUDNN}:
        monkeypatch.setitem(providers.PROVIDERS, name, functools.partial(_fault, what=name))
    outcome = measure(tmp_path, small(4), Forked, provider=names, timeout=2.0)
    found = {row.provider: row for row in rows_of(tmp_path)}
    assert set(found) == set(names) and outcome.appended == len(names)
    assert found["crash"].status == "failed" and "exit code 9" in found["crash"].reason
    assert found["hang"].status == "failed" and "no sign of life for 2 s" in found["hang"].reason
    assert found["crash while timed"].status == "failed" and "exit code 9" in found["crash while timed"].reason
    assert found[CUDNN].status == "ok"


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="does not start"):
        measure(tmp_path / "rows", small(4), run.Worker)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--suite", "nonsense"], 2, "invalid choice"),
        (["--budget", "soon"], 2, "not a time such as"),
        (["--hidden", "a..b"], 2, "neither numbers nor a range"),
        (["--device", "cuda:99"], 2, "no such NVIDIA GPU"),
        (["--device", "mps"], 2, "only NVIDIA GPUs and the CPU"),
        (["--device", "cpu", "--provider", "nobody"], 2, "known are"),
        (["--device", "cpu", "--hidden", "77777"], 2, "no case passes"),
        (["--compare", "absent.jsonl", "absent.jsonl"], 2, "no such file"),
        (["--report", "--rows", "absent"], 2, "no such file"),
        (["--validate", "absent"], 2, "no such file"),
    ],
)
def test_unusable_arguments(arguments, code, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        assert cli.main(arguments) == code
    except SystemExit as stopped:
        assert stopped.code == code
    assert message in capsys.readouterr().err


def test_lists_and_filters(capsys):
    assert (
        cli.main(["--device", "cpu", "--list", "--suite", "hidden-sizes", "--hidden", "32..64", "--mode", "train"]) == 0
    )
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 and all("train" in line for line in listed)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    told = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert {"lstm_triton auto", "torch.nn.LSTM", "torchrl", "haste", "flashrnn", "fastlstm"} <= told


def test_times_as_people_write_them():
    assert [cli.seconds_of(t) for t in ("45s", "8m", "1h", "2.5")] == [45, 480, 3600, 2.5]


def test_one_line_where_someone_watches(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.Progress(10)
    bar.done += 5
    bar.show("something")
    bar.say("a result")
    bar.close()
    assert "something" in terminal.getvalue() and "left" in terminal.getvalue()
    assert capsys.readouterr().out == "a result\n"


def test_default_folders(monkeypatch, tmp_path):
    assert device.results_folder() == ROOT / "bench" / "results"
    monkeypatch.setattr(device, "checkout", lambda: None)
    assert device.results_folder() == Path("lstm-triton-bench")


def test_a_worker_tells_what_it_does(tmp_path):
    given = Forked(options(tmp_path), "run")
    try:
        told = list(given.ask((small(4)[0], [(OURS, "eager")], {}), 60.0))
    finally:
        given.end()
    assert [row.provider for row in told if isinstance(row, rows.Row)] == [OURS] and given.maker.device.type == "cpu"
    stages = [event[::2] for event in told if not isinstance(event, rows.Row)]
    said = [("float64", "truth"), (CUDNN, "check"), (OURS, "build"), (OURS, "check"), (OURS, "build"), (OURS, "timing")]
    assert list(dict.fromkeys(stages)) == list(dict.fromkeys(said))


WITHOUT = """
import sys
for name in ("pandas", "matplotlib", "jinja2", "markupsafe", "rich", "pynvml"):
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if sys.modules.get(name, name) is None else found(name, *a)
"""


def test_rows_need_no_library_that_serves_output(tmp_path):
    """A suite is measured, checked and written in processes where those libraries cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    folder = str(tmp_path / "rows")
    measured = [*TINY, "--suite", "memory", "--suite", "length", "--mode", "train", "--output", folder]
    shown = ["--validate", folder], ["--report", "--rows", folder], ["--compare", folder, folder]
    code = f"from lstm_triton.bench.__main__ import main\nprint('codes', *map(main, {[measured, *shown]}))"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"codes 0 0 {cli.NO_LIBRARY} {cli.NO_LIBRARY}", done.stderr
    assert "no tables without pandas" in done.stdout and done.stderr.count("pip install 'lstm-triton[bench]'") == 2
    found = rows_of(Path(folder))
    assert {row.suite for row in found} == {"memory", "length", "anchor"} and not Path(folder, "report.html").exists()
    assert not [row.reason for row in found if row.status in ("wrong", "failed")]


def test_the_package_imports_no_library_of_its_extras():
    code = "import sys, torch; torchs = set(sys.modules); import lstm_triton.cli; print(*set(sys.modules) - torchs)"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "lstm_triton" in loaded
    assert not loaded & {"pandas", "matplotlib", "jinja2", "rich", "pynvml", "lstm_triton.bench"}
