"""Training by a wall-clock budget: truncated backpropagation through time, checkpoints, a clean way out."""

import contextlib
import math
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from lstm_triton.bench.cases import UsageError
from lstm_triton.bench.run import Progress
from lstm_triton.demo.corpus import CHARACTERS, Corpus
from lstm_triton.demo.model import CharModel, State
from lstm_triton.storage import unfinished

_MEASURED_AT = (0.02, 0.05, *(k / 10 for k in range(1, 11)))  # shares of the budget: the loss falls fastest at first
_NATS = math.log(2)  # nats per bit


@dataclass(frozen=True)
class Config:
    """Settings that a run depends on besides time; kept in the checkpoint."""

    hidden_size: int = 256
    embedding_size: int = 64
    batch: int = 32
    steps: int = 64  # characters between two updates, through which gradients flow
    learning_rate: float = 4e-3
    clip: float = 1.0
    seed: int = 0


class Point(NamedTuple):
    """One measurement of the loss curve."""

    step: int
    tokens: int  # a token is a character
    seconds: float
    train_bits: float  # mean since the previous point; NaN before the first update
    validation_bits: float


@dataclass
class Training:
    """A model in training: everything that a checkpoint holds."""

    config: Config
    corpus: Corpus
    device: torch.device
    step: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        c = self.config
        torch.manual_seed(c.seed)
        self.model = CharModel(CHARACTERS, c.embedding_size, c.hidden_size).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=c.learning_rate, betas=(0.9, 0.99))
        self.state: State | None = None
        # [N] -> [N // n, n]: column k is the k-th of n pieces of the text.
        texts = (self.corpus.train, c.batch), (self.corpus.validation, 64)
        pieces = (text[: len(text) // n * n].view(n, -1).t().contiguous() for text, n in texts)
        self._train, self._validation = (columns.to(self.device) for columns in pieces)

    @property
    def tokens(self) -> int:
        return self.step * self.config.batch * self.config.steps

    def run(self, checkpoint: Path, seconds: float, steps: int | None = None) -> None:
        """Train for `seconds` (or `steps` updates), saving to `checkpoint` after each measurement.

        Ctrl-C ends it after the update under way, saved as if the time were up, and sets `interrupted`.
        """
        begin, first = time.perf_counter() - self.seconds, (self.step, self.seconds)
        due, said, losses, progress = list(_MEASURED_AT), "", list[torch.Tensor](), Progress(seconds)
        with contextlib.closing(progress), contextlib.ExitStack() as at_the_end:
            at_the_end.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._interrupt))
            if not self.curve:
                self._measure(math.nan, checkpoint)
            while True:
                share = (self.step - first[0]) / steps if steps else (self.seconds - first[1]) / seconds
                if losses and (share >= due[0] or self.interrupted):
                    point = self._measure(torch.stack(losses).mean().item(), checkpoint)
                    self.seconds = time.perf_counter() - begin
                    said = f"bits/char: train {point.train_bits:.2f}, validation {point.validation_bits:.2f}"
                    progress.say(f"{point.seconds:6.1f} s · {point.tokens:,} tokens · {said}")
                    losses, due = [], [later for later in due if later > share]
                if share >= 1 or self.interrupted:
                    break
                losses.append(self._update())
                self.step, self.seconds = self.step + 1, time.perf_counter() - begin
                progress.done = min(self.seconds - first[1], seconds)
                progress.show(f"{self.tokens / self.seconds:,.0f} tokens/s {said}")

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one interrupts at once

    def _update(self) -> torch.Tensor:
        """Update the weights by the next characters of every stream; return the mean loss in nats, still on the device."""
        T = self.config.steps
        position = (self.step * T) % (self._train.shape[0] - T)
        if position < T:  # the beginning of the text: no memory of its end
            self.state = None
        chunk = self._train[position : position + T + 1].long()
        logits, (h, c) = self.model(chunk[:-1], self.state)
        loss = cross_entropy(logits.flatten(0, 1), chunk[1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.state = h.detach(), c.detach()
        return loss.detach()

    @torch.no_grad()
    def _measure(self, train_loss: float, checkpoint: Path) -> Point:
        """A point of the curve: bits per character on the held-out text; saved."""
        text, total, state = self._validation[:193].long(), 0.0, None
        for x, target in zip(text[:-1].split(128), text[1:].split(128)):
            logits, state = self.model(x, state)
            total += cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
        bits = total / text[1:].numel() / _NATS
        self.curve.append(Point(self.step, self.tokens, self.seconds, train_loss / _NATS, bits))
        self.save(checkpoint)
        return self.curve[-1]

    def save(self, path: Path) -> None:
        """Write a checkpoint of tensors and plain values; at no moment is there half a file under `path`."""
        data = {"config": asdict(self.config), "step": self.step, "seconds": self.seconds, "state": self.state}
        data |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        data |= {"curve": [tuple(point) for point in self.curve]}
        with unfinished(path) as file:
            torch.save(data, file)

    def restore(self, data: dict[str, Any]) -> None:
        """Continue from what `load_checkpoint` read."""
        self.model.load_state_dict(data["model"])
        self.optimizer.load_state_dict(data["optimizer"])
        if state := data["state"]:
            self.state = state[0].to(self.device), state[1].to(self.device)
        self.step, self.seconds = data["step"], data["seconds"]
        self.curve = [Point(*point) for point in data["curve"]]


def load_checkpoint(path: Path) -> tuple[Config, dict[str, Any]]:
    """Return its configuration and contents, plain values and tensors. Raises UsageError where it cannot be read."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        return Config(**data["config"]), data
    except FileNotFoundError:
        raise UsageError(f"no checkpoint at {path}: run once without --resume") from None
    except Exception as error:  # torch reports damage in many ways
        what = f"no checkpoint of this version of the demo ({type(error).__name__}: {error})"
        raise UsageError(f"{path} is {what}: run once without --resume") from error
