"""Renew the outputs that README.md and docs/*.md quote: of each ```console block that starts with `$ python examples/...`.

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
_BLOCK = re.compile(r"^```console\n\$ python (examples/[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def output(command: str) -> str:
    """What `python <command>` prints, run from the root of the repository."""
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"python {command} failed:\n{done.stderr}")
    return "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())


def commands(page: str) -> list[str]:
    return [match[1] for match in _BLOCK.finditer(page)]


def refreshed(page: str) -> str:
    """The page with every quoted output as the command prints it now."""
    return _BLOCK.sub(lambda match: f"```console\n$ python {match[1]}\n{output(match[1])}```", page)


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
