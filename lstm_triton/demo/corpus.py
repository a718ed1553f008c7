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
VALIDATION_SHARE = 16  # one file in so many is held out
_LEAST, _MOST = 200_000, 12_000_000  # characters
# Folders that are not the library itself, or hold tables instead of text.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


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

    seed: decides the order of the files and which are held out. folder: where to look instead. vocabulary: that of an earlier
    run; by default the most frequent characters. Raises CorpusError for too little text.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    paths = [path for path in paths if not _SKIPPED.intersection(path.parts)]
    random.Random(seed).shuffle(paths)
    texts: list[str] = []
    for path in paths:
        try:
            texts.append((folder / path).read_text(encoding="utf-8", errors="replace"))
        except OSError:  # unreadable or vanished: the rest is enough
            continue
        if sum(map(len, texts)) >= _MOST:
            break
    validation = texts[::VALIDATION_SHARE]
    train = [text for k, text in enumerate(texts) if k % VALIDATION_SHARE]
    if min(sum(map(len, train)), 20 * sum(map(len, validation))) < _LEAST:
        raise CorpusError(f"too little Python source in {folder} to train on")
    train_text, validation_text = "\n".join(train), "\n".join(validation)
    if vocabulary is None:
        counts = Counter(train_text)
        del counts[UNKNOWN]
        ranked = sorted(counts, key=lambda char: (-counts[char], char))
        vocabulary = UNKNOWN + "".join(ranked[: VOCABULARY_SIZE - 1])
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
