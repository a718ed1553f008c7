"""What `functional.lstm` says of arguments that do not fit, before any backend sees them. Segments: test_lstm_segments."""

import pytest
import torch
from support import layers

from lstm_triton import functional

T, B, I, H = 3, 2, 4, 5


# What is changed of a good call: x, hx, weights -> x, hx, weights, options; and the error.
FAULTS = {
    "x of two dimensions": (lambda x, hx, w: (x[0], hx, w, {}), ValueError, "Expected input to be 3D, got 2D"),
    "no steps": (lambda x, hx, w: (x[:0], hx, w, {}), RuntimeError, "sequence length to be larger than 0"),
    "x too wide": (lambda x, hx, w: (x.repeat(1, 1, 2), hx, w, {}), RuntimeError, "input_size. Expected 4, got 8"),
    "one weight": (lambda x, hx, w: (x, hx, w[:1], {}), RuntimeError, "needs w_ih and w_hh"),
    "a vector for w_hh": (lambda x, hx, w: (x, hx, [w[0], w[2]], {}), RuntimeError, "needs w_ih and w_hh"),
    "three weights": (lambda x, hx, w: (x, hx, w[:3], {}), RuntimeError, "weights must be w_ih and w_hh"),
    "a bias too short": (
        lambda x, hx, w: (x, hx, [*w[:3], w[3][1:]], {}),
        RuntimeError,
        r"weights\[3\] must have size",
    ),
    "one state": (lambda x, hx, w: (x, hx[:1], w, {}), RuntimeError, "expects two hidden states"),
    "three states": (lambda x, hx, w: (x, (*hx, hx[0]), w, {}), RuntimeError, "expects two hidden states"),
    "a tensor for states": (lambda x, hx, w: (x, torch.stack(hx), w, {}), TypeError, "tuple of two Tensors"),
    "states of other rows": (lambda x, hx, w: (x, (hx[0][:, :1], hx[1]), w, {}), RuntimeError, r"Expected hidden\[0\]"),
    "a state of another dtype": (
        lambda x, hx, w: (x, (hx[0], hx[1].double()), w, {}),
        RuntimeError,
        r"hx\[1\] must have the same dtype",
    ),
    "a weight on another device": (
        lambda x, hx, w: (x, hx, [*w[:3], w[3].to("meta")], {}),
        RuntimeError,
        "parameter tensor at meta",
    ),
    "unknown precision": (lambda x, hx, w: (x, hx, w, {"precision": "fp8"}), ValueError, "precision must be"),
    "unknown backend": (lambda x, hx, w: (x, hx, w, {"backend": "cuda"}), ValueError, "backend must be"),
    "a row longer than x": (lambda x, hx, w: (x, hx, w, {"lengths": torch.tensor([1, 4])}), ValueError, "lengths"),
}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, backend, device):
    change, error, words = FAULTS[fault]
    problem = layers.draw(T, B, I, H, 1, device=device)
    good = problem.x, problem.hx, list(problem.weights)
    assert functional.lstm(*good, backend=backend)[0].shape == (T, B, H)
    *arguments, options = change(*good)
    with pytest.raises(error, match=words):
        functional.lstm(*arguments, **{"backend": backend} | options)
