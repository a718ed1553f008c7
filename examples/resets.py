"""A recurrent policy trained by policy gradient on rollouts in which episodes end and begin: `resets` and `reset_state`.

At the first step of an episode the policy sees a cue, afterwards nothing; each step that it names the cue earns 1. It has to
remember, and at an episode's end it has to forget. A rollout of B environments over T steps cuts through episodes, and every
row resets at steps of its own.

Run it: python examples/resets.py
"""

import torch
from torch import nn

import lstm_triton

device = "cuda" if torch.cuda.is_available() else "cpu"
T, B, CUES, H = 16, 64, 4, 32
torch.manual_seed(0)


class Policy(nn.Module):
    """Observation -> logits of the actions, through an LSTM whose state at an episode's start is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_triton.LSTM(CUES, H, precision="ieee")
        self.h_start, self.c_start = (nn.Parameter(0.1 * torch.randn(1, H)) for _ in range(2))  # [layers, H]
        self.head = nn.Linear(H, CUES)

    def start(self, batch: int):
        return tuple(s[:, None].expand(-1, batch, -1) for s in (self.h_start, self.c_start))

    def forward(self, observations, state, begins):
        """observations [T, B, CUES], the state before them, begins [T, B] -> logits [T, B, CUES], the state after."""
        y, state = self.lstm(observations, state, resets=begins, reset_state=self.start(observations.shape[1]))
        return self.head(y), state


def rollout():
    """Where episodes begin [T, B], the cue of each step's episode [T, B], observations [T, B, CUES]."""
    begins = torch.rand(T, B, device=device) < 0.2
    begins[0] = True
    cues = torch.randint(CUES, (T, B), device=device)
    for t in range(1, T):
        cues[t] = torch.where(begins[t], cues[t], cues[t - 1])
    return begins, cues, nn.functional.one_hot(cues, CUES) * begins[..., None].float()


policy = Policy().to(device)
print(lstm_triton.explain(policy.lstm, segments=True))

# Acting goes step by step, learning takes the whole rollout in one call. Both compute the same.
begins, cues, observations = rollout()
with torch.no_grad():
    state, stepped = policy.start(B), []
    for t in range(T):
        logits, state = policy(observations[t : t + 1], state, begins[t : t + 1])
        stepped.append(logits[0])
    whole, _ = policy(observations, policy.start(B), begins)
torch.testing.assert_close(whole, torch.stack(stepped), rtol=1e-4, atol=1e-5)
print(f"{T} calls of one step equal one call of {T} steps.")

# Nothing passes from one episode to the next: what came before the last reset has no gradient.
observations.requires_grad_()
policy(observations, policy.start(B), begins)[0][-1].sum().backward()
earlier = begins.flip(0).cumsum(0).flip(0) - begins.int() > 0  # steps of episodes that ended before the last step
assert observations.grad[earlier].eq(0).all() and observations.grad[-1].ne(0).any()
assert policy.h_start.grad.ne(0).any() and policy.c_start.grad.ne(0).any()
print("No gradient crosses a reset; the learned start of the episodes has one.")

optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
for update in range(41):
    begins, cues, observations = rollout()
    logits, _ = policy(observations, policy.start(B), begins)
    actions = torch.distributions.Categorical(logits=logits)
    chosen = actions.sample()
    rewards = (chosen == cues).float()
    loss = -((rewards - rewards.mean()) * actions.log_prob(chosen)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if update % 20 == 0:
        print(f"update {update:>3}: reward {rewards.mean():.2f} a step")
assert rewards.mean() > 0.8, "chance is 0.25"
