"""`make sanitize` without compute-sanitizer: its cases run, and it says why it cannot. And a problem of `make sweep`."""

import inspect
import json
import sys

import pytest
import sanitize
import sweep
import torch
from conftest import KERNEL_MODULES
from support import segmented

from lstm_triton.kernels import interpreter

KERNELS = {
    name
    for module in KERNEL_MODULES
    for name, value in vars(module).items()
    if name.endswith("_kernel") and hasattr(value, "fn") and not inspect.isfunction(value)
}


@pytest.mark.compiled
@pytest.mark.long
def test_its_cases_launch_every_kernel_which_is_selected_by_its_name(device, count_launches):
    sanitize.run_cases(device)
    assert len(KERNELS) >= 6 and KERNELS <= set(count_launches(every=True))
    selected = [option.removeprefix("kns=") for option in sanitize.OPTIONS if option.startswith("kns=")]
    assert all(any(part in name for part in selected) for name in KERNELS)


# Stands in for compute-sanitizer: notes how it was called, and finds something with some tools.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([sys.argv[1:], os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]]), file=file)
sys.exit(sys.argv[2] in os.environ["FAULTY"].split())
"""


@pytest.mark.parametrize(
    "arguments, missing, faulty, status, told",
    [
        ([], "GPU", "", 2, "no NVIDIA GPU here\n"),
        ([], "compute-sanitizer", "", 2, "no compute-sanitizer"),
        (["lint"], "", "", 2, "lint is none of memcheck"),
        ([], "", "", 0, "nothing found"),
        ([], "", "racecheck initcheck", 1, "racecheck, initcheck failed"),
    ],
)
def test_it_runs_the_cases_under_each_tool_or_says_why_not(
    arguments, missing, faulty, status, told, monkeypatch, capsys, tmp_path
):
    calls, program = tmp_path / "calls", tmp_path / "bin" / "compute-sanitizer"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "GPU")
    for name, value in dict(PATH="", CUDA_HOME=tmp_path, CALLS=calls, FAULTY=faulty).items():
        monkeypatch.setenv(name, str(value))
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o644 if missing == "compute-sanitizer" else 0o755)
    assert sanitize.main(arguments) == status
    assert f"make sanitize: {told}" in "".join(capsys.readouterr())
    called = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    tools = [] if status == 2 else ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert [command[1] for command, _ in called] == tools
    for command, no_caching in called:
        assert command[0] == "--tool" and command[-1] == "--cases" and no_caching == "1"
        assert command[command.index("--error-exitcode") + 1] == "1"


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="on compiled code its problems take long")
def test_a_problem_of_the_sweep_is_judged(monkeypatch):
    assert sweep.once(1)[1] is None
    results = segmented.results

    def spoilt(case, drawn, backend, *tensors):
        return [t + (backend != "reference") for t in results(case, drawn, backend, *tensors)]

    monkeypatch.setattr(segmented, "results", spoilt)
    assert sweep.once(1)[1].startswith("inaccurate")
