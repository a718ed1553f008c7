"""Files of rows: appended by single writes, read without losing a good row to a bad one."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import schema

fcntl: Any
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


class StoreError(RuntimeError):
    """A file of rows cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Rows:
    """The good rows of a file, in order, and a sentence for each line that is not one."""

    rows: list[dict[str, Any]]
    problems: list[str]


def read(path: Path) -> Rows:
    """Every good row of `path`; a missing file has none.

    Raises:
        StoreError: the file cannot be opened, or no line of it is a row.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Rows([], [])
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error
    rows, problems = [], []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(schema.decode(line.decode("utf-8")))
        except UnicodeDecodeError:
            problems.append(f"{path}:{number}: not text")
        except schema.RowError as error:
            cut = number == len(lines)  # the last line has no newline
            problems.append(f"{path}:{number}: {'cut off: ' if cut else ''}{error}")
    if problems and not rows:
        raise StoreError(f"{path} holds no benchmark rows. First problem: {problems[0]}")
    return Rows(rows, problems)


def read_all(paths: Iterable[Path]) -> Rows:
    """The rows of files and, recursively, of folders.

    Raises:
        StoreError: as `read`; a path that does not exist.
    """
    rows, problems = [], []
    for path in paths:
        if not path.exists():
            raise StoreError(f"{path}: no such file or folder")
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        for file in files:
            found = read(file)
            rows += found.rows
            problems += found.problems
    return Rows(rows, problems)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row: a single write at the end of the file, on the disk before this returns.

    Two processes may append at once. A line that an earlier crash cut off is ended first, so that it spoils no other.
    """
    data = schema.encode(row).encode("utf-8") + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with _locked(handle):
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                data = b"\n" + data
            written = os.write(handle, data)
            if written != len(data):
                raise StoreError(f"{path}: the disk took {written} of {len(data)} bytes")
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(handle: int) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def one_run_at_a_time(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run: two at once would time each other.

    Raises:
        StoreError: another run holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Outside the folder: what lies in it is meant to be committed.
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        handle = os.open(Path(tempfile.gettempdir()) / f"lstm-triton-bench-{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StoreError(
                    f"another benchmark run is writing to {folder}: wait for it, or give --output"
                ) from None
        yield
    finally:
        os.close(handle)  # which also unlocks
