"""The documentation is true: links lead somewhere, quoted outputs are what the commands print, equations are the code's."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from support.process import run_script

from lstm_triton import check, cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def _script(name: str):
    """A script of docs/, imported."""
    path = ROOT / "docs" / name
    spec = importlib.util.spec_from_file_location(path.stem + "_of_docs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


quote = _script("quote.py")


def _anchors(page: str) -> set[str]:
    """The anchors that headings get: lower case, words joined by hyphens, other signs left out."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(file.read_text(encoding="utf-8")), f"{page.name} links to {target}"


@pages
def test_pages_know_no_particular_machine(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?:(?<=[\s`'\"(=:])|^)/(?:home|root|tmp|work|usr|opt|mnt|Users)\b[^\s`]*", text, re.MULTILINE)
    assert not found, found


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.long
@pytest.mark.parametrize("command", sorted({c for p in PAGES for c in quote.commands(p.read_text(encoding="utf-8"))}))
def test_quoted_outputs_are_what_the_commands_print(command):
    printed = quote.as_quoted(run_script(*command.split(), cwd=ROOT))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if f"$ python {command}\n" in text:
            expected = f"```console\n$ python {command}\n{printed}```"
            assert expected in text, f"{page.name}: `python docs/quote.py` renews what it quotes of\n{printed}"


def test_the_picture_is_the_scripts():
    assert (ROOT / "docs/images/launches.svg").read_text(encoding="utf-8") == _script("images/make.py").picture()


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
    for name in (*check.QUANTITIES, "float32", "bfloat16", "float16", "float64"):
        assert name in printed
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- accuracy: begin" in page
    assert quote.refreshed_accuracy(page) == page, "`python docs/quote.py` renews the table"
    assert once.cache_info().misses == 1


def test_what_counts_as_the_same_errors():
    table = "| h | 5.3e-08 / 4.0e-08 |\n"
    assert quote.same_errors(table, table.replace("5.3e-08", "7.1e-08"))
    assert not quote.same_errors(table, table.replace("5.3e-08", "8.1e-08"))
    assert not quote.same_errors(table.replace("5.3e-08", "8.1e-08"), table)
    assert not quote.same_errors(table, table.replace("4.0e-08", "4.0e-09"))
    assert not quote.same_errors(table, table.replace("h", "c")) and not quote.same_errors("", table)


def _functions_of_the_equations() -> dict[str, list[str]]:
    """The lines of each function of equations.py, without its docstring and comments."""
    source = (ROOT / "kernels/equations.py").read_text(encoding="utf-8")
    functions = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            lines = source.splitlines()[code[0].lineno - 1 : node.end_lineno]
            functions[node.name] = [line for line in lines if not line.lstrip().startswith("#")]
    return functions


@pytest.mark.parametrize("function", ["gate_activations", "lstm_forward", "lstm_backward"])
def test_the_derivation_has_every_line_of_the_equations(function):
    text = {line.strip() for line in (ROOT / "docs/derivation.md").read_text(encoding="utf-8").splitlines()}
    for line in map(str.strip, _functions_of_the_equations()[function]):
        if not line.startswith("return") and "gate_activations" not in line:
            assert line in text, f"docs/derivation.md lacks `{line}`"


def test_the_table_of_clients_is_the_scripts():
    """Its outcomes are what `make clients` printed; its lines are those of the script."""
    page = (ROOT / "docs/exporting.md").read_text(encoding="utf-8")
    table = page.partition("<!-- clients: begin")[2].partition("<!-- clients: end")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| ")][1:]
    cases = _script("../tests/clients.py").CASES
    assert [(row[0], row[-1]) for row in rows] == [(name, case.__doc__) for name, case in cases.items()]


def test_every_example_is_named_in_the_documentation():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for example in (ROOT / "examples").glob("*.py"):
        assert f"examples/{example.name}" in text, example.name


def test_the_map_of_the_design_is_the_tree():
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8").partition("## Memory layout")[0]
    drawn = {word for line in page.splitlines() if line.startswith("      ") for word in line[26:].split()}
    folders = ROOT / "kernels", ROOT / "lstm_triton"
    files = {path.stem for folder in folders for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert drawn == files | {"cells/", "demo/"}
