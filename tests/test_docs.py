"""The documentation is true: links lead somewhere, code runs and prints what is quoted, equations are the code's."""

import functools
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from support.process import run_script

from lstm_triton import check, cli
from lstm_triton.kernels import equations

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text("utf-8")
    for page in [*ROOT.glob("*.md"), *ROOT.rglob("docs/*.md")]
}


def _script(name: str):
    """A script of docs/, imported."""
    path = ROOT / "docs" / name
    spec = importlib.util.spec_from_file_location(path.stem + "_of_docs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


quote = _script("quote.py")
QUOTED = sorted({command for text in PAGES.values() for command in quote.commands(text)})
EXAMPLES = sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py"))


def _anchors(page: str) -> set[str]:
    """The anchors that headings get: lower case, words joined by hyphens, other signs left out."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_pages():
    """Links lead somewhere, nothing names a particular machine, the README is short, and every example is mentioned."""
    folders = r"(?:(?<=[\s`'\"(=:])|^)/(?:home|root|tmp|work|usr|opt|mnt|Users)\b[^\s`]*"
    for page, text in PAGES.items():
        assert not re.findall(folders, text, re.MULTILINE), page
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists() and (not anchor or anchor in _anchors(file.read_text("utf-8"))), (page, target)
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert not [example for example in EXAMPLES if example not in "".join(PAGES.values())]


@pytest.mark.long
@pytest.mark.parametrize("command", QUOTED)
def test_quoted_outputs_are_what_the_commands_print(command):
    printed = quote.as_quoted(run_script(*command.split(), cwd=ROOT))
    for page, text in PAGES.items():
        if f"$ python {command}\n" in text:
            expected = f"```console\n$ python {command}\n{printed}```"
            assert expected in text, f"{page}: `python docs/quote.py` renews what it quotes of\n{printed}"


@pytest.mark.long
@pytest.mark.parametrize("example", sorted(set(EXAMPLES) - {command.split()[0] for command in QUOTED}))
def test_example(example, tmp_path):
    """It finds its own claims true."""
    assert run_script(ROOT / example, cwd=tmp_path), "it prints what it shows"
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


@pytest.mark.long
@pytest.mark.parametrize("page", ["README.md", "docs/exporting.md", "docs/cells.md"])
def test_python_of_a_page(page, tmp_path):
    """In order, as one program."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    if not importlib.util.find_spec("onnxruntime"):
        blocks = [block for block in blocks if "onnxruntime" not in block]
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    assert blocks
    run_script(program, cwd=tmp_path)


@pytest.mark.long
def test_the_check_passes_and_finds_what_the_accuracy_table_says(capsys, monkeypatch):
    """`lstm-triton check` runs the kernels in the interpreter where there is no GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    once = functools.cache(check.run)
    monkeypatch.setattr(check, "run", lambda device, seed=0: once(device, seed))
    assert cli.main(["check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Triton interpreter on the CPU" in printed
    assert "Passed: at most 2 times torch's largest error + 2 ulp and 1.25 times its RMS error" in printed
    page = PAGES["README.md"]
    assert quote.refreshed_accuracy(page) == page, "`python docs/quote.py` renews the table"
    for wrong in ("| h | 5.3e-07", "| h | 5.3e-09", "| c | 5.3e-08"):  # too large, too small, another row
        assert quote.accuracy_table() in quote.refreshed_accuracy(re.sub(r"\| h \| \d\.\de-08", wrong, page))
    assert once.cache_info().misses == 1


# ---- what the pages say of the sources -------------------------------------------------------------------------------


def test_the_picture_is_the_scripts():
    assert (ROOT / "docs/images/launches.svg").read_text(encoding="utf-8") == _script("images/make.py").picture()


def test_the_derivation_has_every_line_of_the_equations():
    derived = {line.strip() for line in PAGES["docs/derivation.md"].splitlines()}
    for function in (equations.gate_activations, equations.lstm_forward, equations.lstm_backward):
        source = inspect.getsource(getattr(function, "fn", function)).split('"""')[2]
        lines = {line.strip() for line in source.splitlines()}
        assert {line for line in lines if not re.match(r"$|return|.* = gate_activations", line)} <= derived


def test_the_table_of_clients_is_the_scripts():
    """Its outcomes are what `make clients` printed; its lines are those of the script."""
    table = PAGES["docs/exporting.md"].partition("<!-- clients: begin")[2].partition("<!-- clients: end")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    cases = _script("../tests/clients.py").CASES
    assert [(row[0], row[-1]) for row in rows[1:]] == [(name, case.__doc__) for name, case in cases.items()]


def test_the_map_of_the_design_is_the_tree():
    page = PAGES["docs/design.md"].partition("## Memory layout")[0]
    drawn = {word for line in page.splitlines() if line.startswith("      ") for word in line[26:].split()}
    folders = ROOT / "kernels", ROOT / "lstm_triton"
    files = {path.stem for folder in folders for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert drawn == files | {"cells/", "demo/"}
