"""Every example runs and finds its own claims true; so do the Python blocks of a page, in order, as one program."""

import importlib.util
import re
from pathlib import Path

import pytest
from support.process import run_script

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
QUOTED = {
    name for page in PAGES for name in re.findall(r"^\$ python examples/(\S+)", page.read_text("utf-8"), re.MULTILINE)
}
# Those whose output the documentation quotes run in test_docs.
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.name not in QUOTED]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    assert run_script(example, cwd=tmp_path), "it prints what it shows"
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


@pytest.mark.parametrize("page", ["README.md", "docs/exporting.md", "docs/cells.md"])
def test_python_of_a_page(page, tmp_path):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if not importlib.util.find_spec("onnxruntime"):
        blocks = [block for block in blocks if "onnxruntime" not in block]
    assert blocks
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    run_script(program, cwd=tmp_path)
