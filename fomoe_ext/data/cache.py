"""Texts as token arrays: encoded once into a cache folder, then memory-mapped.

A hash of a text's relative path (and line or row) decides whether it is for training or validation,
so the split is equal on all machines. A cache folder is written under a temporary name and renamed
when it is complete. If it cannot be written, the tokens stay in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fomoe_ext.data.text import FoundTexts, TextUnit, Tokenizer, read_texts
from fomoe_ext.files.atomic import sealed, unsealed
from fomoe_ext.files.json_values import loads

SPLITS = ("train", "val")
_FORMAT = 1  # of the cache; raise it when the encoding changes


def hash64(*parts: object) -> int:
    """A 64-bit hash of the parts as text, equal on all machines."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest unsigned integer type that holds ids below `vocab_size`."""
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class Encoding:
    """How texts are encoded and split."""

    tokenizer: Tokenizer
    text_field: str
    validation_fraction: float
    seq_len: int
    """A split with fewer tokens than one window of this length is too short."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tokens."""
        return np.dtype(token_dtype(self.tokenizer.vocab_size))

    def key(self, found: FoundTexts) -> str:
        """Name of the cache folder for these texts; it changes when a file changes."""
        key = hashlib.sha256()
        for unit in found.units:
            stat = unit.path.stat()
            key.update(repr((str(unit.path), unit.name, unit.split, stat.st_size)).encode())
            key.update(repr(stat.st_mtime_ns).encode())
        how = (_FORMAT, self.tokenizer.fingerprint, self.text_field, self.validation_fraction)
        key.update(repr(how).encode())
        key.update(repr(self.seq_len).encode())
        return key.hexdigest()[:24]


class Encoded(NamedTuple):
    """Tokens and UTF-8 bytes of text by split, and the hash of all tokens. uncached: the folder and
    the reason, if the cache could not be written."""

    tokens: dict[str, np.ndarray]
    num_bytes: dict[str, int]
    content_hash: str
    uncached: tuple[str, str] | None


def encode(
    found: FoundTexts, how: Encoding, cache_dir: str | os.PathLike[str] | None, check: bool
) -> Encoded:
    """The tokens of texts, from the cache if it has them; arguments and errors as of
    `sequences.open_data`."""
    folder = _cache_root(cache_dir) / how.key(found)
    uncached = None
    try:
        if not (folder / "meta.json").exists():
            _fill_cache(folder, found, how)
        counts = _read_counts(folder)
        tokens = {split: _map_tokens(folder, split, counts, how.dtype, check) for split in SPLITS}
    except _Unwritable as problem:
        uncached = str(problem.path), str(problem.error.strerror or problem.error)
        in_memory = lambda split: _SplitWriter(None, how.dtype)
        writers, counts = _encode_splits(in_memory, found, how)
        tokens = {split: _in_memory(writers[split], how.dtype) for split in SPLITS}
    num_bytes = {split: counts[split]["bytes"] for split in SPLITS}
    content = hashlib.sha256("".join(counts[split]["hash"] for split in SPLITS).encode())
    return Encoded(tokens, num_bytes, content.hexdigest(), uncached)


class _Unwritable(Exception):
    """The cache at `path` cannot be written, because of `error`."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(path, error)
        self.path, self.error = path, error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns OSErrors into _Unwritable, to tell errors of the cache from errors of the text."""
    try:
        yield
    except OSError as error:
        raise _Unwritable(path, error) from error


class _SplitWriter:
    """Appends the tokens of texts to the file of a split (None = to memory); counts bytes and
    tokens."""

    def __init__(self, path: Path | None, dtype: np.dtype) -> None:
        self.path = path or Path()
        with _writing(self.path):
            self.file: BinaryIO = io.BytesIO() if path is None else path.open("wb")
        self.dtype = dtype
        self.hash = hashlib.sha256()
        self.tokens = self.bytes = 0

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        packed = np.ascontiguousarray(tokens, dtype=self.dtype)
        with _writing(self.path):
            self.file.write(packed)
        self.hash.update(packed)
        self.tokens += packed.size
        self.bytes += num_bytes

    def close(self) -> dict[str, Any]:
        with _writing(self.path):
            if not isinstance(self.file, io.BytesIO):
                self.file.close()
        return {"tokens": self.tokens, "bytes": self.bytes, "hash": self.hash.hexdigest()}


def _goes_to_validation(name: str, fraction: float) -> bool:
    return hash64("split", name) < fraction * 2**64


def _encode(
    writers: dict[str, _SplitWriter], units: Sequence[TextUnit], how: Encoding, cut_each_text: bool
) -> dict[str, Any]:
    """Encodes all texts into both splits; returns the counts of each split."""
    tokenizer, fraction = how.tokenizer, how.validation_fraction
    for unit in units:
        for name, chunks in read_texts(unit, how.text_field):
            target = "val" if _goes_to_validation(name, fraction) else "train"
            target = unit.split or target
            if cut_each_text and unit.split is None:
                text = "".join(chunks)
                cut = len(text) - round(len(text) * fraction)
                parts = {"train": [text[:cut]], "val": [text[cut:]]}
            else:
                parts = {target: chunks}
            for split, pieces in parts.items():
                for piece in pieces:
                    try:
                        tokens = tokenizer.encode(piece)
                    except ValueError as error:
                        raise ValueError(f"{unit.path} ({name}): {error}") from None
                    writers[split].add(tokens, len(piece.encode()))
                writers[split].add(tokenizer.separator, 0)
    return {split: writer.close() for split, writer in writers.items()}


def _too_short(counts: dict[str, Any], seq_len: int) -> str | None:
    return next((split for split in SPLITS if counts[split]["tokens"] <= seq_len), None)


def _encode_splits(
    make: Callable[[str], _SplitWriter], found: FoundTexts, how: Encoding
) -> tuple[dict[str, _SplitWriter], dict[str, Any]]:
    """Encodes all texts with new writers; returns the writers and the counts of each split."""
    writers: dict[str, _SplitWriter] = {}
    # With few files a split may be empty: then the last part of every text is for validation.
    for cut_each_text in (False, True):
        writers = {split: make(split) for split in SPLITS}
        counts = _encode(writers, found.units, how, cut_each_text)
        if not _too_short(counts, how.seq_len):
            return writers, counts
    short = _too_short(counts, how.seq_len)
    total = sum(counts[split]["tokens"] for split in SPLITS)
    raise ValueError(
        f"data must have at least seq_len + 1 = {how.seq_len + 1} tokens in each split, got "
        f"{counts[short]['tokens']} for {'validation' if short == 'val' else 'training'} "
        f"({total} tokens in {len(found.units)} files, {found.description})"
    )


def _fill_cache(target: Path, found: FoundTexts, how: Encoding) -> None:
    """Encodes into a temporary folder beside `target`, then renames it. Raises _Unwritable."""
    with _writing(target.parent):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"cache_dir {target.parent} must be a folder, or a new one") from None
        temporary = Path(tempfile.mkdtemp(prefix=".encoding-", dir=target.parent))
    make = lambda split: _SplitWriter(temporary / f"{split}.bin", how.dtype)
    try:
        _, counts = _encode_splits(make, found, how)
        with _writing(temporary):
            (temporary / "meta.json").write_text(json.dumps(sealed(counts)), encoding="utf-8")
        try:
            os.rename(temporary, target)
        except OSError as error:
            if target.is_dir() and not (target / "meta.json").exists():
                raise _damaged(target, "no meta.json") from None
            if not target.is_dir():  # otherwise another process was faster: its files are used
                raise _Unwritable(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"token cache {folder} is damaged ({what}): delete it and start again")


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fomoe" / "tokens"


def _read_counts(folder: Path) -> dict[str, Any]:
    """The counts that `_encode` returned when the folder was written."""
    try:
        counts = unsealed(loads((folder / "meta.json").read_bytes()), "meta.json")
        for split in SPLITS:
            for name, kind in (("tokens", int), ("bytes", int), ("hash", str)):
                if type(counts[split][name]) is not kind:
                    raise ValueError(f"{name} of {split}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(folder, "meta.json") from None
    return counts


def _map_tokens(
    folder: Path, split: str, counts: dict[str, Any], dtype: np.dtype, check: bool
) -> np.ndarray:
    path = folder / f"{split}.bin"
    wanted = counts[split]["tokens"] * dtype.itemsize
    whole = path.exists() and path.stat().st_size == wanted
    if whole and check:
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == counts[split]["hash"]
    if not whole:
        raise _damaged(folder, path.name)
    return np.memmap(path, dtype=dtype, mode="r")


def _in_memory(writer: _SplitWriter, dtype: np.dtype) -> np.ndarray:
    assert isinstance(writer.file, io.BytesIO)
    return np.frombuffer(writer.file.getbuffer(), dtype=dtype)
