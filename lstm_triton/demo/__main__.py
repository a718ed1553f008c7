"""`python -m lstm_triton.demo`, which `make demo` and `lstm-triton demo` run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lstm_triton import check, environment
from lstm_triton.demo import corpus, report, timing, train

PROMPT = "\ndef "


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; exit code 0, 1 when the accuracy check fails, 2 when it cannot run, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        return _demo(options)
    except (corpus.CorpusError, train.CheckpointError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lstm-triton demo", description="Accuracy, a small language model, timing, a report."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-report"), help="folder for the report and the checkpoint"
    )
    parser.add_argument("--seconds", type=_positive(float), default=60.0, help="training time (default 60)")
    parser.add_argument("--steps", type=_positive(int), help="train for this many updates instead of a time")
    parser.add_argument("--resume", action="store_true", help="continue training from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="default: the GPU, if any")
    # At these sizes a second thread gains little, and costs much more than that where the cores are shared.
    parser.add_argument("--threads", type=_positive(int), default=1, help="CPU threads (default 1)")
    parser.add_argument("--hidden-size", type=_positive(int), help="default: 512 on a GPU, 256 on a CPU")
    parser.add_argument(
        "--batch", type=_positive(int), help="texts read side by side; default: 128 on a GPU, 32 on a CPU"
    )
    parser.add_argument("--skip", nargs="+", choices=("check", "timing"), default=[], help="leave these parts out")
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
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(environment.summary(), flush=True)
    torch.set_num_threads(options.threads)

    accuracy = _check(options, device)
    training = _training(options, device, checkpoint)
    unigram = training.corpus.unigram_bits()
    characters = len(training.corpus.train) + len(training.corpus.validation)
    text = (
        f"Text: {sum(training.corpus.files)} source files of Python's standard library, {characters:,} characters, "
        f"{training.corpus.files[1]} files held out."
    )
    config = training.config
    model = (
        f"Model: LSTM with {config.hidden_size} units, {config.batch} texts side by side, "
        f"gradients through {config.steps} steps, on the {'GPU' if device.type == 'cuda' else device.type.upper()}."
    )
    print(f"\n{text}\n{model}\nCharacter frequencies alone: {unigram:.2f} bits per character", flush=True)
    training.run(checkpoint, options.seconds, options.steps)
    again = f"{sys.executable} -m lstm_triton.demo --out {options.out} --resume"
    if training.interrupted:
        print(f"Interrupted after {training.step} updates, saved to {checkpoint}; continue with\n  {again}")
        return 130
    last = training.curve[-1]
    gain = unigram - last.validation_bits
    print(
        f"Validation: {last.validation_bits:.2f} bits per character (training {last.train_bits:.2f}), "
        f"{abs(gain):.2f} {'below' if gain > 0 else 'ABOVE'} character frequencies alone; "
        f"{last.tokens / last.seconds:,.0f} tokens/s\nCheckpoint: {checkpoint} (go on with --resume)"
    )

    vocabulary = training.corpus.vocabulary
    prompt = corpus.encode(PROMPT, vocabulary).tolist()
    sample = corpus.decode(training.model.sample(prompt, 500, config.seed), vocabulary)
    print(f"\nDrawn from Y_t:\n{sample}\n", flush=True)

    timings: timing.TimingReport | str = "Not measured (--skip timing)."
    if "timing" not in options.skip:
        timings = timing.measure(device, seconds=8.0)
        print(timing.table(timings))

    path = options.out / "report.html"
    contents = report.Contents(accuracy, training.curve, unigram, model, text, PROMPT, sample, timings)
    report.write(path, contents)
    print(f"\nReport: {path.resolve()}")
    return 1 if isinstance(accuracy, check.Report) and not accuracy.passed else 0


def _check(options: argparse.Namespace, device: torch.device) -> check.Report | str:
    if "check" in options.skip:
        return "Not checked (--skip check)."
    try:
        result = check.run(device.type if options.device else "auto", options.seed)
    except check.CheckUnavailable as error:
        message = f"The kernels cannot be checked here: {error}."
        print(message)
        return message
    print("\n" + check.table(result), flush=True)
    return result


def _training(options: argparse.Namespace, device: torch.device, checkpoint: Path) -> train.Training:
    if options.resume:
        config, data = train.load_checkpoint(checkpoint)
        training = train.Training(config, corpus.load(config.seed, vocabulary=data["vocabulary"]), device)
        training.restore(data)
        print(f"\nContinuing after {training.step} updates ({checkpoint})")
        return training
    gpu = device.type == "cuda"
    config = train.Config(
        hidden_size=options.hidden_size or (512 if gpu else 256),
        batch=options.batch or (128 if gpu else 32),
        learning_rate=2e-3 if gpu else 4e-3,
        seed=options.seed,
    )
    return train.Training(config, corpus.load(config.seed), device)


if __name__ == "__main__":
    sys.exit(main())
