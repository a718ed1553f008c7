"""Real text that every machine has: the source files of Python's standard library, as ASCII characters."""

import math
import random
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from lstm_triton.bench.cases import UsageError

CHARACTERS = 128  # all others become "?"
VALIDATION_SHARE = 16  # one file in so many is held out
_LEAST, _MOST = 200_000, 12_000_000  # characters
# Folders that are not the library itself, or hold tables instead of text.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


class Corpus(NamedTuple):
    """Training and held-out text, each a uint8 tensor [N] on the CPU, and the number of files of each."""

    train: torch.Tensor
    validation: torch.Tensor
    files: tuple[int, int]

    def unigram_bits(self) -> float:
        """Return the bits per character of the validation text under the training text's character frequencies."""
        # one added to each count: a character that training lacks must not cost infinitely much
        counts = torch.bincount(self.train.long(), minlength=CHARACTERS).double() + 1
        bits = -(counts / counts.sum()).log() / math.log(2)
        return bits[self.validation.long()].mean().item()


def load(seed: int = 0, folder: Path | None = None) -> Corpus:
    """The standard library's source files, the same for one seed and one version of Python.

    seed: decides which files are held out. folder: where to look instead. Raises UsageError for too little text.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    paths = [path for path in paths if not _SKIPPED.intersection(path.parts)]
    random.Random(seed).shuffle(paths)
    texts: list[str] = []
    for path in paths:
        with suppress(OSError):  # unreadable or vanished: the rest is enough
            texts.append((folder / path).read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, texts)) >= _MOST:
            break
    held_out, rest = texts[::VALIDATION_SHARE], [text for k, text in enumerate(texts) if k % VALIDATION_SHARE]
    train, validation = "\n".join(rest), "\n".join(held_out)
    if min(len(train), 20 * len(validation)) < _LEAST:
        raise UsageError(f"too little Python source in {folder} to train on")
    return Corpus(encode(train), encode(validation), (len(rest), len(held_out)))


def encode(text: str) -> torch.Tensor:
    """The characters of a text, uint8 [N]."""
    return torch.frombuffer(bytearray(text.encode("ascii", errors="replace")), dtype=torch.uint8)
