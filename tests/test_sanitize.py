"""`make sanitize` without compute-sanitizer: its cases run, and it says why it cannot. And a problem of `make sweep`."""

import contextlib
import inspect

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


@pytest.mark.parametrize(
    "missing, faulty, told",
    [
        ("GPU", "", "needs an NVIDIA GPU"),
        ("sanitizer", "", "needs an NVIDIA GPU, and compute-sanitizer"),
        ("", "none", ""),
        ("", "racecheck initcheck", "racecheck, initcheck failed"),
    ],
)
def test_it_runs_the_cases_under_each_tool_or_says_why_not(missing, faulty, told, monkeypatch, tmp_path):
    """With a stand-in for compute-sanitizer that notes how it was called, and finds something with some tools."""
    calls, program = tmp_path / "calls", tmp_path / "bin" / "compute-sanitizer"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "GPU")
    for name, value in dict(PATH="/usr/bin:/bin", CUDA_HOME=tmp_path, CALLS=calls, FAULTY=faulty).items():
        monkeypatch.setenv(name, str(value))
    calls.touch()
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> "$CALLS"\ncase "$FAULTY" in *"$2"*) exit 1;; esac\n'
    )
    program.chmod(0o644 if missing == "sanitizer" else 0o755)
    with pytest.raises(SystemExit, match=f"make sanitize: {told}") if told else contextlib.nullcontext():
        sanitize.main([])
    called = [line.split() for line in calls.read_text().splitlines()]
    assert [words[2] for words in called] == ([] if missing else ["memcheck", "racecheck", "initcheck", "synccheck"])
    for words in called:
        assert words[:2] == ["1", "--tool"] and words[-1] == "--cases"
        assert words[words.index("--error-exitcode") + 1] == "1"


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="on compiled code its problems take long")
def test_a_problem_of_the_sweep_is_judged(monkeypatch):
    assert sweep.once(1)[1] is None
    results = segmented.results

    def spoilt(case, drawn, backend, *tensors):
        return [t + (backend != "reference") for t in results(case, drawn, backend, *tensors)]

    monkeypatch.setattr(segmented, "results", spoilt)
    assert sweep.once(1)[1].startswith("inaccurate")
