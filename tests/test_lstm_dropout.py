"""Dropout between the layers of LSTM, and LSTM under autocast."""

import math
import warnings

import pytest
import torch
import torch.utils.checkpoint
from support import philox
from support.lstms import backends, flat, gradients, pair
from torch.fx.experimental.proxy_tensor import make_fx

from lstm_triton import LSTM, layers
from lstm_triton.kernels.dropout import kept

# ---- dropout -----------------------------------------------------------------------------------------------------------

T, B, H = 16, 8, 16
SMALL = 1e-3


def _revealing(p: float, backend: str, device) -> LSTM:
    """Two layers whose output is SMALL times what the second is given, which the first keeps at one value.

    In both i = o = 1 and f = 0 to the last digit, so that h = tanh(tanh(z_g)), where z_g of the first is its bias.
    """
    lstm = LSTM(H, H, 2, dropout=p, dtype=torch.float64, device=device, backend=backend)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        for bias in (lstm.bias_ih_l0, lstm.bias_ih_l1):
            for gate, value in zip(bias.chunk(4), (40.0, -800.0, 0.0, 40.0)):
                gate.fill_(value)
        lstm.bias_ih_l0.chunk(4)[2].fill_(0.5)
        lstm.weight_ih_l1.chunk(4)[2].copy_(SMALL * torch.eye(H))
    return lstm


@backends
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_is_a_scaled_bernoulli_and_so_is_its_backward(p, backend, device):
    lstm = _revealing(p, backend, device)
    x = torch.zeros(T, B, H, dtype=torch.float64, device=device)
    y, (h_n, _) = lstm(x)
    kept = y.abs() > SMALL / 100
    first = math.tanh(math.tanh(0.5))
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], SMALL * first / (1 - p)), rtol=1e-5, atol=0)
    assert not y[~kept].any()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / y.numel())
    for dim in range(3):  # not the same mask for all steps, rows or units
        assert (kept != kept.select(dim, 0).unsqueeze(dim)).any()
    torch.testing.assert_close(h_n[0], torch.full_like(h_n[0], first))
    # dy/db_g of a unit of the first layer counts the kept elements of that unit.
    y.sum().backward()
    slope = SMALL / (1 - p) * (1 - first**2) * (1 - math.tanh(0.5) ** 2)
    torch.testing.assert_close(lstm.bias_ih_l0.grad.chunk(4)[2], slope * kept.double().sum((0, 1)), rtol=1e-5, atol=0)


@pytest.mark.long
@backends
def test_dropout_is_deterministic_per_seed_and_only_in_training(backend, device):
    theirs, lstm = pair(3, 4, 2, dropout=0.5, bidirectional=True, backend=backend, device=device)
    x = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results = flat(lstm(x))
        runs.append([*results, *gradients(results, lstm.parameters())])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0])
    assert torch.equal(runs[0][1][:2], runs[2][1][:2]), "the first layer's state is not dropped"
    torch.testing.assert_close(flat(lstm.eval()(x)), flat(theirs.eval()(x)), rtol=0, atol=1e-12)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 4]), enforce_sorted=False)
    lstm.train()
    torch.manual_seed(1)
    first = flat(lstm(packed))
    torch.manual_seed(1)
    assert all(map(torch.equal, first, flat(lstm(packed))))
    assert not torch.equal(first[0], flat(lstm(packed))[0])


@backends
def test_last_layer_is_not_dropped(backend, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is pointless
        theirs, lstm = pair(3, 4, dropout=0.9, bidirectional=True, backend=backend, device=device)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)
    torch.testing.assert_close(flat(lstm(x)), flat(theirs.eval()(x)), rtol=0, atol=1e-12)


@backends
def test_everything_is_dropped(backend, device):
    _, lstm = pair(3, 4, 2, dropout=1.0, backend=backend, device=device)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    y, (h, c) = lstm(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(h.sum() + c.sum(), x)
    assert gradient.all()


# ---- dropout inside the kernels ------------------------------------------------------------------------------------------


def test_kept_elements_are_those_of_philox(device):
    authors = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    assert philox.philox(0, 0, 0, 0, 0) == authors, "the authors' own test vector"
    seed, p, shape = 0x123456789ABCDEF0, 0.3, (3, 2, 5)
    for number in range(4):
        uniform = philox.uniform(seed, shape, number)
        assert (abs(uniform - p) > 1e-6).all()
        found = kept(torch.tensor([seed], device=device), p, shape, number)
        assert (found.cpu().numpy() == (uniform >= p)).all()


@pytest.fixture
def same_seed(monkeypatch, device):
    monkeypatch.setattr(layers, "random_seed", lambda _: torch.tensor([1], device=device))


def test_the_kernels_drop_without_a_pass_of_their_own(monkeypatch, device):
    """torch's dropout is not called, and what is held from forward to backward is no mask."""
    monkeypatch.setattr(torch.nn.functional, "dropout", None)
    saved = []
    for p in (0.0, 0.5):
        lstm = LSTM(3, 4, 2, dropout=p, bidirectional=True, backend="triton", device=device)
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, h=held: h.setdefault(t.data_ptr(), t), lambda t: t):
            lstm(torch.randn(5, 2, 3, device=device))
        saved.append(sum(t.nbytes for t in held.values()))
    h, seed = 5 * 2 * 2 * 4 * 4, 8
    assert saved[1] == saved[0] + h + seed


@pytest.mark.long
@pytest.mark.parametrize("check, recompute", [(torch.autograd.gradcheck, True), (torch.autograd.gradgradcheck, False)])
def test_derivatives_by_differences(check, recompute, same_seed, device):
    lstm = LSTM(1, 2, 2, dropout=0.4, dtype=torch.float64, backend="triton", recompute=recompute, device=device)
    x = torch.randn(2, 1, 1, dtype=torch.float64, device=device, requires_grad=True)

    def output(x, w):
        return torch.func.functional_call(lstm.requires_grad_(False), {"weight_hh_l0": w}, (x,))[0]

    leaves = [x, lstm.weight_hh_l0.detach().requires_grad_()]
    assert check(output, leaves, fast_mode=True)


@pytest.mark.long
def test_batched_gradients(same_seed, device):
    lstm = LSTM(2, 3, 2, dropout=0.4, dtype=torch.float64, backend="triton", device=device)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    jacobians = [torch.autograd.functional.jacobian(lambda t: lstm(t)[0], x, vectorize=v) for v in (False, True)]
    torch.testing.assert_close(*jacobians)


@pytest.mark.long
@pytest.mark.parametrize("transform", ["jacrev", "grad of grad", "vjp of vjp", "jvp", "jacfwd"])
def test_derivatives_under_torch_func(transform, device):
    """Of a function that sets the seed: the mask is the same under every transform, and is no part of the derivative."""
    lstm = LSTM(2, 3, 2, dropout=0.4, dtype=torch.float64, backend="triton", device=device).requires_grad_(False)
    x, v = torch.randn(2, 3, 2, 2, dtype=torch.float64, device=device)
    func = torch.func

    def loss(x):
        torch.manual_seed(7)
        return (lstm(x)[0] ** 3).sum()

    def eager(x, v=None):
        """Gradient, or with v the product of v and the second derivative."""
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return gradient.detach() if v is None else torch.autograd.grad(gradient, x, v)[0]

    if transform in ("jacrev", "jacfwd"):
        options = {"randomness": "same"} if transform == "jacfwd" else {}
        found, expected = getattr(func, transform)(loss, **options)(x), eager(x)
    elif transform == "jvp":
        found, expected = torch.stack(func.jvp(loss, (x,), (v,))), torch.stack([loss(x), (eager(x) * v).sum()])
    elif transform == "grad of grad":
        found, expected = func.grad(lambda t: (func.grad(loss)(t) * v).sum())(x), eager(x, v)
    else:
        one = torch.ones((), dtype=torch.float64, device=device)
        found, expected = func.vjp(lambda t: func.vjp(loss, t)[1](one)[0], x)[1](v)[0], eager(x, v)
    torch.testing.assert_close(found, expected)


@pytest.mark.long
def test_a_traced_second_derivative_draws_its_mask(device):
    lstm = LSTM(2, 3, 2, dropout=0.4, dtype=torch.float64, backend="triton", device=device)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def second(x):
        (gradient,) = torch.autograd.grad((lstm(x)[0] ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), x)[0]

    traced = make_fx(second)(x)
    runs = []
    for function in (traced, second):
        torch.manual_seed(5)
        runs.append(function(x))
    torch.testing.assert_close(*runs)


def test_a_checkpoint_replays_the_mask(device):
    lstm = LSTM(2, 3, 2, dropout=0.4, backend="triton", device=device)
    x = torch.randn(3, 2, 2, device=device, requires_grad=True)
    runs = []
    for run in (lstm, lambda x: torch.utils.checkpoint.checkpoint(lstm, x, use_reentrant=False)):
        torch.manual_seed(5)
        runs.append(torch.autograd.grad(run(x)[0].square().sum(), [x, *lstm.parameters()]))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_a_probability_set_later_is_checked(p, device):
    lstm = LSTM(2, 3, 2, dropout=0.5, backend="triton", device=device)
    lstm.dropout = p
    with pytest.raises(RuntimeError, match="dropout probability has to be between 0 and 1"):
        lstm(torch.zeros(3, 2, 2, device=device))


def test_a_nan_is_not_dropped(device):
    """As in torch: it would show that something is wrong."""
    lstm = LSTM(2, 3, 2, dropout=0.9, backend="triton", device=device)
    assert lstm(torch.full((3, 2, 2), math.nan, device=device))[0].isnan().all()


def test_under_vmap_each_is_dropped_for_itself(device):
    lstm = LSTM(2, 3, 2, dropout=0.4, backend="triton", device=device)
    x = torch.randn(3, 2, 2, device=device).expand(2, 3, 2, 2)
    with torch.no_grad():
        first, second = torch.func.vmap(lambda t: lstm(t)[0], randomness="different")(x)
    assert not torch.equal(first, second)


# ---- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(dtype, backend, device):
    """Results in the autocast's dtype (bfloat16 stays bfloat16, float64 float64), gradients in the parameters'."""
    lstm = LSTM(3, 4, 2, bidirectional=True, dtype=dtype, device=device, backend=backend)
    x = torch.randn(3, 2, 3, device=device, dtype=dtype, requires_grad=True)
    expected = torch.float64 if dtype == torch.float64 else torch.bfloat16
    hx = torch.randn(2, 4, 2, 4, device=device, dtype=dtype)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 3]), enforce_sorted=False)
    with torch.autocast(device.type, torch.bfloat16):
        calls = [flat(lstm(x)), flat(lstm(x, tuple(hx))), flat(lstm(packed)), flat(lstm(x, return_cell_states=True))]
    for results in calls:
        # torch's own on a CPU keeps the dtype of packed input.
        is_torchs = results is calls[2] and backend == "auto" and device.type == "cpu"
        assert {t.dtype for t in results} == {dtype if is_torchs else expected}
        found = gradients(results, [x, *lstm.parameters()])
        assert all(g.dtype == dtype and g.isfinite().all() and g.any() for g in found)
    exact = LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64, device=device, backend="reference")
    exact.load_state_dict({name: p.double() for name, p in lstm.state_dict().items()})
    for results, truth in zip(calls, (flat(exact(x.double())), flat(exact(x.double(), tuple(hx.double()))))):
        for a, b in zip(results, truth):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=16 * torch.finfo(expected).eps)
