"""The demo: its text, model, training, checkpoints and timing, and all of it run from the command line."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_demo_report import Page, check_report

from lstm_triton import LSTMCell, check, environment, explain
from lstm_triton.bench.device import UsageError
from lstm_triton.demo import corpus, timing, train
from lstm_triton.demo.__main__ import main
from lstm_triton.demo.model import CharModel

CPU = torch.device("cpu")
SMALL = train.Config(hidden_size=12, embedding_size=6, batch=3, steps=7)


@pytest.fixture
def text():
    words = corpus.encode("abcab\n" * 400)
    return corpus.Corpus(words, words[:900], (1, 1))


def _folder(path, files=200):
    """Python files of which a few must be survived: not UTF-8, not there, not part of the library."""
    for k in range(files):
        (path / f"m{k:03}.py").write_text(f"name_{k} = {k}\n" * 120, encoding="utf-8")
    (path / "latin.py").write_bytes(b"# caf\xe9\n" * 20)
    (path / "gone.py").symlink_to(path / "nowhere.py")
    (path / "test").mkdir()
    (path / "test" / "left_out.py").write_text("LEFT_OUT\n")
    return path


def test_corpus_is_the_same_for_a_seed_and_holds_files_out(tmp_path):
    folder = _folder(tmp_path)
    one, two, other = (corpus.load(seed, folder) for seed in (3, 3, 4))
    assert torch.equal(one.train, two.train) and torch.equal(one.validation, two.validation)
    assert not torch.equal(one.train, other.train)
    assert sum(one.files) == 201 and one.files[1] == math.ceil(201 / corpus.VALIDATION_SHARE)
    train_text, held_out = (bytes(part.tolist()).decode() for part in (one.train, one.validation))
    names = set(re.findall(r"name_\d+", train_text))
    assert names and names.isdisjoint(re.findall(r"name_\d+", held_out))
    assert "LEFT_OUT" not in train_text + held_out


def test_corpus_refuses_too_little_text(tmp_path):
    (tmp_path / "a.py").write_text("pass\n")
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        corpus.load(0, tmp_path)


def test_characters_outside_ascii_are_question_marks():
    assert bytes(corpus.encode("abzé\U0001f600").tolist()) == b"abz??"


def test_unigram_bits_of_equally_frequent_characters():
    numbers = corpus.encode("abcd" * 50_000)
    assert corpus.Corpus(numbers, numbers[:400], (1, 1)).unigram_bits() == pytest.approx(2.0, abs=1e-2)


def test_y_t_is_the_softmax_of_the_logits():
    torch.manual_seed(0)
    model = CharModel(11, 5, 13)
    characters = torch.randint(11, (4, 2))
    logits, final = model(characters)
    state = torch.zeros(2, 13), torch.zeros(2, 13)
    for t in range(4):
        y, state = model.step(characters[t], state)
        torch.testing.assert_close(y, logits[t].softmax(-1))
    torch.testing.assert_close(state, tuple(s[0] for s in final))


def test_a_sample_follows_its_seed():
    torch.manual_seed(0)
    model = CharModel(11, 5, 13)
    first, again, other = (model.sample(torch.tensor([1, 2]), 40, seed) for seed in (5, 5, 6))
    assert first == again != other
    assert len(first) == 42 and first[:2] == [1, 2] and max(first) < 11


def test_training_falls_below_the_unigram_entropy(text, tmp_path):
    training = train.Training(SMALL, text, CPU)
    training.run(tmp_path / "c.pt", seconds=1e9, steps=300)
    first, last = training.curve[0], training.curve[-1]
    assert (first.step, last.step) == (0, 300)
    assert last.tokens == 300 * 3 * 7
    assert last.validation_bits < text.unigram_bits() - 0.5 < first.validation_bits
    assert all(math.isfinite(point.train_bits) for point in training.curve[1:])


def test_the_clock_ends_training(text, tmp_path):
    training = train.Training(SMALL, text, CPU)
    training.run(tmp_path / "c.pt", seconds=0.2)
    assert training.step > 0 and training.seconds >= 0.2 and not training.interrupted


def test_resumed_training_equals_uninterrupted(text, tmp_path):
    whole = train.Training(SMALL, text, CPU)
    whole.run(tmp_path / "whole.pt", seconds=1e9, steps=130)  # past the end of the text, where the state starts anew

    path = tmp_path / "parts.pt"
    train.Training(SMALL, text, CPU).run(path, seconds=1e9, steps=50)
    config, data = train.load_checkpoint(path)
    resumed = train.Training(config, text, CPU)
    resumed.restore(data)
    before = len(resumed.curve)
    resumed.run(path, seconds=1e9, steps=80)

    assert resumed.step == whole.step == 130
    seconds = [point.seconds for point in resumed.curve]
    assert len(seconds) > before and seconds == sorted(seconds)
    assert [point.step for point in resumed.curve][before - 1 : before + 1] == [50, resumed.curve[before].step]
    torch.testing.assert_close(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert train.load_checkpoint(path)[1]["step"] == 130


def test_a_failed_save_keeps_the_old_checkpoint(text, tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    training = train.Training(SMALL, text, CPU)
    training.save(path)
    before = path.read_bytes()

    def fail(data, target):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        training.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("contents", [None, b"", b"no checkpoint", {"format": 0}, [1, 2]])
def test_an_unusable_checkpoint_is_refused(contents, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        torch.save(contents, path)
    with pytest.raises(UsageError, match="checkpoint"):
        train.load_checkpoint(path)
    assert main(["--out", str(tmp_path), "--resume", "--skip", "check"]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("argument", [("--hidden-size", 9), ("--batch", 3), ("--seed", 1)], ids=lambda a: a[0])
def test_what_contradicts_the_checkpoint_is_refused(argument, tmp_path, capsys):
    config = train.Config(hidden_size=8, batch=2)
    words = corpus.encode("ab" * 200)
    path = tmp_path / "checkpoint.pt"
    train.Training(config, corpus.Corpus(words, words, (1, 1)), CPU).save(path)
    before = path.read_bytes()
    name, value = argument
    assert main(["--out", str(tmp_path), "--resume", "--device", "cpu", name, str(value)]) == 2
    error = capsys.readouterr().err
    assert f"{name} {value} contradicts" in error and str(tmp_path) in error
    assert path.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "no such NVIDIA GPU" in capsys.readouterr().err


TINY = ["--hidden-size", "8", "--batch", "2", "--device", "cpu", "--skip", "check", "timing"]


def test_the_demo_trains_reports_and_resumes(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--steps", "3", *TINY]) == 0
    out = capsys.readouterr().out
    assert "bits per character" in out and "Drawn from Y_t" in out and "tokens/s" in out
    path = tmp_path / "report.html"
    assert str(path.resolve()) in out
    page = Page(path.read_text(encoding="utf-8"))
    assert "svg" in page.tags
    # What trained it, and on what: said where it is printed and where it is kept.
    model = CharModel(128, 64, 8)
    for text in (out, page.text):
        assert explain(model.lstm, steps=64) in text and environment.summary(CPU) in text
    assert "Not measured (--skip timing)" in page.text and "Not checked (--skip check)" in page.text

    assert main(["--out", str(tmp_path), "--steps", "2", "--resume", *TINY]) == 0
    assert "Continuing after 3 updates" in capsys.readouterr().out
    config, data = train.load_checkpoint(tmp_path / "checkpoint.pt")
    assert (config.hidden_size, data["step"], data["curve"][-1][0]) == (8, 5, 5)


def test_the_demo_checks_and_times(tmp_path, capsys, monkeypatch):
    """All of it in small; a failed check is the exit code, and everything else is there nevertheless."""
    seeds, measured = [], timing.measure

    def checked(device, seed):
        seeds.append((device, seed))
        return check_report("B=1 too large")

    monkeypatch.setattr(check, "run", checked)
    monkeypatch.setattr(timing, "measure", lambda device, rows, seconds: measured(device, rows, 0.05, 2, 4, 3))
    assert main(["--out", str(tmp_path), "--steps", "2", "--seed", "3", *TINY[: TINY.index("--skip")]]) == 1
    out, page = capsys.readouterr().out, Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert seeds == [("cpu", 3)]
    for text in (out, page.text):
        assert "B=1 too large" in text and "torch.nn.LSTM" in text and "Time per timestep" in text


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path):
    command = [sys.executable, "-m", "lstm_triton.demo", "--out", str(tmp_path), "--seconds", "600", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = tmp_path / "checkpoint.pt"
    try:
        while not path.exists():  # written before the first update
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "--resume" in out and "Traceback" not in out
    data = train.load_checkpoint(path)[1]
    assert data["step"] == data["curve"][-1][0]
    assert main(["--out", str(tmp_path), "--steps", "1", "--resume", *TINY]) == 0
    assert train.load_checkpoint(path)[1]["step"] == data["step"] + 1


def test_timing_covers_everyone_and_restores_precision():
    before = torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    found = list(timing.measure(CPU, [], seconds=0.05, batch=2, size=4, length=3))
    assert before == (torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    assert "CPU" in found[0] and "say nothing about" in found[-1]
    compared = "\n".join(found[1:-1])
    times = re.findall(r"^ +(\S.*\S) +(\S+) us/step \((\S+) to (\S+)\)$", compared.replace(",", ""), re.MULTILINE)
    assert sorted(name for name, *_ in times) == sorted(2 * sum(timing.PROVIDERS.values(), ()))
    assert all(0 < float(low) <= float(high) and float(median) > 0 for _, median, low, high in times)
    assert compared.count(" loop ") == 2 and compared.count("train") == 2


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = LSTMCell.forward

    def wrong(self, x, hx=None):
        h, c = right(self, x, hx)
        return h * 1.001, c

    monkeypatch.setattr(LSTMCell, "forward", wrong)
    found = "\n".join(timing.measure(CPU, [], seconds=0.05, batch=2, size=4, length=3))
    assert len(re.findall(r"lstm_triton auto +WRONG: wrong: \w+ is off", found)) == 2
    assert found.count("us/step") == 6
