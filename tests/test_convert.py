"""The article's notation: one matrix for each gate, on X = X_t | H_{t-1}."""

import pytest
import torch

from lstm_triton import LSTMCell, from_gate_matrices, functional, to_gate_matrices

P, N, B = 3, 5, 4  # features, units, rows


def _matrices(dtype=torch.float64, device="cpu", p=P):
    """W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c."""
    return [torch.randn(shape, dtype=dtype, device=device) for _ in range(4) for shape in ((p + N, N), (N,))]


def _step(X_t, H, C, W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c, W, b):
    """The article's eight equations, literally."""

    def sigmoid(x):
        return 1 / (1 + torch.exp(-x))

    X = torch.cat((X_t, H), dim=1)
    f = sigmoid(X @ W_f + b_f)
    u = sigmoid(X @ W_u + b_u)
    r = sigmoid(X @ W_r + b_r)
    X_new = torch.tanh(X @ W_c + b_c)
    C = f * C + u * X_new
    H = r * torch.tanh(C)
    scores = torch.exp(H @ W + b)
    Y = scores / scores.sum(1, keepdim=True)
    return H, C, Y


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_the_articles_equations_are_the_cell_and_the_readout(backend, device):
    matrices = _matrices(device=device)
    W, b = torch.randn(N, 7, dtype=torch.float64, device=device), torch.randn(7, dtype=torch.float64, device=device)
    cell = from_gate_matrices(*matrices)
    cell.backend = backend
    H = C = h = c = torch.zeros(B, N, dtype=torch.float64, device=device)
    for X_t in torch.randn(4, B, P, dtype=torch.float64, device=device):
        H, C, Y = _step(X_t, H, C, *matrices, W, b)
        with torch.no_grad():
            h, c = cell(X_t, (h, c))
            y = functional.softmax_readout(h, W.t(), b, backend=backend)
        torch.testing.assert_close((h, c, y), (H, C, Y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_there_and_back(dtype, device):
    matrices, state = _matrices(dtype, device), torch.get_rng_state()
    cell = from_gate_matrices(*matrices)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(cell) is LSTMCell and (cell.input_size, cell.hidden_size, cell.bias) == (P, N, True)
    assert {p.dtype for p in cell.parameters()} == {dtype} and all(p.requires_grad for p in cell.parameters())
    for found, expected in zip(to_gate_matrices(cell), matrices, strict=True):
        assert found.dtype == dtype and found.device == expected.device and torch.equal(found, expected)
    before = [p.clone() for p in cell.parameters()]
    for t in (*matrices, *to_gate_matrices(cell)):
        t.fill_(9)
    assert all(map(torch.equal, cell.parameters(), before)), "values are copied"


@pytest.mark.parametrize("bias", [True, False])
def test_from_torchs_cell_and_to_it(bias):
    theirs, x = torch.nn.LSTMCell(P, N, bias, dtype=torch.float64), torch.randn(B, P, dtype=torch.float64)
    matrices = to_gate_matrices(theirs)
    assert all(b.any() == bias and b.shape == (N,) for b in matrices[1::2])
    torch.testing.assert_close(from_gate_matrices(*matrices)(x), theirs(x))


def test_matrices_that_do_not_fit():
    good, scalar = _matrices(), torch.zeros(())
    shapes, kinds = (ValueError, "four matrices"), (TypeError, "one dtype and one device")
    wrong = [(k, t[:-1], shapes) for k, t in enumerate(good)]
    wrong += [(k, torch.zeros(shape), shapes) for k, shape in ((0, ()), (0, N), (2, (2, P + N, N)), (6, ()), (1, ()))]
    wrong += [(k, good[k].to(other), kinds) for k in (0, 3) for other in (torch.float32, "meta")]
    calls = [([*good[:k], t, *good[k + 1 :]], error) for k, t, error in wrong]
    calls += [([t[: N - 1] if t.dim() == 2 else t for t in good], shapes), ([scalar] * 8, shapes)]
    calls.append(([t.long() for t in good], (TypeError, "floating-point")))
    for matrices, (error, words) in calls:
        with pytest.raises(error, match=words):
            from_gate_matrices(*matrices)
    assert from_gate_matrices(*_matrices(p=0)).weight_ih.shape == (4 * N, 0)
