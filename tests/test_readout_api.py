"""The readout as users and autograd see it: function, module, autocast, the choice of backend."""

import copy
import itertools
import pickle

import pytest
import torch
from support.aot import KINDS
from support.problems import readouts

import lstm_triton
from lstm_triton import SoftmaxReadout, dispatch, functional, operators
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


FAULTS = {
    "size of h": lambda h, w, b: (h[:, 1:], w, b),
    "h without dimensions": lambda h, w, b: (h[0, 0], w, b),
    "rank of the weight": lambda h, w, b: (h, w[None], b),
    "size of the bias": lambda h, w, b: (h, w, b[1:]),
    "dtype of the weight": lambda h, w, b: (h, w.double(), b),
    "dtype of the bias": lambda h, w, b: (h, w, b.half()),
    "device of the weight": lambda h, w, b: (h, w.to("meta"), b),
    "device of the bias": lambda h, w, b: (h, w, b.to("meta")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_raise_what_torch_raises(fault, device):
    arguments = FAULTS[fault](*readouts.draw(3, 7, 5, device=device).inputs)
    kind, text = RuntimeError, "same device"
    if not fault.startswith("device"):  # of which torch's function may take some
        with pytest.raises(Exception) as torchs:
            _by_torch(*arguments)
        kind, text = torchs.type, None
    with pytest.raises(kind, match=text):
        functional.softmax_readout(*arguments, backend="triton")


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


def test_module_is_torch_linear_and_softmax(device):
    drawn = []
    for kind in (torch.nn.Linear, SoftmaxReadout):
        torch.manual_seed(3)
        drawn.append(kind(7, 5, device=device))
    linear, readout = drawn
    h = torch.randn(3, 7, device=device)
    same = dict(rtol=0, atol=0 if device.type == "cpu" else 1e-6)
    torch.testing.assert_close(readout(h), torch.softmax(linear(h), -1), **same)
    torch.nn.init.normal_(linear.weight)
    readout.load_state_dict(linear.state_dict())
    torch.testing.assert_close(readout(h), torch.softmax(linear(h), -1), **same)


def test_module_options(device):
    readout = SoftmaxReadout(7, 5, False, device, torch.float64, precision="tf32x3", backend="triton")
    assert readout.bias is None and readout.weight.dtype == torch.float64
    h = torch.randn(2, 3, 7, dtype=torch.float64, device=device)
    for module in (readout, copy.deepcopy(readout), pickle.loads(pickle.dumps(readout))):
        torch.testing.assert_close(module(h), _by_torch(h, readout.weight))
    text = "in_features=7, out_features=5, bias=False, precision='tf32x3', backend='triton'"
    assert repr(readout) == f"SoftmaxReadout({text})"
    assert repr(SoftmaxReadout(7, 5)) == "SoftmaxReadout(in_features=7, out_features=5, bias=True)"
    for option in ({"precision": "fp32"}, {"backend": "fastest"}):
        for call in (functional.softmax_readout, lambda *_, **options: SoftmaxReadout(7, 5, **options)):
            with pytest.raises(ValueError, match=next(iter(option))):
                call(h, readout.weight, **option)


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
    text = lstm_triton.explain(SoftmaxReadout(7, 5, backend="reference"))
    assert text == "SoftmaxReadout(7, 5) on cpu, torch.float32: reference: asked for."


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
