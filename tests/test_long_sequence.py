"""More steps than 65,535, where cuDNN and the second dimension of a grid end: what would be launched, and with which ranges.

What such launches compute, test_gpu_sequence shows.
"""

import math

import pytest
from support import layers

from lstm_triton.kernels import interpreter, layer, layer_backward
from lstm_triton.kernels.inputs import LayerGradients, LayerInputs, LayerOptions, LayerSaved, Segments, split_weights

pytestmark = pytest.mark.long
T = 66_000


class _Launches:
    """Stands for a launcher: writes down its launches by the names of the kernel's parameters."""

    def __init__(self, launcher):
        self.kernel = launcher.kernel
        self.grids, self.steps, self.starts, self.states, self.largest = set(), [], [], [], 0

    def __call__(self, grid, config, arguments, **options):
        self.grids.add(grid)
        self.largest = max(self.largest, *(n for n in arguments.values() if isinstance(n, int)))
        self.steps.append((arguments["first_step"], arguments["last_step"]))
        forward = "y_ptr" in arguments
        states = [arguments[name] for name in (("c_in_ptr", "c_out_ptr") if forward else ("dc_in_ptr", "dc_out_ptr"))]
        self.states += [None if s is None else (s.data_ptr(), s.dtype) for s in states]
        if not forward:
            self.starts.append((arguments["gates_t"], arguments["gates_reverse_t"], len(arguments["gates_ptr"])))


@pytest.mark.parametrize("stepwise, recompute", [(False, False), (False, True), (True, True)])
def test_all_steps_are_launched_in_order(stepwise, recompute, monkeypatch, device):
    """Backward, 17 units are two programs, which wait for each other."""
    problem = layers.draw(T, 2, 3, 17, 2, device=device)
    launches = [_Launches(launcher) for launcher in (layer._forward, layer_backward._backward)]
    monkeypatch.setattr(layer, "_forward", launches[0])
    monkeypatch.setattr(layer_backward, "_backward", launches[1])
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    (directions,) = split_weights(problem.weights, 1, 2)
    inputs = LayerInputs.of(problem.x, problem.hx, directions, Segments())
    options = LayerOptions(precision="tf32", stepwise=stepwise, recompute=recompute)
    forward = layer.lstm_layer_forward(inputs, options, save=True)
    saved, needed = LayerSaved(forward.y, forward.c, forward.gates), {"x", "h0", "c0", "w_ih", "w_hh"}
    layer_backward.lstm_layer_backward(LayerGradients(problem.cotangents[0]), inputs, saved, needed, options)

    for found, n in zip(launches, (T, T) if stepwise else (1, 8 if recompute else 1)):
        assert len(found.steps) == n
        assert [first for first, _ in found.steps] == [0, *(last for _, last in found.steps[:-1])]
        assert found.steps[-1][1] == T
        assert len(found.grids) == 1 and math.prod(*found.grids) <= 4 and found.largest < 2**31
        kept = found.states[1:-1]
        assert kept[0::2] == kept[1::2]  # what a launch leaves, the next one takes
        for (first, last), (start, reverse_start, n) in zip(found.steps, found.starts):
            assert start <= T - last and T - first <= start + n
            assert reverse_start <= first and last <= reverse_start + n
