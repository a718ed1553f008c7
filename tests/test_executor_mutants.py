"""A sample of the mutants of `make mutants`: synchronisation taken out of the compiled kernels is missed."""

import re
from pathlib import Path

import pytest
from support import executor
from support.process import run_without_interpreter


@pytest.mark.skipif(executor.why_not() is not None, reason=str(executor.why_not()))
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_missing_synchronisation_is_noticed(target):
    out = run_without_interpreter(Path(__file__).with_name("mutants.py"), "--sample", target, timeout=1200)
    noticed = {kind: int(number) for kind, number in re.findall(r"^([\w ]+): (\d+) noticed$", out, re.MULTILINE)}
    assert noticed["barrier"] >= 10 and noticed["release"] and noticed["acquire"], out
