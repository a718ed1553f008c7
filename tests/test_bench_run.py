"""Runs from the command line on the CPU, at sizes that only test the harness: everything but the speed of GPUs."""

import contextlib
import functools
import io
import os
import re
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.benches import CPU, ROOT, TINY, Forked, Here, faulty, make_row, measure, options, rows_of, small

from lstm_triton import cli as package_cli
from lstm_triton import process, timing
from lstm_triton.bench import __main__ as cli
from lstm_triton.bench import cases, device, providers, rows, run
from lstm_triton.bench.providers import CUDNN, OURS, TORCH_CELL

CHEAP = Here if torch.cuda.is_available() else Forked  # which the threads of autograd do not survive
SUITES = [name for name in cases.SUITES if name not in ("cell", "cold-start", "real")]  # which compile, or are many


def test_every_suite_from_end_to_end_and_not_again(tmp_path, monkeypatch, capsys):
    """By a command whose samples are one call. How torch.compile generates code is torch's: it captures, and generates none."""
    command = ["bench", *TINY, "--output", str(tmp_path), *(a for name in SUITES for a in ("--suite", name))]
    monkeypatch.setattr(run, "Worker", CHEAP)
    monkeypatch.setattr(timing, "MOST_CALLS", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert package_cli.main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{rows.CPU_LABEL}.") and "rows appended" in out
    assert rows.CPU_LABEL in (tmp_path / "report.html").read_text(encoding="utf-8")
    others = cases.tasks(["real", "cell"], "tiny", "cpu")
    measure(tmp_path, [t for t in others if t.case.hidden_size <= 32 and t.case.mode == "train"])
    found = rows_of(tmp_path)
    assert {row.suite for row in found} == {*SUITES, "real", "cell", "anchor"}
    assert all(row.label.startswith(rows.CPU_LABEL) for row in found)
    assert any("made smaller" in row.label for row in found)
    assert not [row.reason for row in found if row.status in ("wrong", "failed")]
    timed = [row for row in found if row.kind == "timing" and row.status == "ok"]
    assert all(row.timing.p20_us <= row.timing.p50_us <= row.timing.p80_us for row in timed)
    assert all(row.errors and row.l2 is None for row in timed)
    assert all(row.floor.us_per_step > 0 for row in timed if row.suite not in ("real", "cell"))
    assert str(tmp_path) not in found[0].command
    assert package_cli.main([*command, "--no-report"]) == 0
    assert "0 tasks measured" in capsys.readouterr().out and len(rows_of(tmp_path)) == len(found)


def test_a_run_continues_where_it_stopped(tmp_path):
    def outcome(*sizes, **changes):
        done = measure(tmp_path, small(*sizes), **changes)
        return done.measured, done.before, done.appended

    class Interrupted(Here):
        """The budget ends after the first row."""

        def ask(self, *request):
            yield next(super().ask(*request))
            raise TimeoutError

    threads = torch.get_num_threads()
    try:
        assert outcome(4) == (1, 0, 2)
        assert outcome(5, new_worker=Interrupted) == (0, 0, 1)
        assert outcome(4, 5) == (1, 1, 1)
        assert outcome(4, 5, provider=(OURS, CUDNN, TORCH_CELL)) == (2, 0, 2), "only what is new of a task"
        assert outcome(4, again=True) == (1, 0, 2)
        maker = Here(options(tmp_path), "run").maker
        assert outcome(4, threads=2) == (1, 0, 2), "another number of threads"
        assert outcome(4, threads=2) == (0, 1, 0)
    finally:
        torch.set_num_threads(threads)
    found = rows_of(tmp_path)
    assert {row.device.threads for row in found} == {1, 2}
    assert len(run.done_before(found, maker, False)) == 6
    warm = [replace(row, l2="warm") for row in found]
    for maker.l2 in ("warm", "flushed"):
        assert bool(run.done_before(warm, maker, False)) == (maker.l2 == "warm"), "another state of the cache"
    failed = maker.make(small(4)[0], OURS, "eager", "skipped", "a reason")
    assert failed.l2 == "flushed", "which rows of failures have too"
    assert run.done_before([failed], maker, False) and not run.done_before([failed], maker, True), "--retry"
    assert maker.make(replace(small(4)[0], kind="memory"), OURS, "eager", "skipped", "a reason").l2 is None
    maker.source = replace(maker.source, digest="0" * 12)
    assert not run.done_before(found, maker, False), "rows of other code do not count"


def test_a_task_that_does_not_fit_into_the_budget_is_not_begun(tmp_path):
    begun = []

    class Steady(Here):
        """Every task takes 0.1 s, and does not look at the deadline."""

        def ask(self, *arguments):
            begun.append(time.monotonic())
            time.sleep(0.1)
            return iter(())

    outcome = measure(tmp_path, small(*range(4, 40)), Steady, budget=0.35)
    assert outcome.measured == len(begun) >= 2 and outcome.left == 36 - outcome.measured
    assert begun[-1] - begun[0] < 0.35 - 0.09 and "the same command continues" in outcome.describe()
    given = run.Runner(options(tmp_path, seconds=0.5), None, None)
    assert given.predict("cell", 4) == 2.0, "before the first, the time of sampling"
    given._took |= {"": [0.5, 4.0], "cell": [4.0], "real": [9.0] + [1.0] * 6 + [3.0] * 2}
    assert given.predict("cell", 4) == 16.0 and given.predict("batch", 1) == 4.0
    assert given.predict("real", 2) == 6.0, "the last eight"


def test_a_budget_counts_from_the_start_of_the_process(monkeypatch, tmp_path):
    assert 0 < process.age_s() < float("inf")
    budgets = []
    runner = types.SimpleNamespace(run=len, describe=str, appended=0, before=0)
    monkeypatch.setattr(run, "Runner", lambda options, *_: budgets.append(options.budget) or runner)
    for age in (0.0, 10.0, 1000.0):
        monkeypatch.setattr(process, "age_s", lambda age=age: age)
        assert cli.main([*TINY, "--suite", "memory", "--budget", "40s", "--output", str(tmp_path)]) == 0
    fresh, slow_start, long_running = budgets
    assert 30 < fresh < 38.1 and fresh - slow_start == pytest.approx(10, abs=1)
    assert long_running == pytest.approx(fresh, abs=1), "that process was not started for this run"


ACCIDENTS = {  # the provider, and what its row says
    "crash": (lambda problem: os._exit(9), r"exit code 9 \(while: build of"),
    "crash while timed": (
        functools.partial(faulty, fault=lambda y: os._exit(9), at=range(2, 9)),
        r"exit code 9 \(while: timing of",
    ),
    "hang": (
        functools.partial(faulty, fault=lambda y: time.sleep(600)),
        r"no sign of life for 1 s.* \(while: check of",
    ),
}


def test_a_provider_that_crashes_or_hangs_gets_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    for name, (provider, _) in ACCIDENTS.items():
        monkeypatch.setitem(providers.PROVIDERS, name, provider)
    outcome = measure(tmp_path, small(4), Forked, provider=(*ACCIDENTS, CUDNN), timeout=1.0)
    found = {row.provider: row for row in rows_of(tmp_path)}
    assert set(found) == {*ACCIDENTS, CUDNN} and outcome.appended == 4 and found[CUDNN].status == "ok"
    for name, (_, said) in ACCIDENTS.items():
        assert found[name].status == "failed" and re.search(f"{said} {name}", found[name].reason)


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="does not start"):
        measure(tmp_path / "rows", small(4), run.Worker)


UNUSABLE = {
    "--suite nonsense": "invalid choice",
    "--budget soon": "not a time such as",
    "--hidden a..b": "neither numbers nor a range",
    "--device cuda:99": "no such NVIDIA GPU",
    "--device mps": "only NVIDIA GPUs and the CPU",
    "--device cpu --provider nobody": "known are",
    "--device cpu --hidden 77777": "no case passes",
    "--compare absent.jsonl absent.jsonl": "no such file",
    "--report --rows absent": "no such file",
    "--validate absent": "no such file",
}


def test_unusable_arguments_lists_filters_and_times(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, message in UNUSABLE.items():
        try:
            code = cli.main(arguments.split())
        except SystemExit as stopped:
            code = stopped.code
        assert code == 2 and message in capsys.readouterr().err, arguments
    assert cli.main("--device cpu --list --suite hidden-sizes --hidden 32..64 --mode train".split()) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 and all("train" in line for line in listed)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert set(providers.PROVIDERS) <= {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert [cli.seconds_of(t) for t in ("45s", "8m", "1h", "2.5")] == [45, 480, 3600, 2.5]


def test_one_line_where_someone_watches(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with contextlib.closing(run.Progress(10)) as bar:
        bar.done += 5
        bar.show("something")
        bar.say("a result")
    assert "something" in terminal.getvalue() and "left" in terminal.getvalue()
    assert capsys.readouterr().out == "a result\n"


def test_default_folders_and_what_a_row_says_of_the_code(monkeypatch):
    assert device.results_folder("NVIDIA H200") == ROOT / "bench" / "results" / "nvidia-h200"
    row = make_row()
    assert row.versions.torch == torch.__version__ and len(row.source.digest) == 12 and row.date.endswith("+00:00")
    monkeypatch.setattr(device, "checkout", lambda: None)
    assert device.results_folder() == Path("lstm-triton-bench")
    assert device.RowMaker(CPU, "a test", "run").source == row.source, "asked once"
