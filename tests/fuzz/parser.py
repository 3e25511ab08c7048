"""A parser under test, and the folder for its inputs."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import mutate

Errors = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Parser:
    """What reads bytes.

    read: takes them, and returns or raises one of `refuses`. corpus: valid ones. mutate: damages
    them. share: how many of a run's inputs it gets, against the others' shares.
    """

    name: str
    read: Callable[[bytes], object]
    refuses: Errors
    corpus: Sequence[bytes]
    mutate: mutate.Mutator = mutate.of_json
    share: float = 1.0

    def accepts(self, raw: bytes) -> bool:
        """Whether the parser takes the bytes. Raises any error that it does not document."""
        try:
            self.read(raw)
        except self.refuses:
            return False
        return True

    def damaged(self, chance: random.Random) -> bytes:
        """A damaged input."""
        return self.mutate(chance, self.corpus)


@lru_cache(maxsize=1)
def work_folder() -> Path:
    """The folder for this process's inputs; in memory if possible, as there are many."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fomoe-fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def as_json(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def from_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A parser of a file of that name."""

    def of_bytes(raw: bytes) -> object:
        path = work_folder() / name
        path.write_bytes(raw)
        return read(path)

    return of_bytes
