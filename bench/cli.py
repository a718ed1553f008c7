"""`lstm-triton bench`: measure, and show what was measured."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import device as devices
from . import run, schema, store, suites
from .cases import DTYPES, MODES, Task
from .progress import Progress

EPILOG = f"""suites:
{suites.describe()}

examples:
  lstm-triton bench --budget 8m                      the most telling cases first; the same command continues
  lstm-triton bench --suite hidden-sizes --dtype bfloat16 --hidden 512..1024
  lstm-triton bench --device cpu                     {schema.CPU_LABEL}
  lstm-triton bench --report                         only render what is there
  lstm-triton bench --against HEAD~3 --suite cell    two versions of this package
  lstm-triton bench --compare A.jsonl B.jsonl        two GPUs or two commits, side by side
"""


_LONGEST_START_S = 60.0  # a process older than this when a run begins was not started for it
_END_S, _END_S_PER_BYTE = 2.0, 5e-7


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 when lines of files are no rows or a worker does not start, 2 for unusable arguments, 130 after Ctrl-C."""
    begin = time.monotonic()
    if (age := devices.process_age()) < _LONGEST_START_S:
        begin -= age  # a budget counts from the user's Enter, not from here, where torch is imported
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(arguments)
    options.begin = begin
    try:
        return _dispatch(options, arguments)
    except (store.StoreError, UsageError) as error:
        print(f"lstm-triton bench: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"lstm-triton bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured is kept, and the same command continues", file=sys.stderr)
        return 130


class UsageError(ValueError):
    """Arguments that make no sense together, or here."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lstm-triton bench", description="Compare this package with cuDNN and others, on this machine.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--suite", action="append", choices=[*suites.SUITES, "all"], help="may be given again; default: all"
    )
    what.add_argument("--dtype", action="append", choices=DTYPES)
    what.add_argument("--mode", action="append", choices=MODES)
    what.add_argument("--provider", action="append", metavar="NAME", help="--list-providers shows them")
    for name in ("hidden", "batch", "length"):
        what.add_argument(f"--{name}", type=numbers, metavar="N|A..B,...", help=f"only these {name} sizes")
    what.add_argument("--list", action="store_true", help="list the cases in the order of measurement, and stop")
    what.add_argument("--list-providers", action="store_true", help=argparse.SUPPRESS)
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="auto", help="auto (the GPU, if any), cuda, cuda:1, cpu")
    how.add_argument("--budget", type=seconds_of, metavar="8m", help="stop in time: 45s, 8m, 1h")
    how.add_argument(
        "--seconds", type=positive, default=None, help="sampling per provider and case (default 1; CPU 0.5)"
    )
    how.add_argument(
        "--timeout", type=positive, default=180.0, help="seconds of silence after which a kernel counts as hung"
    )
    how.add_argument("--flush-l2", action="store_true", help="write over the L2 cache before each timed call")
    how.add_argument("--threads", type=int, help="of the CPU, for torch")
    how.add_argument("--scale", choices=suites.SCALES, help="sizes; default: gpu on a GPU, cpu on a CPU")
    how.add_argument("--again", action="store_true", help="measure also what has rows already")
    how.add_argument("--retry", action="store_true", help="try what failed or was skipped once more")
    how.add_argument(
        "--output", type=Path, help="folder; default: bench/results/<device>, installed ./lstm-triton-bench/<device>"
    )
    show = parser.add_argument_group("what is shown")
    show.add_argument("--report", nargs="?", const=Path("report.html"), type=Path, metavar="FILE",
                      help="only render rows as one HTML page (default: report.html beside them)")  # fmt: skip
    show.add_argument("--no-report", action="store_true", help="do not render the page after measuring")
    show.add_argument(
        "--readme", type=Path, metavar="FILE", help="only rewrite the tables between the markers of this file"
    )
    show.add_argument(
        "--rows", action="append", type=Path, metavar="PATH", help="files or folders to render; default: --output"
    )
    show.add_argument("--validate", nargs="+", type=Path, metavar="PATH", help="only check files of rows")
    show.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="only compare two files or folders of rows"
    )
    show.add_argument("--against", metavar="REF", help="measure this version and another of its git history, in turns")
    show.add_argument(
        "--tune", action="store_true", help="sweep the launch configurations; prints a table, changes nothing"
    )
    return parser


def numbers(text: str) -> Callable[[int], bool]:
    """A test for "128", "64,128" or "128..1024"."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is neither a number nor a range such as 128..1024")
        low = int(match[1])
        ranges.append((low, int(match[2]) if match[2] else low))
    return lambda n: any(low <= n <= high for low, high in ranges)


def seconds_of(text: str) -> float:
    """45s, 8m, 1h or a number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 45s, 8m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _dispatch(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.validate:
        return _validate(options.validate)
    if options.compare:
        return _compare(options.compare, options.report)
    if options.list_providers:
        from .providers import all_providers

        print("\n".join(all_providers()))
        return 0
    if options.report or options.readme:
        return _render(options)
    device = pick_device(options.device)
    if options.tune:
        from . import tune

        return tune.run(device, options.hidden, options.batch, options.dtype, options.budget)
    tasks = select_tasks(options, device)
    if options.list:
        for task in tasks:
            print(
                f"{task.suite:<13} {task.kind:<11} {'+'.join(task.executions):<12} {task.case.describe()}  {task.case.name}"
            )
        return 0
    run_options = make_options(options, device, command_line(arguments))
    if options.against:
        from . import against

        return against.main(options.against, run_options, tasks)
    if device != "cpu" and not any(task.kind == "roof" for task in tasks):
        tasks = [*suites.tasks(["roofs"], "gpu", "cuda"), *tasks]  # for the floors; measured once
    return _measure(run_options, tasks, options.no_report)


def command_line(arguments: Sequence[str]) -> str:
    """What was typed, for rows: paths that are nobody else's business are left out."""
    kept = []
    hide = False
    for argument in arguments:
        option, is_joined, _ = argument.partition("=")
        joined = is_joined and option in ("--output", "--rows")
        kept.append("..." if hide else f"{option}=..." if joined else argument)
        hide = argument in ("--output", "--rows")
    return " ".join(["lstm-triton bench", *kept])


def pick_device(name: str) -> str:
    """Raises UsageError where there is no such device."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such kind of device") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device {name}: no such NVIDIA GPU here")
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--device {name}: only NVIDIA GPUs and the CPU are measured")
    return name


def select_tasks(options: argparse.Namespace, device: str) -> list[Task]:
    """The tasks of the chosen suites that pass the filters, in order. Raises UsageError when none do."""
    from .providers import all_providers

    unknown = sorted(set(options.provider or ()) - set(all_providers()))
    if unknown:
        raise UsageError(f"--provider {unknown[0]}: known are {', '.join(all_providers())}")
    kind = "cpu" if device == "cpu" else "cuda"
    chosen = options.suite or ["all"]
    chosen = list(suites.SUITES) if "all" in chosen else list(dict.fromkeys(chosen))
    scale = options.scale or ("cpu" if kind == "cpu" else "gpu")
    found = []
    for task in suites.tasks(chosen, scale, kind):
        case = task.case
        filters = (
            not options.dtype or case.dtype in options.dtype,
            not options.mode or case.mode in options.mode,
            options.hidden is None or options.hidden(case.hidden_size),
            options.batch is None or options.batch(case.batch),
            options.length is None or options.length(case.length),
        )
        if task.kind == "roof" or all(filters):
            found.append(task)
    if not found or (all(t.kind == "roof" for t in found) and chosen != ["roofs"]):
        raise UsageError("no case passes these filters; --list shows what there is")
    return found


def make_options(options: argparse.Namespace, device: str, command: str) -> run.Options:
    import torch

    folder = options.output
    if folder is None:
        described = devices.describe(torch.device(device))
        folder = devices.results_folder() / devices.folder_name(described)
    seconds = options.seconds or (0.5 if device == "cpu" else 1.0)
    # What starting took is spent already, and the end wants its moment: the report, by the rows there are, and the exit.
    budget = None
    if options.budget is not None:
        earlier = sum(file.stat().st_size for file in folder.rglob("*.jsonl"))
        at_the_end = _END_S + earlier * _END_S_PER_BYTE
        budget = max(options.budget - (time.monotonic() - options.begin) - at_the_end, 1.0)
    return run.Options(
        folder, device, command, budget, seconds, options.timeout, options.flush_l2,
        tuple(options.provider) if options.provider else None, options.threads, options.again, options.retry,
    )  # fmt: skip


def _measure(options: run.Options, tasks: list[Task], no_report: bool) -> int:
    if options.device == "cpu":
        print(f"{schema.CPU_LABEL}.", flush=True)
    progress = Progress(len(tasks), None if options.budget_s is None else time.monotonic() + options.budget_s)
    outcome = run.Runner(options, tasks, progress, progress.say).run()
    progress.say(run.finish(outcome, options.folder, options.budget_s))
    if not no_report and (outcome.rows or outcome.before):
        from . import report

        path = options.folder / "report.html"
        report.write(path, store.read_all([options.folder]))
        print(f"Report: {path}")
    return 0


def _render(options: argparse.Namespace) -> int:
    from . import readme, report

    paths = options.rows or [options.output or devices.results_folder()]
    found = store.read_all(paths)
    for problem in found.problems:
        print(f"not a row, left out: {problem}", file=sys.stderr)
    if not found.rows:
        raise UsageError(f"no rows in {', '.join(map(str, paths))}: measure first")
    if options.report:
        path = options.report
        if path == Path("report.html"):
            path = (paths[0] if paths[0].is_dir() else paths[0].parent) / path
        report.write(path, found)
        print(f"Report: {path}")
    if options.readme:
        readme.update(options.readme, found.rows)
        print(f"Tables: {options.readme}")
    return 1 if found.problems else 0


def _validate(paths: Sequence[Path]) -> int:
    found = store.read_all(paths)
    for problem in found.problems:
        print(f"not a row: {problem}", file=sys.stderr)
    print(f"{len(found.rows)} good rows, {len(found.problems)} lines that are none")
    return 1 if found.problems else 0


def _compare(paths: Sequence[Path], page: Path | None) -> int:
    from . import compare

    sides = [store.read_all([path]) for path in paths]
    for problem in (p for side in sides for p in side.problems):
        print(f"not a row, left out: {problem}", file=sys.stderr)
    names = [compare.name_of(side.rows, path.stem) for side, path in zip(sides, paths)]
    table = compare.compare(sides[0].rows, sides[1].rows)
    print(compare.text(table, *names))
    if page:
        compare.write(page, table, *names)
        print(f"Report: {page}")
    return 0
