"""`make sanitize` without compute-sanitizer: its cases run, and it says why it cannot."""

import inspect
import json

import pytest
import sanitize
import torch
from conftest import KERNEL_MODULES

KERNELS = {
    name
    for module in KERNEL_MODULES
    for name, value in vars(module).items()
    if name.endswith("_kernel") and hasattr(value, "fn") and not inspect.isfunction(value)
}


@pytest.mark.compiled
@pytest.mark.long
def test_its_cases_launch_every_kernel(device, count_launches):
    sanitize.run_cases(device)
    assert len(KERNELS) >= 6 and KERNELS <= set(count_launches(every=True))


def test_every_kernel_has_a_name_by_which_it_is_selected():
    selected = [option.removeprefix("kns=") for option in sanitize.OPTIONS if option.startswith("kns=")]
    assert all(any(part in name for part in selected) for name in KERNELS)


@pytest.mark.parametrize(
    "has_gpu, arguments, told",
    [
        (False, [], "no NVIDIA GPU here\n"),
        (True, [], "no compute-sanitizer"),
        (True, ["lint"], "lint is none of memcheck"),
    ],
)
def test_it_says_why_it_cannot_run(has_gpu, arguments, told, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"make sanitize: {told}")


@pytest.mark.parametrize("faulty", [(), ("racecheck", "initcheck")], ids=["clean", "faulty"])
def test_it_runs_the_cases_under_each_tool(monkeypatch, capsys, tmp_path, faulty):
    """With a stand-in for compute-sanitizer that notes how it was called, and finds something with some tools."""
    calls = tmp_path / "calls"
    stand_in = tmp_path / "bin" / "compute-sanitizer"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!{sanitize.sys.executable}\n"
        "import json, os, sys\n"
        f"with open({str(calls)!r}, 'a') as file:\n"
        "    print(json.dumps([sys.argv[1:], os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']]), file=file)\n"
        f"sys.exit(sys.argv[2] in {faulty!r})\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.main([]) == (1 if faulty else 0)
    called = [json.loads(line) for line in calls.read_text().splitlines()]
    assert [command[1] for command, _ in called] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    for command, no_caching in called:
        assert command[0] == "--tool" and command[-1] == "--cases" and no_caching == "1"
        assert command[command.index("--error-exitcode") + 1] == "1"
    assert ("racecheck, initcheck failed" if faulty else "nothing found") in capsys.readouterr().out
