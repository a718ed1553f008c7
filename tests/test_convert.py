"""The article's notation: one matrix for each gate, on X = X_t | H_{t-1}."""

import pytest
import torch

from lstm_triton import LSTMCell, from_gate_matrices, to_gate_matrices

P, N, B = 3, 5, 4  # features, units, rows


def _matrices(dtype=torch.float64, device="cpu", p=P, n=N):
    """W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c."""
    return [torch.randn(shape, dtype=dtype, device=device) for _ in range(4) for shape in ((p + n, n), (n,))]


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
    from lstm_triton.functional import softmax_readout

    matrices = _matrices(device=device)
    W, b = torch.randn(N, 7, dtype=torch.float64, device=device), torch.randn(7, dtype=torch.float64, device=device)
    cell = from_gate_matrices(*matrices)
    cell.backend = backend
    H = C = h = c = torch.zeros(B, N, dtype=torch.float64, device=device)
    for X_t in torch.randn(4, B, P, dtype=torch.float64, device=device):
        H, C, Y = _step(X_t, H, C, *matrices, W, b)
        with torch.no_grad():
            h, c = cell(X_t, (h, c))
            y = softmax_readout(h, W.t(), b, backend=backend)
        for found, expected in ((h, H), (c, C), (y, Y)):
            torch.testing.assert_close(found, expected)


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


def test_from_torchs_cell_and_to_it():
    theirs = torch.nn.LSTMCell(P, N, dtype=torch.float64)
    cell = from_gate_matrices(*to_gate_matrices(theirs))
    x = torch.randn(B, P, dtype=torch.float64)
    torch.testing.assert_close(cell(x), theirs(x))
    no_bias = torch.nn.LSTMCell(P, N, bias=False)
    biases = to_gate_matrices(no_bias)[1::2]
    assert all(torch.equal(b, torch.zeros(N)) for b in biases)
    x = x.float()
    torch.testing.assert_close(from_gate_matrices(*to_gate_matrices(no_bias))(x), no_bias(x))


def test_wrong_shapes_and_ranks():
    assert from_gate_matrices(*_matrices(p=0)).weight_ih.shape == (4 * N, 0)
    good = _matrices()
    wrong = [[t[: N - 1] if t.dim() == 2 else t for t in good], [torch.zeros(())] * 8]
    replaced = [(k, t[:-1]) for k, t in enumerate(good)]
    replaced += [(k, torch.zeros(shape)) for k, shape in ((0, ()), (0, N), (2, (2, P + N, N)), (6, ()), (1, ()))]
    wrong += [[*good[:k], t, *good[k + 1 :]] for k, t in replaced]
    for matrices in wrong:
        with pytest.raises(ValueError, match="four matrices"):
            from_gate_matrices(*matrices)


@pytest.mark.parametrize("index", [0, 3])
def test_mixed_dtypes_and_devices(index):
    for other in (torch.float32, "meta"):
        matrices = _matrices()
        matrices[index] = matrices[index].to(other)
        with pytest.raises(TypeError, match="one dtype and one device"):
            from_gate_matrices(*matrices)
