"""How the suite itself runs."""

import conftest
import pytest


@pytest.mark.parametrize("interpreting, cores, workers", [(True, 16, None), (False, 16, 8), (False, 2, 4)])
def test_a_gpu_is_shared_by_half_as_many_workers_as_cores(interpreting, cores, workers, monkeypatch, pytestconfig):
    monkeypatch.setattr(conftest.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(conftest, "INTERPRETING", interpreting)
    assert conftest.pytest_xdist_auto_num_workers(pytestconfig) == workers


def test_what_uses_the_device_is_marked(request, device):
    assert request.node.get_closest_marker("gpu")


def test_what_does_not_is_not(request):
    assert not request.node.get_closest_marker("gpu")
