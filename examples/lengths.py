"""A ragged batch by `lengths`, with no sorting and no packing, beside torch's packed sequences.

Run it: python examples/lengths.py
"""

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import lstm_triton

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
torch.backends.cudnn.rnn.fp32_precision = "ieee"  # both sides with full float32 products, to compare closely

lengths = torch.tensor([3, 9, 1, 6])
x = pad_sequence([torch.randn(n, 10) for n in lengths]).to(device)  # [T, B, I]
ours = lstm_triton.LSTM(10, 16, num_layers=2, bidirectional=True, device=device)
theirs = torch.nn.LSTM(10, 16, num_layers=2, bidirectional=True, device=device)
theirs.load_state_dict(ours.state_dict())
print(lstm_triton.explain(ours, segments=True))

y, (h_n, c_n) = ours(x, lengths=lengths)

packed, hidden = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False))
expected, _ = pad_packed_sequence(packed)

torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
torch.testing.assert_close((h_n, c_n), hidden, rtol=1e-5, atol=1e-5)
print("Outputs and last states equal those of the packed sequences:")
for b, n in enumerate(lengths.tolist()):
    assert y[n:, b].eq(0).all()
    print(f"  row {b}: {n} steps, then {len(x) - n} outputs of zero")

y.square().sum().backward()
expected.square().sum().backward()
for a, b in zip(ours.parameters(), theirs.parameters()):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
print("So do the gradients of all weights.")
