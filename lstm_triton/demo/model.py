"""A character language model: this package's LSTM in training, its cell and readout when drawing."""

import torch
from torch import Tensor, nn

from lstm_triton import LSTM, SoftmaxReadout, functional

State = tuple[Tensor, Tensor]


class CharModel(nn.Module):
    """Embedding [V, E] -> LSTM(E, H) -> logits, or the distribution Y_t = softmax(h_t W + b).

    Training gives the LSTM whole texts; drawing steps the fused cell with the LSTM's weights. Logits (for the loss) and Y_t
    (for drawing) come from the same weights, those of the readout.
    """

    def __init__(self, vocabulary_size: int, embedding_size: int, hidden_size: int, backend: str = "auto") -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.lstm = LSTM(embedding_size, hidden_size, backend=backend)
        self.readout = SoftmaxReadout(hidden_size, vocabulary_size)

    def initial_state(self, batch: int) -> State:
        """h and c before the first character, zeros [batch, H]."""
        zeros = self.readout.weight.new_zeros(batch, self.lstm.hidden_size)
        return zeros, zeros.clone()

    def forward(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        """characters [T, B] -> logits [T, B, V] of the character after each, and the state after the last."""
        outputs, (h, c) = self.lstm(self.embedding(characters), (state[0].unsqueeze(0), state[1].unsqueeze(0)))
        logits = nn.functional.linear(outputs, self.readout.weight, self.readout.bias)
        return logits, (h.squeeze(0), c.squeeze(0))

    def step(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        """characters [B] -> Y_t [B, V], the distribution of the next character, and the next state."""
        weights = (getattr(self.lstm, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        state = functional.lstm_cell(self.embedding(characters), state, *weights, backend=self.lstm.backend)
        return self.readout(state[0]), state

    @torch.no_grad()
    def sample(self, prompt: list[int], length: int, seed: int = 0) -> list[int]:
        """The prompt and `length` characters drawn one by one from Y_t."""
        generator, drawn, state = torch.Generator().manual_seed(seed), list(prompt), self.initial_state(1)
        for position in range(len(prompt) + length - 1):
            y, state = self.step(torch.tensor([drawn[position]], device=self.readout.weight.device), state)
            if position + 1 >= len(prompt):
                drawn.append(int(torch.multinomial(y[0].float().cpu(), 1, generator=generator)))
        return drawn
