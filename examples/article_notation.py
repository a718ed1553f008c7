"""The LSTM as it is often printed, with one matrix per gate, beside this package's cell and readout.

    X = X_t | H_{t-1}
    f = sigmoid(X W_f + b_f)    u = sigmoid(X W_u + b_u)    r = sigmoid(X W_r + b_r)    X' = tanh(X W_c + b_c)
    C_t = f * C_{t-1} + u * X'
    H_t = r * tanh(C_t)
    Y_t = softmax(H_t W + b)

Run it: python examples/article_notation.py
"""

import torch

import lstm_triton
from lstm_triton import functional

device = "cuda" if torch.cuda.is_available() else "cpu"
p, n, m = 6, 10, 4  # inputs, units, classes
torch.manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device)


W_f, W_u, W_r, W_c = draw(4, p + n, n)
b_f, b_u, b_r, b_c = draw(4, n)
W, b = draw(n, m), draw(m)

cell = lstm_triton.from_gate_matrices(W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c)
print(lstm_triton.explain(cell))

H = C = torch.zeros(3, n, dtype=torch.float64, device=device)
h, c = H, C
for X_t in draw(5, 3, p):
    X = torch.cat((X_t, H), dim=1)
    f = torch.sigmoid(X @ W_f + b_f)
    u = torch.sigmoid(X @ W_u + b_u)
    r = torch.sigmoid(X @ W_r + b_r)
    X_new = torch.tanh(X @ W_c + b_c)
    C = f * C + u * X_new
    H = r * torch.tanh(C)
    Y = torch.softmax(H @ W + b, dim=1)

    h, c = cell(X_t, (h, c))
    y = functional.softmax_readout(h, W.t(), b)  # weights as torch.nn.Linear holds them, [m, n]
    torch.testing.assert_close((h, c, y), (H, C, Y), rtol=1e-12, atol=1e-12)
print("The eight equations and the cell agree over 5 steps to 1e-12.")

for matrix, again in zip((W_f, b_f, W_u, b_u, W_r, b_r, W_c, b_c), lstm_triton.to_gate_matrices(cell)):
    torch.testing.assert_close(again, matrix, rtol=0, atol=0)
print("to_gate_matrices gives the eight matrices and biases back.")
