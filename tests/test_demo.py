"""The demo: its text, model, training, checkpoints, timing and report, and all of it run from the command line."""

import contextlib
import functools
import math
import multiprocessing
import os
import re
import signal
import time
import warnings

import pytest
import torch
from support.benches import CPU, Page

from lstm_triton import check, environment, explain
from lstm_triton.bench.cases import UsageError
from lstm_triton.demo import corpus, timing, train
from lstm_triton.demo.__main__ import main
from lstm_triton.demo.model import CharModel

report = pytest.importorskip("lstm_triton.demo.report", reason="needs the libraries of the extra [demo]")
WORDS = corpus.encode("abcab\n" * 300)
TEXT = corpus.Corpus(WORDS, WORDS[:900], (1, 1))
SIZES = ["--hidden-size", "8", "--batch", "2", "--device", "cpu"]
ONLY_TRAIN = [*SIZES, "--skip", "check", "timing"]


def test_corpus_is_the_same_for_a_seed_and_holds_files_out(tmp_path):
    """A few files must be survived: not UTF-8, not there, not part of the library."""
    for k in range(200):
        (tmp_path / f"m{k:03}.py").write_text(f"name_{k} = {k}\n" * 120, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 20)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("LEFT_OUT\n")
    one, two, other = (corpus.load(seed, tmp_path) for seed in (3, 3, 4))
    assert torch.equal(one.train, two.train) and torch.equal(one.validation, two.validation)
    assert not torch.equal(one.train, other.train)
    assert sum(one.files) == 201 and one.files[1] == math.ceil(201 / corpus.VALIDATION_SHARE)
    train_text, held_out = (bytes(part.tolist()).decode() for part in (one.train, one.validation))
    names = set(re.findall(r"name_\d+", train_text))
    assert names and names.isdisjoint(re.findall(r"name_\d+", held_out))
    assert "LEFT_OUT" not in train_text + held_out
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "test"))):
        corpus.load(0, tmp_path / "test")  # too little text
    assert bytes(corpus.encode("abzé\U0001f600").tolist()) == b"abz??"
    numbers = corpus.encode("abcd" * 50_000)
    assert corpus.Corpus(numbers, numbers[:400], (1, 1)).unigram_bits() == pytest.approx(2.0, abs=1e-2)


def test_y_t_is_the_softmax_of_the_logits_and_a_sample_follows_its_seed():
    model = CharModel(11, 5, 13)
    characters = torch.randint(11, (4, 2))
    logits, final = model(characters)
    state = torch.zeros(2, 13), torch.zeros(2, 13)
    for t in range(4):
        y, state = model.step(characters[t], state)
        torch.testing.assert_close(y, logits[t].softmax(-1))
    torch.testing.assert_close(state, tuple(s[0] for s in final))
    first, again, other = (model.sample(torch.tensor([1, 2]), 40, seed) for seed in (5, 5, 6))
    assert first == again != other
    assert len(first) == 42 and first[:2] == [1, 2] and max(first) < 11


def test_training_falls_below_the_unigram_entropy_and_resumed_equals_uninterrupted(tmp_path):
    config = train.Config(hidden_size=12, embedding_size=6, batch=3, steps=7, learning_rate=1e-2)
    whole = train.Training(config, TEXT, CPU)
    whole.run(tmp_path / "whole.pt", seconds=1e9, steps=100)  # past the end of the text
    first, last = whole.curve[0], whole.curve[-1]
    assert (first.step, last.step, last.tokens) == (0, 100, 100 * 3 * 7) and last.tokens > len(TEXT.train)
    assert last.validation_bits < TEXT.unigram_bits() - 0.5 < first.validation_bits
    assert all(math.isfinite(point.train_bits) for point in whole.curve[1:])

    path = tmp_path / "parts.pt"
    train.Training(config, TEXT, CPU).run(path, seconds=1e9, steps=20)
    config, data = train.load_checkpoint(path)
    resumed = train.Training(config, TEXT, CPU)
    resumed.restore(data)
    before = len(resumed.curve)
    resumed.run(path, seconds=1e9, steps=80)
    seconds = [point.seconds for point in resumed.curve]
    assert len(seconds) > before and seconds == sorted(seconds)
    assert [resumed.curve[before - 1].step, resumed.step, train.load_checkpoint(path)[1]["step"]] == [20, 100, 100]
    torch.testing.assert_close(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    resumed.run(path, seconds=0.1)  # the clock ends training, too
    assert resumed.step > 100 and not resumed.interrupted
    resumed.step, resumed.state = (
        85,
        tuple(s * math.nan for s in resumed.state),
    )  # the text begins anew, and so does the state
    resumed.run(path, seconds=1e9, steps=1)
    assert math.isfinite(resumed.curve[-1].train_bits)


def test_checkpoints_that_fail_damaged_or_contradicted(tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.pt"
    training = train.Training(train.Config(hidden_size=8, batch=2), TEXT, CPU)
    training.save(path)
    before = path.read_bytes()
    for name, value in (("--hidden-size", 9), ("--batch", 3), ("--seed", 1)):
        assert main(["--out", str(tmp_path), "--resume", "--device", "cpu", name, str(value)]) == 2
        error = capsys.readouterr().err
        assert f"{name} {value} contradicts" in error and str(tmp_path) in error

    def fail(data, target):
        target.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(torch, "save", fail)
        training.save(path)
    assert path.read_bytes() == before

    for contents in (b"", b"no checkpoint", {"format": 0}, [1, 2], None):
        path.unlink()
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        elif contents is not None:
            torch.save(contents, path)
        assert main(["--out", str(tmp_path), "--resume", "--skip", "check"]) == 2
        error = capsys.readouterr().err
        assert "checkpoint" in error.replace(str(path), "") and str(path) in error


def test_the_demo_checks_trains_times_reports_and_resumes(tmp_path, capsys, monkeypatch):
    """All of it in small; a failed check is the exit code, and everything else is there nevertheless."""
    seeds, measured = [], timing.measure
    monkeypatch.setattr(corpus, "load", functools.cache(corpus.load))  # Python's own sources

    def checked(device, seed):
        seeds.append((device, seed))
        rows = (check.Row("float32", q, 1.0, 1.0, 3e-7, 4e-8, ("B=1 too large",)) for q in check.QUANTITIES)
        return check.Report("here", 1, tuple(rows))

    with monkeypatch.context() as patch:
        patch.setattr(check, "run", checked)
        patch.setattr(timing, "measure", lambda device, rows, seconds: measured(device, rows, 0.05, 2, 4, 3))
        assert main(["--out", str(tmp_path), "--steps", "3", "--seed", "3", *SIZES]) == 1
    out, path = capsys.readouterr().out, tmp_path / "report.html"
    assert seeds == [("cpu", 3)] and str(path.resolve()) in out
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    # What trained it, and on what: said where it is printed and where it is kept.
    said = explain(CharModel(128, 64, 8).lstm, steps=64), environment.summary(CPU), "B=1 too large"
    said += "bits per character", "Drawn from Y_t", "tokens/s", "Time per timestep", "torch.nn.LSTM"
    assert [(text, where) for text in said for where in (out, page.text) if text not in where] == []
    times = re.findall(r"^ +(\S.*\S) +(\S+) us/step \((\S+) to (\S+)\)$", out.replace(",", ""), re.MULTILINE)
    assert sorted(name for name, *_ in times) == sorted(2 * sum(timing.PROVIDERS.values(), ()))
    assert all(0 < float(low) <= float(high) and float(median) > 0 for _, median, low, high in times)
    assert out.count(" loop ") == 2 and "say nothing about speed on a GPU" in out
    assert page.tags.count("svg") == 1 and page.tags.count("section") == 4 and page.fetched == {"data:,"}
    assert "frequencies alone: " in page.text and "3.0e-07" in page.text and not re.search(r"[>\s,]nan[<\s,]", html)

    assert main(["--out", str(tmp_path), "--steps", "2", "--resume", *ONLY_TRAIN]) == 0
    assert "Continuing after 3 updates" in capsys.readouterr().out
    page = Page(path.read_text(encoding="utf-8"))
    assert "Not measured (--skip timing)" in page.text and "Not checked (--skip check)" in page.text
    config, data = train.load_checkpoint(tmp_path / "checkpoint.pt")
    assert (config.hidden_size, data["step"], data["curve"][-1][0]) == (8, 5, 5)


def test_the_report_escapes_text_and_says_what_did_not_run(tmp_path):
    text, path = "\ndef <script>alert('&amp;')</script>", tmp_path / "new" / "report.html"
    report.write(path, [], 4.6, {"Model": [], "Sample": [text], "Time": ["no <timing>"]}, [])
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"svg", "script"} & set(page.tags)
    assert "<script>alert('&amp;')</script>" in page.text and "no <timing>" in page.text


def _demo(folder, *arguments):
    """The demo in a process of its own: it leaves its output in a file and ends with its code."""
    corpus.load = lambda seed: TEXT
    with (folder / "out").open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main(["--out", str(folder), *ONLY_TRAIN, *arguments])
    os._exit(code)


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path):
    path = tmp_path / "checkpoint.pt"
    start = "spawn" if torch.cuda.is_available() else "fork"  # which autograd's threads do not survive
    process = multiprocessing.get_context(start).Process(target=_demo, args=(tmp_path, "--seconds", "600"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads; they are idle
        process.start()
    try:
        while not path.exists():  # written before the first update
            assert process.is_alive(), (tmp_path / "out").read_text()
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        process.join(120)
    finally:
        process.kill()
    out = (tmp_path / "out").read_text()
    assert process.exitcode == 130 and "--resume" in out and "Traceback" not in out, out
    data = train.load_checkpoint(path)[1]
    assert data["step"] == data["curve"][-1][0]
