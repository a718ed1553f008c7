"""`python -m lstm_triton.demo`, which `make demo` and `lstm-triton demo` run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lstm_triton import check, environment, explain
from lstm_triton.bench.device import UsageError, pick
from lstm_triton.bench.progress import missing
from lstm_triton.demo import corpus, timing, train

PROMPT = "\ndef "


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; exit code 0, 1 when the accuracy check fails, 2 when it cannot run, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        return _demo(options)
    except (UsageError, corpus.CorpusError, train.CheckpointError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    text = "Accuracy, a small language model, timing, a report."
    parser = argparse.ArgumentParser(prog="lstm-triton demo", description=text)
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-report"), help="folder for the report and the checkpoint")
    add("--seconds", type=_positive(float), default=60.0, help="training time (default 60)")
    add("--steps", type=_positive(int), help="train for this many updates instead of a time")
    add("--resume", action="store_true", help="continue training from the checkpoint in --out")
    add("--seed", type=int, help="default 0")
    add("--device", help="default: the GPU, if any")
    # At these sizes a second thread gains little, and costs much more than that where the cores are shared.
    add("--threads", type=_positive(int), default=1, help="CPU threads (default 1)")
    add("--hidden-size", type=_positive(int), help="default: 512 on a GPU, 256 on a CPU")
    add("--batch", type=_positive(int), help="texts read side by side; default: 128 on a GPU, 32 on a CPU")
    add("--skip", nargs="+", choices=("check", "timing"), default=[], help="leave these parts out")
    return parser


def _positive(kind: type) -> type:
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise ValueError(text)
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse  # type: ignore[return-value]


def _demo(options: argparse.Namespace) -> int:
    checkpoint = options.out / "checkpoint.pt"
    device = torch.device(pick(options.device or "auto"))
    if device.type == "cuda" and device.index is not None:  # the check runs on the current one
        torch.cuda.set_device(device)
    config, resumed = _config(options, device, checkpoint)
    said: list[str] = []  # what is printed, and stands in the report

    def say(text: str) -> None:
        print(text, flush=True)
        said.append(text)

    say(environment.summary(device))
    torch.set_num_threads(options.threads)
    accuracy = _check(options, device, config.seed)
    source = corpus.load(config.seed, vocabulary=resumed["vocabulary"] if resumed else None)
    training = train.Training(config, source, device)
    if resumed:
        training.restore(resumed)
        print(f"\nContinuing after {training.step} updates ({checkpoint})")
    unigram, characters = source.unigram_bits(), len(source.train) + len(source.validation)
    say(
        f"Text: {sum(source.files)} source files of Python's standard library, {characters:,} characters, "
        f"{source.files[1]} files held out."
    )
    say(
        f"Model: LSTM with {config.hidden_size} units, {config.batch} texts side by side, gradients through {config.steps} "
        f"steps, on the {'GPU' if device.type == 'cuda' else 'CPU'}."
    )
    say(f"What trains it: {explain(training.model.lstm, steps=config.steps)}")
    training.run(checkpoint, options.seconds, options.steps)
    if training.interrupted:
        print(
            f"Interrupted after {training.step} updates, saved to {checkpoint}; continue with\n"
            f"  {sys.executable} -m lstm_triton.demo --out {options.out} --resume"
        )
        return 130
    last = training.curve[-1]
    gain = unigram - last.validation_bits
    say(
        f"Validation: {last.validation_bits:.2f} bits per character (training {last.train_bits:.2f}), {abs(gain):.2f} "
        f"{'below' if gain > 0 else 'ABOVE'} the {unigram:.2f} of character frequencies alone, after {last.tokens:,} tokens in "
        f"{last.seconds:.0f} s: {last.tokens / last.seconds:,.0f} tokens/s."
    )
    prompt = corpus.encode(PROMPT, source.vocabulary).tolist()
    sample = corpus.decode(training.model.sample(prompt, 500, config.seed), source.vocabulary)
    print(f"Checkpoint: {checkpoint} (go on with --resume)\n\nDrawn from Y_t:\n{sample}\n", flush=True)
    timings: timing.Report | str = "Not measured (--skip timing)."
    if "timing" not in options.skip:
        try:
            timings = timing.measure(device, seconds=8.0)
        except RuntimeError as error:  # a result was wrong
            timings = f"Not timed: {error}"
    print(timings if isinstance(timings, str) else timing.table(timings))
    path = options.out / "report.html"
    if absent := missing("jinja2", "matplotlib", "pandas"):
        print(f"\n{absent}")
    else:
        from lstm_triton.demo import report

        report.write(path, said, training.curve, unigram, (PROMPT, sample), accuracy, timings)
        print(f"\nReport: {path.resolve()}")
    return 1 if isinstance(accuracy, check.Report) and not accuracy.passed else 0


def _check(options: argparse.Namespace, device: torch.device, seed: int) -> check.Report | str:
    if "check" in options.skip:
        return "Not checked (--skip check)."
    try:
        result = check.run(device.type if options.device else "auto", seed)
    except check.CheckUnavailable as error:
        message = f"The kernels cannot be checked here: {error}."
        print(message)
        return message
    print("\n" + check.table(result), flush=True)
    return result


def _config(
    options: argparse.Namespace, device: torch.device, checkpoint: Path
) -> tuple[train.Config, dict[str, Any] | None]:
    """What to train, and with --resume the contents of the checkpoint, which has the say then."""
    asked = {"hidden_size": options.hidden_size, "batch": options.batch, "seed": options.seed}
    given = {name: value for name, value in asked.items() if value is not None}
    if options.resume:
        config, data = train.load_checkpoint(checkpoint)
        for name, value in given.items():
            if value != getattr(config, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} {value} contradicts {checkpoint}, which was trained with "
                    f"{getattr(config, name)}: leave it out, or run without --resume"
                )
        return config, data
    gpu = device.type == "cuda"
    defaults: dict[str, Any] = {"hidden_size": 512 if gpu else 256, "batch": 128 if gpu else 32}
    return train.Config(**{**defaults, **given}, learning_rate=2e-3 if gpu else 4e-3), None


if __name__ == "__main__":
    sys.exit(main())
