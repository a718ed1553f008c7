"""Inputs that no first derivative reads may change between forward and backward, as with torch's cell and linear layer."""

import pytest
import torch

from lstm_triton import GRUCell, LSTMCell, SoftmaxReadout

STEPS = {
    "cell": (LSTMCell, torch.nn.LSTMCell),
    "readout": (SoftmaxReadout, lambda *sizes, **options: torch.nn.Sequential(torch.nn.Linear(*sizes, **options))),
    "gru": (GRUCell, torch.nn.GRUCell),
}
steps = pytest.mark.parametrize("step", STEPS)


def pair(step, device):
    torch.manual_seed(0)
    ours, torchs = STEPS[step]
    ours = ours(2, 3, backend="triton", dtype=torch.float64, device=device)
    torchs = torchs(2, 3, dtype=torch.float64, device=device)
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(ours.parameters()), torchs.parameters())
    return ours, torchs


def outputs(module, x):
    if isinstance(module, torch.nn.Sequential):
        return module(x).softmax(-1)
    found = module(x)
    return torch.cat(found) if isinstance(found, tuple) else found


def gradients_after_a_step(module, x, names):
    """Those of the second of two losses, after a step along the first on the parameters with one of these names."""
    x = x.clone().requires_grad_("weight" not in names)
    first, second = outputs(module, x).square().sum(), outputs(module, x).pow(3).sum()
    first.backward()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if any(n in name for n in names):
                p.sub_(p.grad)
            p.grad = None
    second.backward()
    return [p.grad for p in module.parameters()]


@steps
@pytest.mark.parametrize("names", [("bias",), ("bias", "weight")], ids=str)
def test_a_step_between_forward_and_backward(names, step, device):
    ours, torchs = pair(step, device)
    x = torch.randn(4, 2, dtype=torch.float64, device=device)
    torch.testing.assert_close(*(gradients_after_a_step(module, x, names) for module in (ours, torchs)))


@pytest.mark.parametrize("step", ["cell", "readout"])  # the GRU cell's weights come permuted
def test_what_is_read_may_not_change(step, device):
    """By the first derivative not the weights, by the second nothing."""
    ours, _ = pair(step, device)
    x = torch.randn(4, 2, dtype=torch.float64, device=device, requires_grad=True)
    batch = torch.ones(2, dtype=x.dtype, device=device)
    for dim, options, error in (
        (2, {}, "modified by an inplace operation"),
        (1, {"create_graph": True}, "b.* is at version"),
        (1, {"grad_outputs": batch, "is_grads_batched": True}, "b.* is at version"),
    ):
        loss = outputs(ours, x).square().sum()
        with torch.no_grad():
            next(p for p in ours.parameters() if p.dim() == dim).mul_(2)
        with pytest.raises(RuntimeError, match=error):
            torch.autograd.grad(loss, x, **options)


@steps
def test_inference_tensors_that_are_not_read(step, device):
    ours, torchs = pair(step, device)
    with torch.inference_mode():
        x = torch.randn(4, 2, dtype=torch.float64, device=device)
    found = []
    for module in (ours, torchs):
        biases = [p.requires_grad_(p.dim() == 1) for p in module.parameters()]
        outputs(module, x).square().sum().backward()
        found.append([p.grad for p in biases if p.dim() == 1])
    torch.testing.assert_close(*found)
