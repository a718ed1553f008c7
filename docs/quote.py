"""Keep what the documentation quotes true: run each ```console block that starts with `$ python examples/...` and put its output.

    python docs/quote.py            rewrite README.md and docs/*.md
    python docs/quote.py --check    exit code 1 where a quoted output is not what the command prints
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
            diff = difflib.unified_diff(before.splitlines(), after.splitlines(), path.name, "what it prints", lineterm="")
            print("\n".join(diff))
        else:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} rewritten")
    return int(stale > 0 and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
