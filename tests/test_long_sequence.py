"""More steps than 65,535, where cuDNN and the second dimension of a grid end: what is launched, with which ranges, and
what the steps at both ends compute; all of them run on a GPU, in test_gpu_sequence.
"""

import math

import pytest
import torch
from support import layers

from lstm_triton.kernels import layer, layer_backward
from lstm_triton.kernels.inputs import LayerGradients, LayerInputs, LayerOptions, LayerSaved, Segments, split_weights

pytestmark = pytest.mark.long
T = 66_000
EDGE = 3  # steps at either end that are computed where the others are left out


class _Launches:
    """Stands for a launcher: writes down its launches by the names of the kernel's parameters; `act` may launch."""

    def __init__(self, launcher, act):
        self.launcher, self.kernel, self.act = launcher, launcher.kernel, act
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
        self.act(lambda **steps: self.launcher(grid, config, arguments | steps, **options), arguments)


def _run(problem, options, monkeypatch, launches, act=lambda launch, arguments: None):
    """Forward, and backward for a gradient of y alone, of all steps in order, in this number of launches each."""
    recorded = [_Launches(launcher, act) for launcher in (layer._forward, layer_backward._backward)]
    monkeypatch.setattr(layer, "_forward", recorded[0])
    monkeypatch.setattr(layer_backward, "_backward", recorded[1])
    T, (directions,) = len(problem.x), split_weights(problem.weights, 1, 2)
    inputs = LayerInputs.of(problem.x, problem.hx, directions, Segments())
    forward = layer.lstm_layer_forward(inputs, options, save=True)
    saved, needed = LayerSaved(forward.y, forward.c, forward.gates), {"x", "h0", "c0", "w_ih", "w_hh"}
    gradients = LayerGradients(problem.cotangents[0])
    backward = layer_backward.lstm_layer_backward(gradients, inputs, saved, needed, options)

    for found, n in zip(recorded, launches):
        assert len(found.steps) == n
        assert [first for first, _ in found.steps] == [0, *(last for _, last in found.steps[:-1])]
        assert found.steps[-1][1] == T
        assert len(found.grids) == 1 and math.prod(*found.grids) <= 4 and found.largest < 2**31
        kept = found.states[1:-1]
        assert kept[0::2] == kept[1::2]  # what a launch leaves, the next one takes
        for (first, last), (start, reverse_start, n) in zip(found.steps, found.starts):
            assert start <= T - last and T - first <= start + n
            assert reverse_start <= first and last <= reverse_start + n
    return forward, backward


def test_a_launch_for_each_of_all_steps(monkeypatch, device):
    """They know no other number of steps: a few hundred show what many thousands would. Here nothing is launched."""
    problem = layers.draw(300, 2, 3, 17, 2, device=device)
    _run(problem, LayerOptions("tf32", stepwise=True, recompute=True), monkeypatch, (300, 300))


@pytest.mark.parametrize("recompute", [True, False])
def test_first_and_last_steps(recompute, monkeypatch, device):
    """Of the steps between nothing is computed; what they would leave is replaced by the initial state, or no gradient."""
    problem = layers.draw(T, 2, 3, 4, 2, device=device)

    def at_the_ends(launch, arguments):
        forward = "y_ptr" in arguments
        if arguments["first_step"] == 0:
            launch(last_step=EDGE)
        if arguments["last_step"] < T:
            return
        state = (problem.hx[1] if forward else torch.zeros_like(problem.hx[1])).clone()
        for d, t in enumerate((T - EDGE - 1, EDGE) if forward else (EDGE, T - EDGE - 1)):
            if forward:
                for name, initial in zip(("y_ptr", "c_ptr"), problem.hx):
                    arguments[name][t, :, 4 * d : 4 * d + 4] = initial[d]
            else:
                arguments["dz_ptr"][t, :, d] = 0
        launch(first_step=T - EDGE, **{"c_in_ptr" if forward else "dc_in_ptr": state})

    launches = (1, 8 if recompute else 1)
    forward, backward = _run(problem, LayerOptions("ieee", recompute=recompute), monkeypatch, launches, at_the_ends)
    for steps, d in ((slice(0, EDGE), 0), (slice(T - EDGE, T), 1)):
        nothing = torch.zeros_like(problem.hx[0])
        inputs = [problem.x[steps], *problem.hx, *problem.weights, problem.cotangents[0][steps], nothing, nothing]
        part = dict(zip(problem.names, layers.by_torch(problem.with_tensors(inputs))))
        for found, expected in (
            (forward.y[steps], part["y"]),
            (forward.h_n[1 - d], part["h_n"][1 - d]),
            (forward.c_n[1 - d], part["c_n"][1 - d]),
            (backward["x"][steps], part["dx"]),
            (backward["h0"][d], part["dh0"][d]),
            (backward["c0"][d], part["dc0"][d]),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
