"""The candidates of the sequence kernels, over devices, sizes, dtypes: what each must hold to be launched at all."""

import itertools

import pytest
import torch
from support.aot import KINDS

from lstm_triton.kernels.config import cdiv
from lstm_triton.kernels.figures import figures
from lstm_triton.kernels.search import candidates
from lstm_triton.kernels.sequence_config import Problem, exchanged_row
from lstm_triton.kernels.sequence_cost import cost

# SMs, KiB of shared memory, compute capability.
DEVICES = {
    "A100": (108, 163, (8, 0)),
    "RTX 3090": (82, 99, (8, 6)),
    "H100": (132, 227, (9, 0)),
    "B200": (148, 227, (10, 0)),
    "RTX 5090": (170, 99, (12, 0)),
    "a slice of an H100": (14, 227, (9, 0)),
    "one that nobody knows yet": (200, 227, (17, 3)),
}
# Around every tile, and on: odd and even ones, to where no kernel keeps its weights on chip.
UNITS = sorted({1, 9, *range(29, 1600, 314), *(n + k for n in (16, 128, 1536) for k in (-1, 0, 1))})
ROWS = (1, 17, 64, 1024)
WAYS = ("forward", "backward")


def _device(name):
    sms, kib, capability = DEVICES[name]
    return figures(sms, kib * 1024, capability)


@pytest.mark.parametrize("name", DEVICES)
def test_every_candidate_can_be_launched(name):
    device = _device(name)
    for n, ((dtype, precision), way, B, H) in enumerate(itertools.product(KINDS.values(), WAYS, ROWS, UNITS)):
        D = 1 + n % 2  # the units are an odd number, so every other meets both
        problem = Problem(way, B, H, D, dtype, precision)
        found = candidates(problem, device)
        assert len(set(found)) == len(found) and not found[-1].persistent, problem
        for config in found:
            case = problem, config
            if config.persistent:
                full = dtype == torch.float32 and precision != "tf32"  # W_hh is in registers, or all in one program
                assert dtype != torch.float64 and (config.in_band or config.programs == 1 or not full), case
                assert config.programs == 1 or config.programs * config.groups_at_once <= device.sms, case
                assert config.launches == 1 or config.programs * config.groups > device.sms, case
                if way == "forward":  # somebody stores all that is exchanged, padding included
                    assert config.programs * config.block_h >= exchanged_row(H, dtype), case
                if config.launches > 1:
                    assert config.waits and cost(problem, config, device) < cost(problem, found[-1], device), case
                if config.in_band:
                    assert config.waits and config.split_k == config.num_warps, case
                    assert config.block_k * dtype.itemsize == 64, case
                    assert way == "forward" or problem.inner * dtype.itemsize % 16 == 0, case
            assert config.programs * config.block_h >= H > (config.programs - 1) * config.block_h, case
            assert config.groups == cdiv(B, config.block_b) * D, case
            for tile in (config.block_b, config.block_h, config.block_k, config.split_k):
                assert tile & (tile - 1) == 0, case


def test_candidates_come_by_their_cost_and_steps_last():
    problem, device = Problem("forward", 64, 512, 1, torch.bfloat16, "ieee"), _device("H100")
    found = candidates(problem, device)
    persistent = [c for c in found if c.persistent and c.launches == 1]
    costs = [cost(problem, c, device) for c in persistent]
    assert len(costs) > 10 and costs == sorted(costs) and found[: len(costs)] == persistent
    assert {c.num_warps for c in persistent} == {4, 8}
    several = [c for c in found if c.launches > 1]
    assert candidates(problem._replace(stepwise=True), device) == found[len(costs) + len(several) :]
    assert several and found[len(costs) :][: len(several)] == several


@pytest.mark.parametrize("way", WAYS)
def test_large_layers_run_in_one_launch(way):
    """The sweep would also hold if every candidate were one launch per step."""
    for kind, in_one, in_more in (  # H, B
        ("bf16", [(512, 64), (1024, 16), (1536, 1), (1024, 256)], [(2048, 1), (1024, 1024)]),
        ("tf32", [(768, 16)], []),
        ("tf32x3", [(384, 64)], [(768, 64)]),
        ("fp32", [(64, 1), (256, 64)], [(512, 16)]),
        ("fp64", [], [(64, 1)]),
    ):
        for H, B in in_one + in_more:
            first = candidates(Problem(way, B, H, 1, *KINDS[kind]), _device("H100"))[0]
            assert first.persistent == ((H, B) in in_one), (kind, H, B)


def test_gates_have_their_price():
    """Sixteen units of a row for each thread of one program take longer than a barrier between programs."""
    problem = Problem("forward", 16, 128, 1, torch.bfloat16, "ieee")
    assert candidates(problem, _device("H100"))[0].programs > 1


@pytest.mark.parametrize("name", ["H100", "A100"])
def test_smaller_layers_run_in_one_launch_too(name):
    """As docs/design.md says beside the largest."""
    for (dtype, precision), D, B in itertools.product((KINDS["bf16"], KINDS["tf32"]), (1, 2), (16, 64, 256)):
        fits = [
            all(candidates(Problem(way, B, H, D, dtype, precision), _device(name))[0].persistent for way in WAYS)
            for H in range(32, 1601, 96)
        ]
        assert any(fits) and fits == sorted(fits, reverse=True), (dtype, D, B, 32 + 96 * fits.index(False))
