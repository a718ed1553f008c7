"""Step an LSTMCell through a sequence, and get what torch.nn.LSTM gives for the whole, gradients included.

Run it: python examples/cell_loop.py
"""

import torch

import lstm_triton

device = "cuda" if torch.cuda.is_available() else "cpu"
T, B, I, H = 12, 4, 10, 16
torch.manual_seed(0)

# Full float32 products on both sides: by default torch.nn.LSTM rounds them to TF32 on a GPU, and cells do not.
torch.backends.cudnn.rnn.fp32_precision = "ieee"
cell = lstm_triton.LSTMCell(I, H, device=device, precision="ieee")
whole = torch.nn.LSTM(I, H, device=device)
whole.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
print(lstm_triton.explain(cell))

x = torch.randn(T, B, I, device=device)
h = c = torch.zeros(B, H, device=device)
outputs = []
for x_t in x:  # on a GPU each step is one launch forward and one backward
    h, c = cell(x_t, (h, c))
    outputs.append(h)
y = torch.stack(outputs)
expected, (h_n, c_n) = whole(x)
torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
torch.testing.assert_close((h, c), (h_n[0], c_n[0]), rtol=1e-5, atol=1e-5)
print(f"{T} steps of the cell equal torch.nn.LSTM on the whole sequence.")

y.square().sum().backward()
expected.square().sum().backward()
for name, weight in cell.named_parameters():
    torch.testing.assert_close(weight.grad, getattr(whole, f"{name}_l0").grad, rtol=1e-4, atol=1e-4)
print("So do the gradients of all weights.")
