"""`lstm-triton bench`: measure, and show what was measured."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lstm_triton import process

from . import cases, run
from . import device as devices
from .cases import DTYPES, MODES, Task, UsageError, require
from .providers import PROVIDERS
from .rows import CPU_LABEL, read_all

NO_LIBRARY = 3  # exit code where a library of the extra [bench] is missing for what was asked
_LONGEST_START_S = 60.0  # a process older than this when a run begins was not started for it
_END_S, _END_S_PER_BYTE = 6.0, 5e-7  # what the report takes at the end


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. The exit code is 0, or 1 when lines of files are no rows or a worker does not start, 2 for unusable
    arguments, 3 without a library that the output needs, 130 after Ctrl-C."""
    age = process.age_s()
    # A budget counts from the user's Enter, not from here, where torch is imported.
    started = time.monotonic() - (age if age < _LONGEST_START_S else 0.0)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(arguments)
    options.command = command_line(arguments)
    try:
        shows = options.validate or options.compare or options.report or options.readme
        return _show(options) if shows else _measure(options, started)
    except (UsageError, RuntimeError) as error:
        print(f"lstm-triton bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured is kept, and the same command continues", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    about = "\n".join(f"  {name:<12}  {what}" for name, what in cases.SUITES.items())
    epilog = (cases.HERE / "help.txt").read_text(encoding="utf-8")
    epilog = epilog.format(suites=about, providers="\n  ".join(PROVIDERS), CPU_LABEL=CPU_LABEL)
    text, look = "Compare this package with cuDNN and others, on this machine.", argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("lstm-triton bench", epilog=epilog, formatter_class=look, description=text)
    parser.set_defaults(anchors=True)
    what = parser.add_argument_group("what is measured").add_argument
    what("--suite", action="append", choices=[*cases.SUITES, "all"], help="may be given again; default: all")
    what("--dtype", action="append", choices=DTYPES)
    what("--mode", action="append", choices=MODES)
    for name in ("hidden", "batch", "length"):
        what(f"--{name}", type=numbers, metavar="N|A..B,...", help=f"only these {name} sizes")
    what("--scale", choices=list(cases.SIZES), help="sizes; default: gpu on a GPU, cpu on a CPU")
    what("--list", action="store_true", help="list the cases in the order of measurement, and stop")
    how, folders = (
        parser.add_argument_group("how").add_argument,
        "bench/results/<device>, installed ./lstm-triton-bench/",
    )
    how("--device", default="auto", help="auto (the GPU, if any), cuda, cuda:1, cpu")
    how("--output", type=Path, help=f"folder; default: {folders}")
    how("--budget", type=seconds_of, metavar="8m", help="stop in time: 45s, 8m, 1h")
    how("--seconds", type=seconds_of, help="sampling per provider and case (default 1; CPU 0.5)")
    how("--timeout", type=seconds_of, default=180.0, help="seconds of silence after which a kernel counts as hung")
    how("--provider", action="append", metavar="NAME", help="may be given again; listed below")
    how("--flush-l2", action="store_true", help="write over the L2 cache before each timed call")
    how("--threads", type=int, help="of the CPU, for torch")
    how("--again", action="store_true", help="measure also what has rows already")
    how("--retry", action="store_true", help="try what failed or was skipped once more")
    show = parser.add_argument_group("what is shown").add_argument
    page = "only render rows as one HTML page (default: report.html beside them)"
    show("--report", nargs="?", const=Path("report.html"), type=Path, metavar="FILE", help=page)
    show("--no-report", action="store_true", help="do not render the page after measuring")
    show("--readme", type=Path, metavar="FILE", help="only rewrite the tables between the markers of this file")
    show("--rows", action="append", type=Path, metavar="PATH", help="files or folders to render; default: --output")
    show("--validate", nargs="+", type=Path, metavar="PATH", help="only check files of rows")
    show("--compare", nargs=2, type=Path, metavar=("A", "B"), help="only compare two files or folders of rows")
    return parser


def numbers(text: str) -> list[range]:
    """Return the numbers that "128", "64,128" or "128..1024" name."""
    if not re.fullmatch(r"\d+(\.\.\d+)?(,\s*\d+(\.\.\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither numbers nor a range such as 128..1024")
    ranges = [[int(n) for n in part.split("..")] for part in text.split(",")]
    return [range(ends[0], ends[-1] + 1) for ends in ranges]


def seconds_of(text: str) -> float:
    """Return the seconds of "45s", "8m", "1h" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 45s, 8m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def select_tasks(options: argparse.Namespace) -> list[Task]:
    """Return the tasks of the chosen suites that pass the filters, in order. Raises UsageError when none do."""
    unknown = sorted(set(options.provider or ()) - set(PROVIDERS))
    require({f"--provider {', '.join(unknown)}: known are {', '.join(PROVIDERS)}": not unknown}, UsageError)
    chosen = list(cases.SUITES) if "all" in (options.suite or ["all"]) else list(dict.fromkeys(options.suite))

    def passes(task: Task) -> bool:
        c, o = task.case, options
        words = c.dtype in (o.dtype or DTYPES) and c.mode in (o.mode or MODES)
        sizes = (o.hidden, c.hidden_size), (o.batch, c.batch), (o.length, c.length)
        return task.kind == "roof" or (words and all(not given or any(n in of for of in given) for given, n in sizes))

    scale, kind = ("cpu", "cpu") if options.device == "cpu" else ("gpu", "cuda")
    found = list(filter(passes, cases.tasks(chosen, options.scale or scale, kind)))
    some = chosen == ["roofs"] or any(task.kind != "roof" for task in found)
    require({"no case passes these filters; --list shows what there is": some}, UsageError)
    if kind == "cuda" and "roofs" not in chosen:
        return [*cases.tasks(["roofs"], "gpu", "cuda"), *found]  # for the floors; measured once
    return found


def command_line(arguments: Sequence[str]) -> str:
    """Return the command line as typed, for rows, without paths of folders, which are nobody else's business."""
    typed = " ".join(["lstm-triton bench", *(argument.replace(" ", "\0") for argument in arguments)])
    return re.sub(r"(--(?:output|rows))([ =])\S+", r"\1\2...", typed).replace("\0", " ")


def _measure(o: argparse.Namespace, started: float) -> int:
    o.device = devices.pick(o.device)
    tasks = select_tasks(o)
    if o.list:
        for t in tasks:
            print(f"{t.suite:<13} {t.kind:<11} {'+'.join(t.executions):<12} {t.case.describe()}  {t.case.name}")
        return 0
    o.seconds = o.seconds or (0.5 if o.device == "cpu" else 1.0)
    o.output = o.output or devices.results_folder(devices.describe(torch.device(o.device)).name)
    if o.budget is not None:
        # What starting took is spent already, and the end wants its moment: the report, by the rows there are, and the exit.
        at_the_end = _END_S + _END_S_PER_BYTE * sum(file.stat().st_size for file in o.output.rglob("*.jsonl"))
        o.budget = max(o.budget - (time.monotonic() - started) - at_the_end, 1.0)
    if o.device == "cpu":
        print(f"{CPU_LABEL}.", flush=True)
    if absent := run.missing():
        print(f"Rows are written all the same, with {absent}", flush=True)
    runner = run.Runner(o, run.Progress(len(tasks)), run.Worker)
    runner.run(tasks)
    print(runner.describe())
    if not o.no_report and (runner.appended or runner.before) and not run.missing("pandas", "matplotlib", "jinja2"):
        from . import report

        report.write(o.output / "report.html", *read_all([o.output]))
        print(f"Report: {o.output / 'report.html'}")
    return 0


def _show(o: argparse.Namespace) -> int:
    """Do what needs rows alone: check them, compare them, write the report or the tables of a Markdown page."""
    paths = o.validate or o.compare or o.rows or [o.output or devices.results_folder()]
    rows, problems = read_all(paths)
    for problem in problems:
        print(f"not a row, left out: {problem}", file=sys.stderr)
    if o.validate:
        print(f"{len(rows)} good rows, {len(problems)} lines that are none")
        return 1 if problems else 0
    if absent := run.missing("pandas", "matplotlib", "jinja2"):
        print(f"lstm-triton bench: {absent}", file=sys.stderr)
        return NO_LIBRARY
    from . import report

    require({f"no rows in {', '.join(map(str, paths))}: measure first": rows}, UsageError)
    if o.report == Path("report.html"):
        o.report = (paths[0] if paths[0].is_dir() else paths[0].parent) / o.report
    if o.compare:
        print(report.compare([(path, read_all([path])[0]) for path in paths], o.report))
    elif o.report:
        report.write(o.report, rows, problems)
    if o.readme:
        report.update_markdown(o.readme, rows)
    print("\n".join(f"Written: {path}" for path in (o.report, o.readme) if path))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
