"""Invent a recurrent cell, train it on text beside the LSTM, and compare bits per character and time.

Run it: python examples/own_cell.py
"""

import math
import time

import torch
from torch import nn

import lstm_triton
from lstm_triton.demo import corpus

device = "cuda" if torch.cuda.is_available() else "cpu"
T, B, H, UPDATES = 32, 32, 64, 40


@lstm_triton.cell(gates="fgo", states="c")
def highway(z, s):
    """Gates coupled as in a highway network, and a linear way around the tanh, which keeps gradients large."""
    f, o = torch.sigmoid(z.f + 1), torch.sigmoid(z.o)
    c = f * s.c + (1 - f) * torch.tanh(z.g)
    return o * torch.tanh(c) + (1 - o) * 0.5 * c, {"c": c}


print(highway.triton_source())  # what the kernels run; on a CPU the function itself does


class Model(nn.Module):
    def __init__(self, characters: int, recurrent: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.recurrent = recurrent
        self.head = nn.Linear(H, characters)

    def forward(self, text, hx):
        y, hx = self.recurrent(self.embedding(text), hx)
        return self.head(y), hx


text = corpus.load()
streams = text.train[: len(text.train) // B * B].view(B, -1).t().long().to(device)  # [steps, B]
for name, make in {
    "the LSTM": lambda: lstm_triton.LSTM(32, H),
    "this cell": lambda: lstm_triton.Recurrent(highway, 32, H),
}.items():
    torch.manual_seed(0)
    model = Model(corpus.CHARACTERS, make()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    hx, bits = None, []
    for update in range(UPDATES):
        if update == 1:
            begin = time.perf_counter()  # the first one may compile
        chunk = streams[update * T : (update + 1) * T + 1]
        logits, hx = model(chunk[:-1], hx)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), chunk[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hx = tuple(state.detach() for state in hx)
        bits.append(loss.item() / math.log(2))
    each = (time.perf_counter() - begin) / (UPDATES - 1)
    print(f"{name}: {bits[0]:.2f} -> {sum(bits[-10:]) / 10:.2f} bits per character, {1e3 * each:.0f} ms an update")
    assert sum(bits[-10:]) / 10 < bits[0] - 1
