"""The readout as users and autograd see it: leading dimensions, autocast, the use of the GPU. Its module: test_modules."""

import itertools

import pytest
import torch
from support.aot import KINDS
from support.problems import readouts

from lstm_triton import functional, operators
from lstm_triton.kernels.config import readout_forward_config, readout_rescale_config, steps_per_part
from lstm_triton.kernels.inputs import ReadoutInputs, ReadoutOptions


def _by_torch(h, weight, bias=None):
    return torch.softmax(torch.nn.functional.linear(h, weight, bias), -1)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_any_leading_dimensions(backend, leading, device):
    """In any memory order."""
    _, weight, bias = readouts.draw(1, 7, 5, device=device).inputs
    h = torch.randn(7, *leading[::-1], device=device).permute(*range(len(leading), -1, -1)).requires_grad_()
    y, expected = functional.softmax_readout(h, weight, bias, backend=backend), _by_torch(h, weight, bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), h) for t in (y, expected)))


def test_autocast(device):
    """The dtypes are those of torch's linear layer and softmax."""
    leaves = [t.requires_grad_() for t in readouts.draw(3, 7, 5, device=device).inputs]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = functional.softmax_readout(*leaves, backend="triton"), _by_torch(*leaves)
    for found, true in zip(*([y, *torch.autograd.grad(y[:, 0].sum(), leaves)] for y in outputs)):
        assert found.dtype == true.dtype
        torch.testing.assert_close(found, true, rtol=0, atol=2e-2)


def test_float32_results_of_16_bit_inputs(device):
    """What autocast asks for on a GPU: everything but the products in float32, derivatives of any order included."""
    problem = readouts.draw(3, 7, 40, torch.bfloat16, device=device)
    leaves = [t.requires_grad_() for t in problem.inputs]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    dy = torch.randn(3, 40, device=device)
    (y,) = operators.softmax_readout(ReadoutInputs(*leaves), ReadoutOptions(None, torch.float32))
    true = _by_torch(*wide)
    torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-7)
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    first_true = torch.autograd.grad(true, wide, dy.double(), create_graph=True)
    second_true = torch.autograd.grad(sum(g.square().sum() for g in first_true), wide)
    for found, expected in zip((*first, *second), (*first_true, *second_true)):
        assert found.dtype == torch.bfloat16
        assert (found - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_of_a_large_vocabulary_fills_the_gpu(kind):
    B, V, multiprocessors = 1, 128 * 1024, 132
    config = readout_forward_config(B, V, *KINDS[kind], multiprocessors)
    tiles = -(-V // config.block_v)
    rescale = readout_rescale_config(B, V, config.block_v, multiprocessors)
    assert tiles >= 4 * multiprocessors
    assert -(-tiles // rescale.block_tiles) >= multiprocessors


def test_parts_of_a_sum():
    for tiles, steps in itertools.product([0, 1, 16, 527, 528, 10**6], [0, 1, 7, 8, 1000, 10**6]):
        each = steps_per_part(tiles, steps, 132)
        parts = max(-(-steps // each), 1)
        assert parts == 1 or each >= 4, f"parts are worth their store, {tiles=}, {steps=}"
        assert parts == 1 or tiles * parts <= 2 * 4 * 132, f"no more parts than fill the GPU, {tiles=}, {steps=}"
        enough = tiles * parts >= 132 or each < 8 or steps < 8 or tiles == 0
        assert enough, f"enough parts to fill the GPU, {tiles=}, {steps=}"
