"""`lstm-triton tune` without a GPU: kernels in the interpreter, a made-up clock; and what then takes its measurements."""

import json
import multiprocessing
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from support.process import ForkedProcess

from lstm_triton import GRU, LSTM, Cell, Recurrent, cli, convert, dispatch, explain, lstm, measurements, tune, tuning
from lstm_triton.cells import catalogue
from lstm_triton.kernels import search
from lstm_triton.kernels.device import device_figures
from lstm_triton.measurements import Row
from lstm_triton.shapes import Shape
from lstm_triton.trial import Contender

CPU = torch.device("cpu")
I, H, B, T = 3, 20, 2, 4
SHAPE = Shape(I, H, 1, 1, 0, B, "", "bfloat16", train=True)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The user's file, which is not there yet; on this CPU the kernels are said to run."""
    path = tmp_path / "folder" / "measurements.json"
    monkeypatch.setenv("LSTM_TRITON_TUNED", str(path))
    monkeypatch.setattr(measurements, "SHIPPED", tmp_path / "shipped.json")
    measurements.refresh()
    yield path
    measurements.refresh()


@pytest.fixture
def made_up(monkeypatch):
    """made_up(cudnn=..., triton=...): what happens to contenders whose names begin so: see support/made_up_trial.py."""
    monkeypatch.setattr(tuning, "SERVE", "support.made_up_trial:main")
    monkeypatch.setattr(tuning, "Process", ForkedProcess)
    monkeypatch.setattr(dispatch, "_why_no_kernels", lambda *arguments: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch._remembered.cache_clear()

    def happening(**what):
        monkeypatch.setenv("MADE_UP", json.dumps({name.replace("_", "-"): value for name, value in what.items()}))

    yield happening
    dispatch._remembered.cache_clear()


def _row(shape=SHAPE, backend="triton", steps=T, **changes):
    return replace(Row(measurements.machine(CPU), shape, steps, backend, 10.0, 20.0), **changes)


def _write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([json.loads(json.dumps(_dict(row))) for row in rows]))
    measurements.refresh()


def _dict(row):
    return asdict(row) | dict(machine=row.machine._asdict(), shape=row.shape._asdict())


def _module(**options):
    return LSTM(I, H, dtype=torch.bfloat16, **options)


X = torch.zeros(T, B, I, dtype=torch.bfloat16)


# ---- measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_fastest_is_kept_and_the_others_are_not_taken(made_up, file, capsys):
    made_up(cudnn=90.0, triton_stepwise=95.0, triton=60.0)
    (line,) = tune(_module(), X, budget_s=120.0)
    expected = "LSTM(3, 20) B = 2, bfloat16, training, T = 4: triton, 60.0 us, 1.50 times as fast as cuDNN"
    assert line == expected and str(file) in "".join(measurements.listing())
    (row,) = json.loads(file.read_text())
    figures = device_figures(CPU)
    for way in ("forward", "backward"):
        assert row[way] in [asdict(c) for c in search.candidates(measurements.problem_of(SHAPE, way), figures)], way
    assert "tile" in capsys.readouterr().err
    assert lstm._choose(_module(), X, "", T, B) == "triton"


@pytest.mark.long
@pytest.mark.parametrize(
    "stepwise, triton, taken, says",
    [
        (95.0, "trap", "cudnn, 90.0 us, 1.00 times", "crashed or hung"),
        (95.0, "wrong", "cudnn, 90.0 us, 1.00 times", "wrong: "),
        (95.0, 100.0, "cudnn, 90.0 us, 1.00 times", None),
        ("hang", 40.0, "triton, 40.0 us", "crashed or hung"),
    ],
)
def test_what_traps_hangs_is_wrong_or_slower_than_cudnn_is_not_taken(
    stepwise, triton, taken, says, made_up, monkeypatch, capsys
):
    """What hangs costs its time and no more."""
    monkeypatch.setattr(tuning, "_SILENCE_S", 5.0)
    monkeypatch.setattr(tuning, "_CANDIDATES", 0)
    made_up(cudnn=90.0, triton_stepwise=stepwise, triton=triton)
    with torch.no_grad():
        (line,) = tune(_module(), X, budget_s=120.0)
        chosen = lstm._choose(_module(), X, "", T, B)
    assert f": {taken}" in line and chosen == (
        "torch" if taken.startswith("cudnn") else "triton"
    )  # this CPU has no cuDNN
    err = capsys.readouterr().err
    assert [text for text in ("crashed or hung", "wrong: ") if text in err] == ([says] if says else [])


def test_nothing_measured_is_an_error(made_up, monkeypatch, file):
    monkeypatch.setattr(tuning, "SERVE", "no_module:main")
    with pytest.raises(RuntimeError, match="did not start"):
        tune(_module(), X, quiet=True)
    assert not file.exists()


def test_an_interrupt_keeps_what_is_measured(made_up, monkeypatch, file):
    def ask(self, *arguments):
        yield dict(doing="cudnn")
        yield dict(times={"cudnn": 80.0, "triton": 50.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(ForkedProcess, "ask", ask)
    assert ": triton, 50.0 us, 1.60 times" in tune(_module(), X, quiet=True)[0] and file.exists()


def test_all_lstms_of_a_model_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(tuning, "tune_shape", lambda *call: measured.append(call[:2]) or "line")
    model = torch.nn.Sequential(LSTM(3, 4, batch_first=True))
    model.eval().requires_grad_(False)
    assert tune(model, torch.zeros(2, 5, 3)) == ["line"]
    (call,) = measured
    assert call == (Shape(3, 4, 1, 1, 0, 2, precision="tf32"), 5)
    with pytest.raises(TypeError, match="got Linear"):
        tune(torch.nn.Linear(2, 2), torch.zeros(2))


def test_without_a_gpu_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["tune", "--layer", "4x5"]) == 1 and "no NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="nothing to tune"):
        tuning.tune_shape(SHAPE._replace(dtype="int32"), T, CPU)


def test_the_command_measures_what_its_arguments_say(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = []
    monkeypatch.setattr(tuning, "tune_shape", lambda *arguments: asked.append(arguments) or "measured")
    arguments = (
        "tune --layer 256x512 --layer 3x4 --batch 8 --steps 64 --dtype bf16 --train --resets --budget 90s".split()
    )
    assert cli.main(arguments) == 0 and capsys.readouterr().out == "measured\nmeasured\n"
    shape = Shape(256, 512, 1, 1, 0, 8, "resets", "bfloat16", train=True)
    gpu = torch.device("cuda", 0)
    assert asked == [(shape, 64, gpu, 90.0), (shape._replace(input_size=3, hidden_size=4), 64, gpu, 90.0)]
    monkeypatch.setattr("lstm_triton.kernels.device._cuda_figures", lambda index: device_figures(CPU))
    assert cli.main([*arguments, "--dry-run"]) == 0 and len(asked) == 2
    text = capsys.readouterr().out
    assert "LSTM(256, 512) B = 8, bfloat16, training, resets, T = 64:\n  triton-stepwise\n  triton\n  triton, " in text
    with pytest.raises(SystemExit):
        cli.main(["tune", "--layer", "3"])
    asked.clear()
    for cell in ("gru", "lstm_triton.cells.catalogue:slstm"):
        assert cli.main([*arguments, "--cell", cell]) == 0
    assert [call[0].cell for call in asked] == [c.key for c in (GRU.cell, catalogue.slstm) for _ in range(2)]
    capsys.readouterr()
    for cell, message in (("Cell", "Cell is no cell"), ("other", "no attribute 'other'"), ("no_module:a", "no_module")):
        with pytest.raises(SystemExit):
            cli.main(["tune", "--layer", "3x4", "--cell", cell])
        assert message in capsys.readouterr().err


def test_a_first_call_tunes_itself_where_that_is_asked_for(made_up, monkeypatch, file):
    asked = []

    def tune_shape(shape, steps, device):
        asked.append((shape, steps))
        measurements.add(_row(shape, "triton-stepwise", steps))

    monkeypatch.setattr(measurements, "tune_first_call", tune_shape)
    for _ in range(2):
        assert lstm._choose(_module(), X, "", T, B) == "triton-stepwise"
    assert asked == [(SHAPE, T)]


def test_contenders_differ_in_more_than_chunks():
    shape = SHAPE._replace(hidden_size=512, batch=64)
    found = tuning.contenders(shape, 8, CPU, "backward", forward={"block_b": 16})
    assert list(found)[:3] == ["cudnn", "triton-stepwise", "triton"] and len(found) == 8
    assert all(c.forward == {"block_b": 16} for name, c in found.items() if name.startswith("triton,"))
    assert "cudnn" not in tuning.contenders(shape._replace(features="resets"), 8, CPU, "forward")
    assert found["cudnn"] == Contender("cudnn")
    assert list(tuning.contenders(shape, 1, CPU, "backward")) == list(found)[:3], "one step has no tile of a sequence"


# ---- what is measured is taken ---------------------------------------------------------------------------------------


def test_the_user_s_file_comes_before_the_shipped_one_and_that_before_the_model(file, monkeypatch):
    monkeypatch.setattr(dispatch, "_why_no_kernels", lambda *arguments: None)
    dispatch._remembered.cache_clear()
    problem = measurements.problem_of(SHAPE, "forward")
    model, *others = (c for c in search.candidates(problem, device_figures(CPU)) if not c.waits)
    assert search.choose(problem, device_figures(CPU), CPU) == model
    _write(measurements.SHIPPED, [_row(backend="triton-stepwise", forward=asdict(others[0]))])
    assert search.choose(problem, device_figures(CPU), CPU) == others[0]
    assert lstm._choose(_module(), X, "", T, B) == "triton-stepwise"
    _write(file, [_row(backend="triton", forward=asdict(others[1]))])
    assert search.choose(problem, device_figures(CPU), CPU) == others[1]
    assert lstm._choose(_module(), X, "", T, B) == "triton"
    assert search.choose(problem._replace(stepwise=True), device_figures(CPU), CPU).persistent is False
    dispatch._remembered.cache_clear()


@pytest.mark.parametrize(
    "change, steps, backend",
    [
        ({}, 60, "triton"),  # the nearest length decides
        ({}, 120, "triton"),
        ({}, 130, "cudnn"),
        ({}, 290, "cudnn"),
        ({}, 25, None),
        ({"batch": 3}, 100, None),
        ({"train": False}, 100, None),
        ({"features": "resets"}, 100, None),
        ({"hidden_size": 21}, 100, None),
    ],
)
def test_a_row_holds_for_its_call_alone(change, steps, backend, file):
    _write(file, [_row(steps=100), _row(steps=150, backend="cudnn")])
    row = measurements.best(SHAPE._replace(**change), steps, CPU)
    assert (row and row.backend) == backend


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "",
        lambda text: "{}",
        lambda text: '[{"machine": 3}]',
        lambda text: text.replace('"steps": 4', '"steps": "four"'),
        lambda text: text.replace('"backend": "triton"', '"backend": "magic"'),
        lambda text: text.replace('"block_h": ', '"block_h": 7'),
        lambda text: text.replace(torch.__version__, "1.0"),
        lambda text: text.replace('"device": "CPU"', '"device": "NVIDIA X"'),
        lambda text: text.replace('"kernels": "', '"kernels": "0'),
    ],
)
def test_a_damaged_foreign_or_stale_file_costs_a_warning_and_nothing_else(damage, file):
    config = search.candidates(measurements.problem_of(SHAPE, "forward"), device_figures(CPU))[0]
    _write(file, [_row(forward=asdict(config))])
    assert measurements.rows(CPU)
    text = file.read_text()
    file.write_text(damage(text))
    assert file.read_text() != text
    measurements.refresh()
    module = _module()
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
    _write(file, [_row(), replace(_row(), machine=_row().machine._replace(sms=3))])
    cli.main(["info"])
    text = capsys.readouterr().out.split("Measurements\n")[1]
    assert "LSTM(3, 20) B = 2, bfloat16, training, T = 4: triton, 10.0 us, 2.00 times as fast as cuDNN" in text
    assert "1 for other devices or versions" in text and str(file) in text


# ---- other cells -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_cells_of_ones_own_are_measured(made_up, monkeypatch):
    """With cuDNN for a GRU, converted ones too; without it for others."""
    monkeypatch.setattr(tuning, "_CANDIDATES", 0)
    made_up(cudnn=90.0, triton_stepwise=95.0, triton=60.0)
    gru, slstm = GRU(I, H, dtype=torch.bfloat16), Recurrent(catalogue.slstm, I, H, dtype=torch.bfloat16)
    converted = convert(torch.nn.GRU(I, H, dtype=torch.bfloat16))
    with torch.no_grad():
        for module in (gru, converted):
            expected = "gru(3, 20) B = 2, bfloat16, inference, T = 4: triton, 60.0 us, 1.50 times as fast as cuDNN"
            assert tune(module, X, budget_s=120.0) == [expected]
        zoneout = Recurrent(catalogue.zoneout(), I, H, dtype=torch.bfloat16)
        assert ": triton, 60.0 us" in tune(zoneout, X, budget_s=120.0)[0]
        assert tune(slstm, X, budget_s=120.0) == ["slstm(3, 20) B = 2, bfloat16, inference, T = 4: triton, 60.0 us"]
        assert lstm._choose(slstm, X, "", T, B) == "triton"
        assert lstm._choose(Recurrent(catalogue.cifg, I, H, dtype=torch.bfloat16), X, "", T, B) != "triton"
        assert not gru._is_torchs(X, X), "what was measured holds for a plain call too"
        assert "triton: measured here" in explain(gru, X) and "triton: measured here" in explain(converted, X)


def test_a_cell_that_no_other_process_can_import(made_up):
    own = Cell(lambda z, s: (z.a.sigmoid(), {}), "a")
    own.__module__ = "__main__"
    with pytest.raises(RuntimeError, match="move the cell <lambda> to a module"):
        tune(Recurrent(own, I, H, dtype=torch.bfloat16), X, quiet=True)
