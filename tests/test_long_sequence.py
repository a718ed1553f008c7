"""More steps than 65,535, where cuDNN and the second dimension of a grid end: launches, offsets, ranges of rebuilt gates."""

import math

import pytest
import torch
from support import layers

from lstm_triton.kernels import interpreter, layer, layer_backward
from lstm_triton.kernels.inputs import (
    LayerGradients,
    LayerInputs,
    LayerOptions,
    LayerSaved,
    Segments,
    split_weights,
)

pytestmark = pytest.mark.long

T = 66_000
EDGE = 4  # steps at either end that are computed where the others are left out
ways = pytest.mark.parametrize("recompute", [False, True], ids=["saved gates", "rebuilt gates"])


class _Launches:
    """Stands for a launcher: writes down its launches by the names of the kernel's parameters; `act` may launch them."""

    def __init__(self, launcher, act=lambda launch, arguments: None):
        self.launcher, self.kernel, self.act = launcher, launcher.kernel, act
        self.grids, self.steps, self.starts, self.states, self.largest = set(), [], [], [], 0

    def __call__(self, grid, config, arguments, **options):
        self.grids.add(grid)
        self.largest = max(self.largest, *(n for n in arguments.values() if isinstance(n, int)))
        self.steps.append((arguments["first_step"], arguments["last_step"]))
        forward = "y_ptr" in arguments
        states = [arguments[name] for name in (("c_in_ptr", "c_out_ptr") if forward else ("dc_in_ptr", "dc_out_ptr"))]
        self.states.append([None if s is None else (s.data_ptr(), s.dtype) for s in states])
        if not forward:
            self.starts.append((arguments["gates_t"], arguments["gates_reverse_t"], len(arguments["gates_ptr"])))
        self.act(lambda: self.launcher(grid, config, arguments, **options), arguments)


def _layer(
    dtype, H, device, monkeypatch, recompute, act=lambda launch, arguments: None, stepwise=True, precision="ieee"
):
    """Forward, and backward for a gradient of y alone: the problem, what they give, and the launches."""
    problem = layers.draw(T, 2, 3, H, 2, dtype, device=device)
    launches = [_Launches(launcher, act) for launcher in (layer._forward, layer_backward._backward)]
    monkeypatch.setattr(layer, "_forward", launches[0])
    monkeypatch.setattr(layer_backward, "_backward", launches[1])
    (directions,) = split_weights(problem.weights, 1, 2)
    inputs = LayerInputs.of(problem.x, problem.hx, directions, Segments())
    options = LayerOptions(precision=precision, stepwise=stepwise, recompute=recompute)
    forward = layer.lstm_layer_forward(inputs, options, save=True)
    backward = layer_backward.lstm_layer_backward(
        LayerGradients(problem.cotangents[0]),
        inputs,
        LayerSaved(forward.y, forward.c, forward.gates),
        {"x", "h0", "c0", "w_ih", "w_hh"},
        options,
    )
    return problem, forward, backward, launches


def _assert_all_steps_in_order(launches, forward_launches, backward_launches):
    for found, n in zip(launches, (forward_launches, backward_launches)):
        assert len(found.steps) == n
        assert [first for first, _ in found.steps] == [0, *(last for _, last in found.steps[:-1])]
        assert found.steps[-1][1] == T
        assert len(found.grids) == 1 and math.prod(*found.grids) <= 4 and found.largest < 2**31
        kept = [state for launch in found.states for state in launch][1:-1]
        assert kept[0::2] == kept[1::2]  # what a launch leaves, the next one takes
        for (first, last), (start, reverse_start, n) in zip(found.steps, found.starts):
            assert start <= T - last and T - first <= start + n
            assert reverse_start <= first and last <= reverse_start + n


@ways
def test_one_launch_of_all_steps(recompute, monkeypatch, device):
    """Backward, 17 units are two programs, which wait for each other. Here nothing is launched."""
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    *_, launches = _layer(torch.float32, 17, device, monkeypatch, recompute, stepwise=False, precision="tf32")
    _assert_all_steps_in_order(launches, 1, 8 if recompute else 1)


@ways
def test_first_and_last_steps_of_a_long_sequence(recompute, monkeypatch, device):
    """All steps but those at the ends are left out; what they would leave is replaced by the initial state, or no gradient."""
    hx = layers.draw(T, 2, 3, 5, 2, torch.float64, device=device).hx

    def at_the_ends(launch, arguments):
        step = arguments["first_step"]
        if step < EDGE or step >= T - EDGE:
            launch()
        if step != T - EDGE - 1:
            return
        for d in range(2):
            if "y_ptr" in arguments:
                t, units = (step, T - 1 - step)[d], slice(5 * d, 5 * d + 5)
                arguments["y_ptr"][t, :, units], arguments["c_ptr"][t, :, units] = hx[0][d], hx[1][d]
                arguments["c_out_ptr"][d] = hx[1][d]
            else:
                arguments["dz_ptr"][(T - 1 - step, step)[d], :, d] = 0
                arguments["dc_out_ptr"][d] = 0

    problem, forward, backward, launches = _layer(torch.float64, 5, device, monkeypatch, recompute, at_the_ends)
    monkeypatch.undo()
    _assert_all_steps_in_order(launches, T, T)
    for steps, d in ((slice(0, EDGE), 0), (slice(T - EDGE, T), 1)):
        dy = problem.cotangents[0][steps]
        nothing = torch.zeros_like(problem.hx[0])
        inputs = [problem.x[steps], *problem.hx, *problem.weights]
        part = layers.by_kernels(problem.with_tensors([*inputs, dy, nothing, nothing]), recompute=recompute)
        part = dict(zip(problem.names, part))
        found = {
            "y": forward.y[steps],
            "h_n": forward.h_n[1 - d],
            "c_n": forward.c_n[1 - d],
            "dx": backward["x"][steps],
        }
        found |= {"dh0": backward["h0"][d], "dc0": backward["c0"][d]}
        for name, result in found.items():
            expected = part[name] if name in ("y", "dx") else part[name][1 - d if name in ("h_n", "c_n") else d]
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_every_step_of_a_long_sequence(device):
    """One launch forward, eight backward; in TF32, which rounds factors to eleven bits. Minutes in the interpreter."""
    problem = layers.draw(T, 1, 1, 1, 1, precision="tf32", device=device)
    found = layers.by_kernels(problem, "triton-persistent", recompute=True)
    tensors = [t.double() for t in (*problem.inputs, *problem.cotangents)]
    truth = layers.by_torch(layers.Problem(tensors[0], tuple(tensors[1:3]), tuple(tensors[3:7]), tuple(tensors[7:])))
    for name, result, true in zip(problem.names, found, truth, strict=True):
        limit = 2**-8 * true.abs().max().item()
        torch.testing.assert_close(result.double(), true, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}")
