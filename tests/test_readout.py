"""The readout's kernels where a softmax is special: logits without end, long rows, and which kernels run."""

import pytest
import torch
from support.problems import readouts

from lstm_triton import functional
from lstm_triton.kernels import config as configs
from lstm_triton.kernels import readout, readout_backward, readout_sums


def _of_logits(logits):
    """The readout whose logits, [V], are the bias alone."""
    V = len(logits)
    return functional.softmax_readout(logits.new_zeros(1), logits.new_zeros(V, 1), logits, backend="triton")


@pytest.mark.parametrize("processors", [1, 132])
def test_rows_longer_than_one_step(processors, device, multiprocessors, monkeypatch):
    """Statistics, dots and parts of sums that take several steps: with small steps, or V would have to be large."""
    multiprocessors(processors)
    monkeypatch.setattr(readout, "readout_rescale_config", lambda *_: configs.ReadoutRescaleConfig(1, 1, 2, 2))
    for name, size in (("_BLOCK_V", 16), ("_BLOCK", 16), ("_BLOCK_PARTS", 1)):
        monkeypatch.setattr(readout_sums, name, size)
    problem = readouts.draw(2, 3, 300, device=device)
    readouts.assert_as_accurate_as_torch(readouts.by_kernels(problem), problem)
    rising = 10.0 * torch.arange(300, device=device)
    torch.testing.assert_close(_of_logits(rising), torch.softmax(rising, -1))


LIMITS = {
    "huge": [3e38, -3e38, 2.9e38, 0.0],
    "all huge": [3e38, 3e38],
    "far below zero": [-1e30, -1e30],
    "minus infinity": [-torch.inf, 1.0, -torch.inf, 2.0],
    "a row of minus infinity": [-torch.inf],
    "infinity": [1.0, torch.inf, 2.0],
    "infinity and minus infinity": [torch.inf, -torch.inf],
    "tiles of minus infinity": [-torch.inf] * 130 + [1.0, 2.0, 3.0] + [-torch.inf] * 20,
    "NaN": [1.0, torch.nan, 2.0],
    "nothing but NaN": [torch.nan],
}


@pytest.mark.parametrize("values", LIMITS.values(), ids=LIMITS)
def test_extreme_logits_are_treated_as_by_torch(values, device):
    for V in (40, 150):  # one tile, and several
        logits = torch.tensor(values * V, device=device)[:V]
        torch.testing.assert_close(_of_logits(logits), torch.softmax(logits, -1), equal_nan=True)


def test_masked_columns_get_no_gradient(device):
    problem = readouts.draw(2, 5, 150, device=device)
    problem.inputs[2][60:140] = -torch.inf
    found = readouts.by_kernels(problem)
    for name, result, torchs in zip(problem.names, found, readouts.by_torch(problem)):
        torch.testing.assert_close(result, torchs, msg=lambda text, name=name: f"{name}: {text}")
    assert not found[2][60:140].any() and not found[3][60:140].any()


FORWARD, BACKWARD = ["forward"], ["row_dots", "backward"]


@pytest.mark.parametrize(
    "shape, needed, kernels",
    [
        ((3, 7, 37), "dh dweight dbias", FORWARD + BACKWARD),
        ((3, 7, 37), "dweight", FORWARD + BACKWARD),
        ((3, 7, 130), "dh dweight dbias", [*FORWARD, "rescale", *BACKWARD]),
        ((2, 7, 260), "dh dbias", [*FORWARD, "rescale", *BACKWARD, "sum_parts"]),
    ],
)
def test_launches_compute_what_is_needed(shape, needed, kernels, device, monkeypatch, count_launches):
    outputs, launch = [], readout_backward._backward

    def noting(grid, config, arguments):
        outputs.append([name for name in ("dh", "dweight", "dbias") if arguments[f"{name}_ptr"] is not None])
        launch(grid, config, arguments)

    monkeypatch.setattr(readout_backward, "_backward", noting)
    problem = readouts.draw(*shape, device=device)
    found = readouts.by_kernels(problem, needed.split())
    assert count_launches() == {f"_readout_{name}_kernel": 1 for name in kernels} and outputs == [needed.split()]
    for name, result, expected in zip(problem.names, found, readouts.by_kernels(problem), strict=True):
        assert result is None if name not in ("y", *needed.split()) else torch.equal(result, expected)
