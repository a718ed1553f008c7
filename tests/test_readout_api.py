"""The readout as users and autograd see it: derivatives, torch.compile, function, module, the choice of backend."""

import copy
import pickle

import pytest
import torch
from support import readouts

import lstm_triton
from lstm_triton import SoftmaxReadout, dispatch, functional, operators
from lstm_triton.kernels.config import (
    readout_forward_config,
    readout_rescale_config,
    steps_per_part,
)
from lstm_triton.kernels.inputs import ReadoutInputs, ReadoutOptions


def _by_torch(h, weight, bias=None):
    return torch.softmax(torch.nn.functional.linear(h, weight, bias), -1)


def _fused(h, weight, bias=None):
    return functional.softmax_readout(h, weight, bias, backend="triton")


def _loss(y):
    return (y**2).sum() + (y**3).sum()


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_any_leading_dimensions(backend, leading, device):
    _, weight, bias = readouts.draw(1, 7, 5, device=device).inputs
    h = torch.randn(*leading, 7, device=device)
    y = functional.softmax_readout(h, weight, bias, backend=backend)
    torch.testing.assert_close(y, _by_torch(h, weight, bias))


def test_leading_dimensions_of_any_strides(device):
    _, weight, bias = readouts.draw(1, 7, 5, device=device).inputs
    h = torch.randn(7, 3, 2, device=device).permute(2, 1, 0).requires_grad_()
    y = _fused(h, weight, bias)
    torch.testing.assert_close(y, _by_torch(h, weight, bias))
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), h), torch.autograd.grad(_by_torch(h, weight, bias).square().sum(), h)
    )


FAULTS = {
    "size of h": lambda h, w, b: (h[:, 1:], w, b),
    "h without dimensions": lambda h, w, b: (h[0, 0], w, b),
    "rank of the weight": lambda h, w, b: (h, w[None], b),
    "size of the bias": lambda h, w, b: (h, w, b[1:]),
    "dtype of the weight": lambda h, w, b: (h, w.double(), b),
    "dtype of the bias": lambda h, w, b: (h, w, b.half()),
}


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_raise_what_torch_raises(fault, backend, device):
    arguments = FAULTS[fault](*readouts.draw(3, 7, 5, device=device).inputs)
    with pytest.raises(Exception) as torchs:
        _by_torch(*arguments)
    with pytest.raises(torchs.type):
        functional.softmax_readout(*arguments, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_devices_must_agree(backend, device):
    h, weight, bias = readouts.draw(3, 7, 5, device=device).inputs
    for arguments in ((h, weight.to("meta"), bias), (h, weight, bias.to("meta"))):
        with pytest.raises(RuntimeError, match="same device"):
            functional.softmax_readout(*arguments, backend=backend)


@pytest.mark.parametrize("option", [{"precision": "fp32"}, {"backend": "fastest"}], ids=str)
def test_unknown_options(option, device):
    with pytest.raises(ValueError, match=next(iter(option.values()))):
        functional.softmax_readout(*readouts.draw(3, 7, 5, device=device).inputs, **option)
    with pytest.raises(ValueError, match=next(iter(option.values()))):
        SoftmaxReadout(7, 5, **option)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_autocast(backend, device):
    """The dtypes are those of torch's linear layer and softmax."""
    leaves = [t.requires_grad_() for t in readouts.draw(3, 7, 5, device=device).inputs]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = functional.softmax_readout(*leaves, backend=backend)
        expected = _by_torch(*leaves)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-2)
    for found, true in zip(
        torch.autograd.grad(y[:, 0].sum(), leaves), torch.autograd.grad(expected[:, 0].sum(), leaves)
    ):
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


def test_module_is_torch_linear_and_softmax(device):
    torch.manual_seed(3)
    linear = torch.nn.Linear(7, 5, device=device)
    torch.manual_seed(3)
    readout = SoftmaxReadout(7, 5, device=device)
    h = torch.randn(3, 7, device=device)
    torch.testing.assert_close(
        readout(h), torch.softmax(linear(h), -1), rtol=0, atol=0 if device.type == "cpu" else 1e-6
    )
    torch.nn.init.normal_(linear.weight)
    readout.load_state_dict(linear.state_dict())
    other = torch.nn.Linear(7, 5, device=device)
    other.load_state_dict(readout.state_dict())
    assert torch.equal(other.weight, linear.weight) and torch.equal(other.bias, linear.bias)


def test_module_options(device):
    readout = SoftmaxReadout(7, 5, False, device, torch.float64, precision="tf32x3", backend="triton")
    assert readout.bias is None and readout.weight.dtype == torch.float64
    h = torch.randn(2, 3, 7, dtype=torch.float64, device=device)
    for module in (readout, copy.deepcopy(readout), pickle.loads(pickle.dumps(readout))):
        torch.testing.assert_close(module(h), _by_torch(h, readout.weight))
    text = "in_features=7, out_features=5, bias=False, precision='tf32x3', backend='triton'"
    assert repr(readout) == f"SoftmaxReadout({text})"
    assert repr(SoftmaxReadout(7, 5)) == "SoftmaxReadout(in_features=7, out_features=5, bias=True)"


def test_the_choice_of_backend_is_explained():
    gpu = dispatch.Environment(True, False, (9, 0))
    cpu = dispatch.Environment(True, False, None)
    float32 = torch.float32
    assert dispatch.choose_readout("auto", "cuda", float32, gpu).backend == "triton"
    assert dispatch.choose_readout("auto", "cpu", float32, cpu).backend == "torch"
    assert dispatch.choose_readout("reference", "cuda", float32, gpu).backend == "reference"
    with pytest.raises(RuntimeError, match="interpreter"):
        dispatch.choose_readout("triton", "cpu", float32, cpu)
    with pytest.raises(RuntimeError, match="cuDNN has no such readout"):
        dispatch.choose_readout("cudnn", "cuda", float32, gpu)
    assert (
        "linear layer" in dispatch.choose_readout("auto", "cpu", float32, dispatch.Environment(True, True, None)).reason
    )
    text = lstm_triton.explain(SoftmaxReadout(7, 5, backend="reference"))
    assert text == "SoftmaxReadout(7, 5) on cpu, torch.float32: reference: asked for."


PROBLEMS = [(dtype, "ieee") for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
PROBLEMS += [(torch.float32, "tf32"), (torch.float32, "tf32x3")]


@pytest.mark.parametrize("dtype, precision", PROBLEMS, ids=str)
def test_one_row_of_a_large_vocabulary_fills_the_gpu(dtype, precision):
    B, V, multiprocessors = 1, 128 * 1024, 132
    config = readout_forward_config(B, V, dtype, precision, multiprocessors)
    tiles = -(-V // config.block_v)
    rescale = readout_rescale_config(B, V, config.block_v, multiprocessors)
    assert tiles >= 4 * multiprocessors
    assert -(-tiles // rescale.block_tiles) >= multiprocessors


@pytest.mark.parametrize("tiles", [0, 1, 16, 527, 528, 10**6])
@pytest.mark.parametrize("steps", [0, 1, 7, 8, 1000, 10**6])
def test_parts_of_a_sum(tiles, steps):
    each = steps_per_part(tiles, steps, 132)
    parts = max(-(-steps // each), 1)
    assert parts == 1 or each >= 4, "parts are worth their store"
    assert parts == 1 or tiles * parts <= 2 * 4 * 132, "no more parts than fill the GPU"
    assert tiles * parts >= 132 or each < 8 or steps < 8 or tiles == 0, "enough parts to fill the GPU"
