"""Swap a model's LSTMs for this package's, train it, and give plain torch back.

Run it: python examples/swap.py
"""

import torch
from torch import nn

import lstm_triton

device = "cuda" if torch.cuda.is_available() else "cpu"


class Tagger(nn.Module):
    """An ordinary model that knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, 5)

    def forward(self, words):
        y, _ = self.lstm(self.embedding(words))
        return self.head(y)


torch.manual_seed(0)
model = Tagger().to(device).eval()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)  # built before the swap: the parameters stay the same objects
words = torch.randint(50, (8, 20), device=device)
tags = words % 5
before = model(words)

lstm_triton.convert(model)  # every nn.LSTM and nn.LSTMCell of the model, in place
assert type(model.lstm) is nn.LSTM  # the class stays
assert "backend='auto'" in repr(model.lstm)
print(lstm_triton.explain(model))

torch.testing.assert_close(model(words), before, rtol=1e-4, atol=1e-4)
print("The converted model gives the same outputs.")

model.train()
losses = []
for _ in range(30):
    loss = nn.functional.cross_entropy(model(words).flatten(0, 1), tags.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0]
print(f"It trains: loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps.")

state = lstm_triton.to_torch(model).state_dict()  # torch's own kernels again
assert repr(model.lstm) == repr(Tagger().lstm)
Tagger().load_state_dict(state)
print("Its state_dict loads into the unchanged model.")
