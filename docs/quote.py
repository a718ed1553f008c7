"""Renew what README.md and docs/*.md quote: the output in each ```console block that starts with `$ python examples/...`, and
the table of errors between the accuracy marks.

`python docs/quote.py` rewrites the pages; with --check it prints what differs and exits with code 1 if anything does.
"""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_ACCURACY = re.compile(
    r"(?<=<!-- accuracy: begin \(written by docs/quote\.py\) -->\n).*?(?=<!-- accuracy: end -->)", re.DOTALL
)
# The order in which a processor's linear algebra library adds moves the errors in float32 and float64 by up to this factor.
SAME_WITHIN = 2
_BLOCK = re.compile(r"^```console\n\$ python (examples/[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def output(command: str) -> str:
    """What `python <command>` prints, run from the root of the repository."""
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"python {command} failed:\n{done.stderr}")
    return as_quoted(done.stdout)


def as_quoted(printed: str) -> str:
    return "".join(line.rstrip() + "\n" for line in printed.splitlines())


def commands(page: str) -> list[str]:
    return [match[1] for match in _BLOCK.finditer(page)]


def accuracy_table() -> str:
    """RMS errors of `lstm-triton check --device cpu`, this package / torch, as a table in Markdown."""
    from lstm_triton import check

    report = check.run("cpu")
    rows = {(row.quantity, row.dtype): f"{row.rms_error:.1e} / {row.torch_rms_error:.1e}" for row in report.rows}
    dtypes = list(dict.fromkeys(row.dtype for row in report.rows))
    lines = [f"| | {' | '.join(dtypes)} |", "|---" * (len(dtypes) + 1) + "|"]
    for quantity in check.QUANTITIES:
        if quantity != "db_hh":  # the same tensor as db_ih
            name = "db" if quantity == "db_ih" else quantity
            lines.append(f"| {name} | {' | '.join(rows[quantity, dtype] for dtype in dtypes)} |")
    return "\n".join(lines) + "\n"


def same_errors(quoted: str, found: str) -> bool:
    """Whether two accuracy tables have the same rows and columns, and errors that only differ as processors do."""
    number = r"\d\.\de[-+]\d\d"
    if re.sub(number, "", quoted) != re.sub(number, "", found):
        return False
    pairs = zip(re.findall(number, quoted), re.findall(number, found))
    return all(float(a) <= SAME_WITHIN * float(b) and float(b) <= SAME_WITHIN * float(a) for a, b in pairs)


def refreshed(page: str) -> str:
    """The page with everything it quotes as it comes out now."""
    page = _BLOCK.sub(lambda match: f"```console\n$ python {match[1]}\n{output(match[1])}```", page)
    return refreshed_accuracy(page)


def refreshed_accuracy(page: str) -> str:
    """The page with its accuracy table, if any, as the check finds it now; left as it is where `same_errors` holds."""
    quoted = _ACCURACY.search(page)
    if quoted is None or same_errors(quoted[0], found := accuracy_table()):
        return page
    return page[: quoted.start()] + found + page[quoted.end() :]


def main() -> int:
    stale = 0
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = refreshed(before)
        if after == before:
            continue
        stale += 1
        if "--check" in sys.argv[1:]:
            lines = before.splitlines(), after.splitlines()
            print("\n".join(difflib.unified_diff(*lines, path.name, "what it prints", lineterm="")))
        else:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} rewritten")
    return int(stale > 0 and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
