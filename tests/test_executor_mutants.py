"""A sample of the mutants of `make mutants`: synchronisation taken out of the compiled kernels is missed."""

import mutants
import pytest
from support import executor

from lstm_triton.kernels import interpreter


@pytest.mark.compiled
@pytest.mark.long
@pytest.mark.skipif(executor.why_not() is not None, reason=str(executor.why_not()))
@pytest.mark.skipif(interpreter.is_interpreting(), reason="a process with TRITON_INTERPRET=1 compiles no kernels")
@pytest.mark.parametrize("target", mutants.TARGETS)
def test_missing_synchronisation_is_noticed(target):
    outcomes = mutants.survey([target], mutants.is_in_sample)
    assert outcomes["barrier", "noticed"] >= 5 and outcomes["release", "noticed"] and outcomes["acquire", "noticed"]
    assert not [kind for kind, outcome in outcomes if outcome == "not noticed"]
