"""Real text that every machine has: the source files of Python's standard library, as numbered characters."""

import math
import random
import sysconfig
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

UNKNOWN = "\ufffd"  # stands for every character outside the vocabulary
VOCABULARY_SIZE = 128
MAX_CHARACTERS = 12_000_000
VALIDATION_SHARE = 16  # one file in so many is held out

# Folders that are not the library itself, or hold tables instead of text.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
_MIN_CHARACTERS = 200_000


class CorpusError(RuntimeError):
    """There is no usable text; the message says where it was looked for."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text as character numbers, each a uint8 tensor [N] on the CPU."""

    train: torch.Tensor
    validation: torch.Tensor
    vocabulary: str  # character number k is vocabulary[k]
    files: tuple[int, int]  # training, validation

    def unigram_bits(self) -> float:
        """Bits per character of the validation text under the training text's character frequencies."""
        # one added to each count: a character that training lacks must not cost infinitely much
        counts = torch.bincount(self.train.long(), minlength=len(self.vocabulary)).double() + 1
        bits = -(counts / counts.sum()).log() / math.log(2)
        return bits[self.validation.long()].mean().item()


def load(seed: int = 0, folder: Path | None = None, vocabulary: str | None = None) -> Corpus:
    """The standard library's source files, the same for one seed and one version of Python.

    Args:
        seed: decides the order of the files and which are held out.
        folder: where to look instead of the standard library.
        vocabulary: that of an earlier run; by default the most frequent characters.

    Raises:
        CorpusError: too little text.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    train, validation = _read(folder, seed)
    if min(sum(map(len, train)), 20 * sum(map(len, validation))) < _MIN_CHARACTERS:
        raise CorpusError(f"too little Python source in {folder} to train on")
    train_text, validation_text = "\n".join(train), "\n".join(validation)
    if vocabulary is None:
        vocabulary = _vocabulary(train_text)
    numbers = encode(train_text, vocabulary), encode(validation_text, vocabulary)
    return Corpus(*numbers, vocabulary, (len(train), len(validation)))


def encode(text: str, vocabulary: str) -> torch.Tensor:
    """Character numbers [N], uint8; characters outside the vocabulary become UNKNOWN, which it must hold."""
    unknown = vocabulary.index(UNKNOWN)
    numbers = defaultdict(lambda: unknown, {ord(char): k for k, char in enumerate(vocabulary)})
    return torch.frombuffer(bytearray(text.translate(numbers).encode("latin-1")), dtype=torch.uint8)


def decode(numbers: list[int], vocabulary: str) -> str:
    """The text of some character numbers."""
    return "".join(vocabulary[k] for k in numbers)


def _read(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    paths = [path for path in paths if not _SKIPPED.intersection(path.parts)]
    random.Random(seed).shuffle(paths)
    train: list[str] = []
    validation: list[str] = []
    total = 0
    for path in paths:
        try:
            text = (folder / path).read_text(encoding="utf-8", errors="replace")
        except OSError:  # unreadable or vanished: the rest is enough
            continue
        part = validation if (len(train) + len(validation)) % VALIDATION_SHARE == 0 else train
        part.append(text)
        total += len(text)
        if total >= MAX_CHARACTERS:
            break
    return train, validation


def _vocabulary(text: str) -> str:
    counts = Counter(text)
    del counts[UNKNOWN]
    ranked = sorted(counts, key=lambda char: (-counts[char], char))
    return UNKNOWN + "".join(ranked[: VOCABULARY_SIZE - 1])
