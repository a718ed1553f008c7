"""`python -m lstm_triton.demo`, which `make demo` and `lstm-triton demo` run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lstm_triton import check, environment, explain
from lstm_triton.bench.cases import UsageError
from lstm_triton.bench.device import pick
from lstm_triton.bench.rows import Row
from lstm_triton.bench.run import missing
from lstm_triton.demo import corpus, timing, train

# The sections of the report.
MODEL, SAMPLE = "A language model, trained character by character", "What it writes"
ACCURACY, TIMING = "Accuracy of the fused cell", "Time per timestep"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; exit code 0, 1 when the accuracy check fails, 2 when it cannot run, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("lstm-triton demo", description="Accuracy, a language model, timing, a report.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-report"), help="folder for the report and the checkpoint")
    add("--seconds", type=float, default=60.0, help="training time (default 60)")
    add("--steps", type=int, help="train for this many updates instead of a time")
    add("--resume", action="store_true", help="continue training from the checkpoint in --out")
    add("--seed", type=int, help="default 0")
    add("--device", default="auto", help="default: the GPU, if any")
    # At these sizes a second thread gains little, and costs much more than that where the cores are shared.
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--hidden-size", type=int, help="default: 512 on a GPU, 256 on a CPU")
    add("--batch", type=int, help="texts read side by side; default: 128 on a GPU, 32 on a CPU")
    add("--skip", nargs="+", choices=("check", "timing"), default=[], help="leave these parts out")
    try:
        return _demo(parser.parse_args(argv))
    except UsageError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> int:
    device, checkpoint = torch.device(pick(options.device)), options.out / "checkpoint.pt"
    if device.type == "cuda" and device.index is not None:  # the check runs on the current one
        torch.cuda.set_device(device)
    config, resumed = _config(options, device, checkpoint)
    said: dict[str, list[str]] = {MODEL: [], SAMPLE: [], ACCURACY: [], TIMING: []}

    def say(title: str, text: str) -> None:
        print(text, flush=True)
        said[title].append(text)

    say(MODEL, environment.summary(device))
    torch.set_num_threads(options.threads)
    checked = None
    try:
        if "check" not in options.skip:
            checked = check.run(options.device if options.device == "auto" else device.type, config.seed)
        say(ACCURACY, f"\n{check.table(checked)}" if checked else "Not checked (--skip check).")
    except check.CheckUnavailable as error:
        say(ACCURACY, f"The kernels cannot be checked here: {error}.")
    source = corpus.load(config.seed)
    training = train.Training(config, source, device)
    if resumed:
        training.restore(resumed)
        print(f"\nContinuing after {training.step} updates ({checkpoint})")
    files, held_out, characters = sum(source.files), source.files[1], len(source.train) + len(source.validation)
    of = f"{files} source files of Python's standard library, {characters:,} characters, {held_out} files held out"
    say(MODEL, f"Text: {of}.")
    shape = f"{config.hidden_size} units, {config.batch} texts side by side, gradients through {config.steps} steps"
    say(MODEL, f"Model: LSTM with {shape}, on the {'GPU' if device.type == 'cuda' else 'CPU'}.")
    say(MODEL, f"What trains it: {explain(training.model.lstm, steps=config.steps)}")
    training.run(checkpoint, options.seconds, options.steps)
    if training.interrupted:
        again = f"{sys.executable} -m lstm_triton.demo --out {options.out} --resume"
        print(f"Interrupted after {training.step} updates, saved to {checkpoint}; continue with\n  {again}")
        return 130
    (_, tokens, seconds, trained, bits), unigram = training.curve[-1], source.unigram_bits()
    gain = f"{abs(unigram - bits):.2f} {'below' if unigram > bits else 'ABOVE'} the {unigram:.2f}"
    rate = f"after {tokens:,} tokens in {seconds:.0f} s: {tokens / seconds:,.0f} tokens/s"
    say(
        MODEL,
        f"Validation: {bits:.2f} bits per character (training {trained:.2f}), {gain} of character frequencies alone, {rate}.",
    )
    print(f"Checkpoint: {checkpoint} (go on with --resume)\n")
    drawn = training.model.sample(corpus.encode("\ndef ").int().to(device), 500, config.seed)
    say(SAMPLE, "Drawn from Y_t = softmax(h_t W + b), one character after the other:")
    say(SAMPLE, bytes(drawn).decode("ascii") + "\n")
    rows: list[Row] = []
    for text in ["Not measured (--skip timing)."] if "timing" in options.skip else timing.measure(device, rows, 8.0):
        say(TIMING, text)
    if absent := missing("jinja2", "matplotlib", "pandas"):
        print(f"\n{absent}")
    else:
        from lstm_triton.demo.report import write

        write(path := options.out / "report.html", training.curve, unigram, said, rows)
        print(f"\nReport: {path.resolve()}")
    return 1 if checked and not checked.passed else 0


def _config(options: argparse.Namespace, device: torch.device, checkpoint: Path) -> tuple[train.Config, Any]:
    """Return what to train, and with --resume the contents of the checkpoint, which then decides."""
    given = {name: value for name in ("hidden_size", "batch", "seed") if (value := vars(options)[name]) is not None}
    if min(options.seconds, options.steps or 1, options.threads, *(given | {"seed": 1}).values()) <= 0:
        raise UsageError("times and sizes are above 0")
    if not options.resume:
        gpu = {"hidden_size": 512, "batch": 128, "learning_rate": 2e-3} if device.type == "cuda" else {}
        return train.Config(**(gpu | given)), None
    config, data = train.load_checkpoint(checkpoint)
    for name in (name for name in given if given[name] != getattr(config, name)):
        option, kept = f"--{name.replace('_', '-')} {given[name]}", f"{checkpoint}, which was trained with"
        raise UsageError(f"{option} contradicts {kept} {getattr(config, name)}: leave it out, or run without --resume")
    return config, data


if __name__ == "__main__":
    sys.exit(main())
