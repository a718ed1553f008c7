"""A character language model that steps through this package's cell and draws from its readout."""

import torch
from torch import Tensor, nn

from lstm_triton import LSTMCell, SoftmaxReadout

State = tuple[Tensor, Tensor]


class CharModel(nn.Module):
    """Embedding [V, E] -> LSTMCell(E, H), one call a character -> logits, or the distribution Y_t = softmax(h_t W + b).

    Logits (for the loss) and Y_t (for drawing) come from the same weights, those of the readout.
    """

    def __init__(self, vocabulary_size: int, embedding_size: int, hidden_size: int, backend: str = "auto") -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.cell = LSTMCell(embedding_size, hidden_size, backend=backend)
        self.readout = SoftmaxReadout(hidden_size, vocabulary_size)

    def initial_state(self, batch: int) -> State:
        """h and c before the first character, zeros [batch, H]."""
        weight = self.cell.weight_hh
        zeros = weight.new_zeros(batch, self.cell.hidden_size)
        return zeros, zeros.clone()

    def forward(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        """characters [T, B] -> logits [T, B, V] of the character after each, and the state after the last."""
        outputs = []
        for x in self.embedding(characters).unbind(0):
            state = self.cell(x, state)
            outputs.append(state[0])
        # One product over all steps; the readout's own weights.
        return nn.functional.linear(torch.stack(outputs), self.readout.weight, self.readout.bias), state

    def step(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        """characters [B] -> Y_t [B, V], the distribution of the next character, and the next state."""
        state = self.cell(self.embedding(characters), state)
        return self.readout(state[0]), state

    @torch.no_grad()
    def sample(self, prompt: list[int], length: int, seed: int = 0) -> list[int]:
        """The prompt and `length` characters drawn one by one from Y_t."""
        generator = torch.Generator().manual_seed(seed)
        device = self.cell.weight_hh.device
        state = self.initial_state(1)
        drawn = list(prompt)
        for position in range(len(prompt) + length - 1):
            y, state = self.step(torch.tensor([drawn[position]], device=device), state)
            if position + 1 >= len(prompt):
                drawn.append(int(torch.multinomial(y[0].float().cpu(), 1, generator=generator)))
        return drawn
