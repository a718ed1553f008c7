"""The `lstm-triton` command: info, check, tune, bench, demo. Each part is imported only when it runs."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv[1:]) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # tune, bench and demo have parsers of their own, for all arguments after their names.
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    if arguments[:1] == ["demo"]:
        from lstm_triton.demo.__main__ import main as demo

        return demo(arguments[1:])
    if arguments[:1] == ["tune"]:
        from lstm_triton.tune_command import main as tune

        return tune(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.command == "check":
        from lstm_triton import check

        return check.main(["--device", options.device, "--seed", str(options.seed)])
    from lstm_triton.environment import info

    print(info())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lstm-triton", description="A fused LSTM for PyTorch, written in Triton.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | check | tune | bench | demo")
    commands.add_parser("info", help="what this machine offers: GPU, versions, backends")
    check = commands.add_parser("check", help="errors of the fused cell against float64, beside torch's own")
    check.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: the GPU, if any")
    check.add_argument("--seed", type=int, default=0)
    commands.add_parser("tune", help="measure what runs a layer fastest on this GPU, and keep it", add_help=False)
    commands.add_parser("bench", help="the benchmark harness, python -m lstm_triton.bench", add_help=False)
    commands.add_parser("demo", help="accuracy, a small language model, timing, one report", add_help=False)
    return parser


def _bench(arguments: list[str]) -> int:
    if importlib.util.find_spec("lstm_triton.bench.__main__") is None:
        print(
            "lstm-triton bench: this version has no benchmark harness (python -m lstm_triton.bench); "
            "`lstm-triton demo` ends with a short timing.",
            file=sys.stderr,
        )
        return 2
    from lstm_triton.bench.__main__ import main as bench

    return bench(arguments)


if __name__ == "__main__":
    sys.exit(main())
