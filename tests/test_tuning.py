"""`lstm-triton tune` without a GPU: kernels in the interpreter, a made-up clock; and what then takes its measurements."""

import json
import multiprocessing
import os
import time
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from support.process import ForkedProcess

from lstm_triton import LSTM, cli, convert, dispatch, explain, lstm, measurements, trial, tuning
from lstm_triton.cells import GRU, Cell, Recurrent, catalogue
from lstm_triton.kernels import interpreter, search
from lstm_triton.kernels.device import device_figures
from lstm_triton.measurements import Row
from lstm_triton.shapes import Shape
from lstm_triton.trial import Contender
from lstm_triton.tuning import tune

CPU = torch.device("cpu")
I, H, B, T = 3, 20, 2, 4
X = torch.zeros(T, B, I, dtype=torch.bfloat16)
SHAPE = Shape(I, H, 1, 1, 0, B, "", "bfloat16", train=True)
PROBLEM = measurements.problem_of(SHAPE, "forward")
BFLOAT16 = {"dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The user's file, which is not there yet; on this CPU the kernels are said to run."""
    path = tmp_path / "folder" / "measurements.json"
    monkeypatch.setenv("LSTM_TRITON_TUNED", str(path))
    monkeypatch.setattr(measurements, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(dispatch, "_why_no_kernels", lambda *arguments: None)
    measurements.refresh()
    dispatch._remembered.cache_clear()
    yield path
    measurements.refresh()
    dispatch._remembered.cache_clear()


def _row(shape=SHAPE, backend="triton", steps=T, **changes):
    return replace(Row(measurements.machine(CPU), shape, steps, backend, 10.0, 20.0), **changes)


def _write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    parts = [asdict(row) | dict(machine=row.machine._asdict(), shape=row.shape._asdict()) for row in rows]
    path.write_text(json.dumps(parts))
    measurements.refresh()


# ---- measuring, by a made-up clock and with made-up accidents --------------------------------------------------------

MADE_UP = {}  # by how the name of a contender begins: microseconds of a call, or "trap", "hang" or "wrong"


def _happens(name):
    return next((what for start, what in MADE_UP.items() if name.startswith(start)), 1000.0)


class Clock:
    sample_seconds = 0.01

    def __init__(self, device):
        pass

    def sample(self, call, n):
        what = _happens(call.__name__)
        if what == "trap":
            os.abort()
        if what == "hang":
            time.sleep(600)
        return (what if isinstance(what, (int, float)) else 1.0,) * 2


class Work(trial.Work):
    def of(self, contender):
        backend = "auto" if contender.backend == "cudnn" else contender.backend  # torch's own, on a CPU
        call, configurations = super().of(contender._replace(backend=backend))

        def changed():
            y, *others = call()
            return [y + 0.01 if _happens(contender.backend) == "wrong" else y, *others]

        return changed, configurations


def serve(connection, request):
    """What the measuring process runs."""
    interpreter.install()
    trial.Clock, trial.Work = Clock, Work
    trial.serve(connection, request)


@pytest.fixture
def made_up(monkeypatch):
    """made_up(cudnn=..., triton=...): what happens to contenders whose names begin so."""
    monkeypatch.setattr(tuning, "SERVE", f"{__name__}:serve")
    monkeypatch.setattr(tuning, "Process", ForkedProcess)

    def happening(candidates=0, **what):
        if "hang" in what.values():
            monkeypatch.setattr(tuning, "_SILENCE_S", 5.0)
        monkeypatch.setattr(tuning, "_CANDIDATES", candidates)
        MADE_UP.clear()
        MADE_UP.update({name.replace("_", "-"): value for name, value in what.items()})

    return happening


@pytest.mark.long
def test_the_fastest_is_kept_and_the_others_are_not_taken(made_up, file, capsys):
    made_up(cudnn=90.0, triton_stepwise=95.0, triton=60.0, candidates=1)
    (line,) = tune(LSTM(I, H, **BFLOAT16), X, budget_s=120.0)
    expected = "LSTM(3, 20) B = 2, bfloat16, training, T = 4: triton, 60.0 us, 1.50 times as fast as cuDNN"
    assert line == expected and str(file) in "".join(measurements.listing())
    (row,) = json.loads(file.read_text())
    for way in ("forward", "backward"):
        found = search.candidates(measurements.problem_of(SHAPE, way), device_figures(CPU))
        assert row[way] in [asdict(c) for c in found], way
    assert "tile" in capsys.readouterr().err
    assert ": triton: measured here" in explain(LSTM(I, H, **BFLOAT16), X)


LINES = {
    "cudnn": "cudnn, 90.0 us, 1.00 times as fast as cuDNN",
    "triton": "triton, 60.0 us, 1.50 times as fast as cuDNN",
    "triton alone": "triton, 60.0 us",
}


@pytest.mark.long
@pytest.mark.parametrize(
    "module, stepwise, triton, taken, says",
    [
        (LSTM(I, H, **BFLOAT16), 95.0, "trap", "cudnn", "crashed or hung"),
        (LSTM(I, H, **BFLOAT16), 95.0, "wrong", "cudnn", "wrong: "),
        (LSTM(I, H, **BFLOAT16), 95.0, 100.0, "cudnn", None),
        (LSTM(I, H, **BFLOAT16), "hang", 60.0, "triton", "crashed or hung"),  # costs its time and no more
        # cuDNN has a GRU, converted ones too, and no other cells.
        (GRU(I, H, **BFLOAT16), 95.0, 60.0, "triton", None),
        (convert(torch.nn.GRU(I, H, **BFLOAT16)), 95.0, 60.0, "triton", None),
        (Recurrent(catalogue.slstm, I, H, **BFLOAT16), 95.0, 60.0, "triton alone", None),
        (Recurrent(catalogue.zoneout(), I, H, **BFLOAT16), 95.0, 60.0, "triton alone", None),
    ],
    ids=str,
)
def test_what_is_taken(module, stepwise, triton, taken, says, made_up, capsys, count_launches):
    """What traps, hangs, is wrong or slower than cuDNN is not. What was measured holds for its cell alone."""
    made_up(cudnn=90.0, triton_stepwise=stepwise, triton=triton)
    with torch.no_grad():
        (line,) = tune(module, X, budget_s=120.0)
        assert line.partition(" B = 2, bfloat16, inference, T = 4: ")[2] == LINES[taken]
        text, other = explain(module, X), explain(Recurrent(catalogue.cifg, I, H, **BFLOAT16), X)
        count_launches()
        module(X)
    by_kernels = taken.startswith("triton")  # this CPU has no cuDNN
    assert (": triton: measured here" if by_kernels else ": torch: on a CPU") in text and "measured here" not in other
    assert bool(count_launches()) == by_kernels
    err = capsys.readouterr().err
    assert [text for text in ("crashed or hung", "wrong: ") if text in err] == ([says] if says else [])


def test_nothing_measured_is_an_error(made_up, monkeypatch, file):
    monkeypatch.setattr(tuning, "SERVE", "no_module:main")
    with pytest.raises(RuntimeError, match="did not start"):
        tune(LSTM(I, H, **BFLOAT16), X, quiet=True)
    with pytest.raises(RuntimeError, match="move the cell <lambda> to a module"):
        own = Cell(lambda z, s: (z.a.sigmoid(), {}), "a")
        own.__module__ = "__main__"  # which no other process can import
        tune(Recurrent(own, I, H, **BFLOAT16), X, quiet=True)
    assert not file.exists()


def test_an_interrupt_keeps_what_is_measured(made_up, monkeypatch, file):
    def ask(self, *arguments):
        yield dict(doing="cudnn")
        yield dict(times={"cudnn": 80.0, "triton": 50.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(ForkedProcess, "ask", ask)
    (line,) = tune(LSTM(I, H, **BFLOAT16), X, quiet=True)
    assert ": triton, 50.0 us, 1.60 times" in line and file.exists()


@pytest.fixture
def asked(monkeypatch):
    """The arguments with which `tune_shape` is called, which measures nothing."""
    calls = []
    monkeypatch.setattr(tuning, "tune_shape", lambda *arguments: calls.append(arguments) or "measured")
    return calls


def test_all_lstms_of_a_model_are_measured(asked):
    model = torch.nn.Sequential(LSTM(3, 4, batch_first=True))
    model.eval().requires_grad_(False)
    assert tune(model, torch.zeros(2, 5, 3)) == ["measured"]
    assert [call[:2] for call in asked] == [(Shape(3, 4, 1, 1, 0, 2, precision="tf32"), 5)]
    with pytest.raises(TypeError, match="got Linear"):
        tune(torch.nn.Linear(2, 2), torch.zeros(2))


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--layer", "4x5"]) == 1 and "no NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(dispatch, "_why_no_kernels", lambda *arguments: "none such")
    with pytest.raises(RuntimeError, match="nothing to tune: none such"):
        tuning.tune_shape(SHAPE, T, CPU)


COMMAND = "tune --layer 256x512 --layer 3x4 --batch 8 --steps 64 --dtype bf16 --train --resets --budget 90s".split()


def test_the_command_measures_what_its_arguments_say(asked, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("lstm_triton.kernels.device._cuda_figures", lambda index: device_figures(CPU))
    shape, gpu = Shape(256, 512, 1, 1, 0, 8, "resets", "bfloat16", train=True), torch.device("cuda", 0)
    for options, cell in (
        ([], "lstm"),
        (["--cell", "gru"], GRU.cell.key),
        (["--cell", "lstm_triton.cells.catalogue:slstm"], catalogue.slstm.key),
    ):
        asked.clear()
        assert cli.main([*COMMAND, *options]) == 0 and capsys.readouterr().out == "measured\nmeasured\n"
        shapes = shape._replace(cell=cell), shape._replace(input_size=3, hidden_size=4, cell=cell)
        assert asked == [(each, 64, gpu, 90.0) for each in shapes]
    asked.clear()
    assert cli.main([*COMMAND, "--dry-run"]) == 0 and not asked
    text = capsys.readouterr().out
    assert "LSTM(256, 512) B = 8, bfloat16, training, resets, T = 64:\n  triton-stepwise\n  triton\n  triton, " in text
    for wrong, message in (
        ("--layer 3", "--layer"),
        ("--layer 3x4 --cell Cell", "Cell is no cell"),
        ("--layer 3x4 --cell other", "no attribute 'other'"),
        ("--layer 3x4 --cell no_module:a", "no_module"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["tune", *wrong.split()])
        assert message in capsys.readouterr().err


def test_contenders_differ_in_more_than_chunks():
    shape = SHAPE._replace(hidden_size=512, batch=64)
    found = tuning.contenders(shape, 8, CPU, "backward", forward={"block_b": 16})
    assert list(found)[:3] == ["cudnn", "triton-stepwise", "triton"] and len(found) == 8
    assert all(c.forward == {"block_b": 16} for name, c in found.items() if name.startswith("triton,"))
    assert "cudnn" not in tuning.contenders(shape._replace(features="resets"), 8, CPU, "forward")
    assert found["cudnn"] == Contender("cudnn")
    assert list(tuning.contenders(shape, 1, CPU, "backward")) == list(found)[:3], "one step has no tile of a sequence"


# ---- what is measured is taken ---------------------------------------------------------------------------------------


def _chosen():
    return search.choose(PROBLEM, device_figures(CPU), CPU), lstm._choose(LSTM(I, H, **BFLOAT16), X, "", T, B)


def test_a_first_call_tunes_itself_where_that_is_asked_for(monkeypatch):
    asked = []

    def tune_shape(shape, steps, device):
        asked.append((shape, steps))
        measurements.add(_row(shape, "triton-stepwise", steps))

    monkeypatch.setattr(measurements, "tune_first_call", tune_shape)
    assert [_chosen()[1] for _ in range(2)] == ["triton-stepwise"] * 2 and asked == [(SHAPE, T)]


def test_the_user_s_file_comes_before_the_shipped_one_and_that_before_the_model(file):
    model, *others = (c for c in search.candidates(PROBLEM, device_figures(CPU)) if not c.waits)
    assert _chosen() == (model, "torch")
    _write(measurements.SHIPPED, _row(backend="triton-stepwise", forward=asdict(others[0])))
    assert _chosen() == (others[0], "triton-stepwise")
    _write(file, _row(backend="triton", forward=asdict(others[1])))
    assert _chosen() == (others[1], "triton")
    assert search.choose(PROBLEM._replace(stepwise=True), device_figures(CPU), CPU).persistent is False


@pytest.mark.parametrize(
    "change, steps, backend",
    [
        *(({}, steps, "triton") for steps in (60, 120)),  # the nearest length decides
        *(({}, steps, "cudnn") for steps in (130, 290)),
        ({}, 25, None),
        *((change, 100, None) for change in (dict(batch=3), dict(train=False), dict(features="resets"))),
        (dict(hidden_size=21), 100, None),
    ],
)
def test_a_row_holds_for_its_call_alone(change, steps, backend, file):
    _write(file, _row(steps=100), _row(steps=150, backend="cudnn"))
    row = measurements.best(SHAPE._replace(**change), steps, CPU)
    assert (row and row.backend) == backend


@pytest.mark.parametrize(
    "old, new",
    [
        (None, lambda text: text[:-5]),
        (None, lambda text: ""),
        (None, lambda text: "{}"),
        (None, lambda text: '[{"machine": 3}]'),
        ('"steps": 4', '"steps": "four"'),
        ('"backend": "triton"', '"backend": "magic"'),
        ('"block_h": ', '"block_h": 7'),
        (torch.__version__, "1.0"),
        ('"device": "CPU"', '"device": "NVIDIA X"'),
        ('"kernels": "', '"kernels": "0'),
    ],
)
def test_a_damaged_foreign_or_stale_file_costs_a_warning_and_nothing_else(old, new, file):
    _write(file, _row(forward=asdict(search.candidates(PROBLEM, device_figures(CPU))[0])))
    assert measurements.rows(CPU)
    text = file.read_text()
    file.write_text(text.replace(old, new) if old else new(text))
    assert file.read_text() != text
    measurements.refresh()
    module = LSTM(I, H, **BFLOAT16)
    with pytest.warns(UserWarning, match="aside"):
        module(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(X)
        assert measurements.best(SHAPE, T, CPU) is None
    measurements.add(_row())  # a file that is damaged is replaced
    assert measurements.best(SHAPE, T, CPU)


def _add(number):
    measurements.add(_row(steps=number))


def test_processes_that_tune_at_once_lose_no_row(file):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_add, range(1, 21), chunksize=1)
    measurements.refresh()
    assert sorted(row.steps for _, row in measurements.rows(CPU)) == list(range(1, 21))
    assert cli.main(["tune", "--forget"]) == 0 and measurements.rows(CPU) == ()
    assert [path.suffix for path in file.parent.iterdir() if path != file] == [".lock"]


def test_info_lists_them(file, capsys):
    _write(file, _row(), replace(_row(), machine=_row().machine._replace(sms=3)))
    cli.main(["info"])
    text = capsys.readouterr().out.split("Measurements\n")[1]
    assert "LSTM(3, 20) B = 2, bfloat16, training, T = 4: triton, 10.0 us, 2.00 times as fast as cuDNN" in text
    assert "1 for other devices or versions" in text and str(file) in text
