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

    def __init__(self, vocabulary_size: int, embedding_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.lstm = LSTM(embedding_size, hidden_size)
        self.readout = SoftmaxReadout(hidden_size, vocabulary_size)

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """characters [T, B] -> logits [T, B, V] of the character after each, and the state after the last, [1, B, H] each."""
        outputs, state = self.lstm(self.embedding(characters), state)
        return nn.functional.linear(outputs, self.readout.weight, self.readout.bias), state

    def step(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        """characters [B], h and c [B, H] -> Y_t [B, V], the distribution of the next character, and the next state."""
        weights = (getattr(self.lstm, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        state = functional.lstm_cell(self.embedding(characters), state, *weights)
        return self.readout(state[0]), state

    @torch.no_grad()
    def sample(self, prompt: Tensor, length: int, seed: int = 0) -> list[int]:
        """The prompt [N] and `length` characters drawn one by one from Y_t."""
        generator, drawn = torch.Generator().manual_seed(seed), prompt.tolist()
        state = tuple(s[0] for s in self(prompt[:-1, None])[1])
        while len(drawn) < len(prompt) + length:
            y, state = self.step(prompt.new_tensor(drawn[-1:]), state)
            drawn.append(int(torch.multinomial(y[0].float().cpu(), 1, generator=generator)))
        return drawn
