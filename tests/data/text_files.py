"""Files of text for tests of the data, and the texts that a split of it holds."""

from __future__ import annotations

import random
from pathlib import Path

from fomoe_ext.data.sequences import TextData, TokenArray

WORDS = [
    "the",
    "expert",
    "of",
    "a",
    "naïve",
    "façade",
    "北京",
    "Ω",
    "€20",
    "\U0001f642",
    "\t\r\n",
    "",
]


def text_of(seed: int, words: int = 120) -> str:
    """Words with characters of 1 to 4 bytes and both kinds of line end."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)) + f"\n# {seed}\n"


def write_files(folder: Path, count: int = 40, suffix: str = ".txt") -> dict[str, str]:
    texts = {f"{i % 3}/{i:02d}{suffix}": text_of(i) for i in range(count)}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return texts


def texts_in(array: TokenArray) -> list[str]:
    """The texts of a byte-token split, in order."""
    parts = bytes(array.tokens).split(b"\0")
    assert parts.pop() == b""
    return [part.decode() for part in parts]


def all_texts(data: TextData) -> list[str]:
    return sorted(texts_in(data.train) + texts_in(data.val))
