"""How the suite itself runs."""

import conftest
import pytest


@pytest.mark.parametrize("interpreting, workers", [(True, None), (False, 4)], ids=["interpreter", "GPU"])
def test_a_gpu_is_shared_by_few_workers(interpreting, workers, monkeypatch, pytestconfig):
    monkeypatch.setattr(conftest, "INTERPRETING", interpreting)
    assert conftest.pytest_xdist_auto_num_workers(pytestconfig) == workers
