"""Text as tokens: from files to memory-mapped token arrays, and from there to training batches.

A text is a file, a line of a .jsonl file or a row of a parquet file. Texts go to training or to
validation by a hash of their relative path (and line or row), so the split is the same on every
machine. Tokens are bytes, or those of a `tokenizers` file. They are encoded once into a cache
folder (under a temporary name, then renamed) and memory-mapped from there.

Batches are rows of an endless stream of windows: each epoch holds every window of `seq_len + 1`
tokens once, in an order drawn from (seed, epoch). A step of N sites with B sequences each takes the
next N * B windows of the stream, site s the s-th B of them. So the sites' data is disjoint, its
union is the batch of one process with N * B sequences, and a position in the stream is all there
is to resume from.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from fomoe_ext.data.text import (
    FoundTexts,
    TextUnit,
    Tokenizer,
    find_texts,
    load_tokenizer,
    read_texts,
)
from fomoe_ext.files.atomic import sealed, unsealed
from fomoe_ext.files.json_values import loads

if TYPE_CHECKING:
    import torch

    from fomoe_ext.config.job import TrainConfig

_FORMAT = 1  # of the cache; raise it when the encoding changes
_SPLITS = ("train", "val")


def _hash(*parts: object) -> int:
    """A 64-bit hash of the parts' text that is the same everywhere."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def _permutation(size: int, *key: object) -> np.ndarray:
    """A permutation of range(size) drawn from the key: int64 [size].

    Sorts by a splitmix64 hash (Steele, Lea, Flood 2014) instead of asking a library's generator, so
    that sites with different numpy versions agree.
    """
    z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(_hash(*key))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


class TokenArray:
    """Tokens of one split: a read-only array [length] of uint8, uint16 or uint32, cut into windows.

    Window i holds tokens [i * seq_len, (i + 1) * seq_len], so that every token but the first is
    predicted exactly once per epoch.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, num_bytes: int) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.num_bytes = num_bytes
        self.num_windows = (len(tokens) - 1) // seq_len

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.num_bytes / len(self.tokens)

    def windows(self, indices: np.ndarray) -> torch.Tensor:
        """The windows of the given indices [B]: int64 [B, seq_len + 1]."""
        import torch  # not needed to encode texts

        spans = indices.astype(np.int64)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        return torch.from_numpy(self.tokens[spans].astype(np.int64))


class BatchIterator:
    """The endless training batches of one site: `next()` gives int64 [batch_size, seq_len + 1].

    `position` is the number of windows that all sites together have taken. Made by
    `TextData.train_batches`.
    """

    def __init__(
        self,
        data: TokenArray,
        content_hash: str,
        site: int,
        num_sites: int,
        batch_size: int,
        seed: int,
    ) -> None:
        _check_sites(site, num_sites)
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.data, self.site, self.num_sites = data, site, num_sites
        self.batch_size, self.seed, self.content_hash = batch_size, seed, content_hash
        self.position = 0
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = _permutation(self.data.num_windows, "epoch", self.seed, epoch)
        return self._orders[epoch]

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> torch.Tensor:
        start = self.position + self.site * self.batch_size
        places = (divmod(p, self.data.num_windows) for p in range(start, start + self.batch_size))
        indices = np.array([self._order(epoch)[place] for epoch, place in places])
        self.position += self.num_sites * self.batch_size
        return self.data.windows(indices)

    def skip(self, batches: int) -> None:
        """Leaves out so many batches of every site: nobody is given their windows in this epoch.

        Raises ValueError for a negative number.
        """
        if batches < 0:
            raise ValueError(f"batches must be >= 0, got {batches}")
        self.position += batches * self.num_sites * self.batch_size

    @property
    def epoch(self) -> float:
        """How often the training split has been gone through, by all sites together."""
        return self.position / self.data.num_windows

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: {"position", "seed", "seq_len", "content_hash"}.

        It does not depend on the site, so it also serves a different number of sites.
        """
        return {
            "position": self.position,
            "seed": self.seed,
            "seq_len": self.data.seq_len,
            "content_hash": self.content_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stands. Raises ValueError for one of other data or seed."""
        own = self.state_dict()
        if not isinstance(state, dict):
            raise ValueError(f"data state must be a dict, got {type(state).__name__}")
        missing = own.keys() - state.keys()
        if missing:
            raise ValueError(f"data state lacks {', '.join(sorted(missing))}")
        for key in ("seed", "seq_len", "content_hash"):
            if state[key] != own[key]:
                raise ValueError(f"data state has {key} = {state[key]!r}, this job {own[key]!r}")
        position = state["position"]
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"data state has position = {position!r}, wanted an int >= 0")
        self.position = position


def _check_sites(site: int, num_sites: int) -> None:
    if num_sites < 1 or not 0 <= site < num_sites:
        raise ValueError(f"site must be in [0, num_sites), got site {site} of {num_sites}")


@dataclass
class TextData:
    """Training and validation tokens. Made by `open_data`."""

    train: TokenArray
    val: TokenArray
    vocab_size: int
    """Token ids are below this."""
    content_hash: str
    """Hash of all tokens; equal on sites that see the same data."""
    description: str
    """One line for people: where the text comes from and how much there is."""
    skipped_files: int
    """Files below the given folders that are not text."""
    tokenizer: str = ""
    """Equal for equal tokenizers, and "byte" for bytes; "" = not known."""
    uncached: tuple[str, str] | None = None
    """The cache folder that could not be written, and why; tokens are in memory then."""

    def train_batches(
        self, site: int = 0, num_sites: int = 1, batch_size: int = 1, seed: int = 0
    ) -> BatchIterator:
        """The endless training batches of one site, int64 [batch_size, seq_len + 1] each.

        Raises ValueError when `site`, `num_sites` or `batch_size` is out of range.
        """
        return BatchIterator(self.train, self.content_hash, site, num_sites, batch_size, seed)

    def val_batches(
        self, batch_size: int, site: int = 0, num_sites: int = 1, max_tokens: int | None = None
    ) -> Iterator[torch.Tensor]:
        """This site's share of the fixed validation batches: int64 [<= batch_size, seq_len + 1].

        The windows are evenly spread over the validation split when `max_tokens` (predicted tokens,
        rounded down to whole windows but at least one) does not allow all. Their set does not
        depend on `num_sites`: batch i goes to site i % num_sites, so a site may get none.
        Raises ValueError when an argument is out of range.
        """
        _check_sites(site, num_sites)
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        count = self.val.num_windows
        if max_tokens is not None:
            if max_tokens < 1:
                raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
            count = min(count, max(1, max_tokens // self.val.seq_len))
        chosen = np.arange(count) * self.val.num_windows // count
        batches = range(site * batch_size, count, num_sites * batch_size)
        return (self.val.windows(chosen[start : start + batch_size]) for start in batches)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Validation cross entropy in nats per token as bits per byte of text."""
        return nats_per_token / math.log(2) / self.val.bytes_per_token


class _Unwritable(Exception):
    """The cache cannot be written: `path` and, as an OSError, why."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(path, error)
        self.path, self.error = path, error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Inside, OSErrors are the cache's, not the text's."""
    try:
        yield
    except OSError as error:
        raise _Unwritable(path, error) from error


class _SplitWriter:
    """Appends the tokens of texts to one split's file (None = in memory) and counts bytes and
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
    return _hash("split", name) < fraction * 2**64


def _encode(
    writers: dict[str, _SplitWriter],
    units: Sequence[TextUnit],
    tokenizer: Tokenizer,
    text_field: str,
    fraction: float,
    cut_each_text: bool,
) -> dict[str, Any]:
    """Encode all texts into both splits; returns the counts per split."""
    for unit in units:
        for name, chunks in read_texts(unit, text_field):
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


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest unsigned integer type that holds ids below `vocab_size`."""
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _too_short(counts: dict[str, Any], seq_len: int) -> str | None:
    return next((split for split in _SPLITS if counts[split]["tokens"] <= seq_len), None)


def _encode_splits(
    make: Callable[[str], _SplitWriter],
    found: FoundTexts,
    tokenizer: Tokenizer,
    text_field: str,
    fraction: float,
    seq_len: int,
) -> tuple[dict[str, _SplitWriter], dict[str, Any]]:
    """Encode all texts by writers made for the splits; these, and the counts per split."""
    writers: dict[str, _SplitWriter] = {}
    # Few files may leave one side empty: then every text gives its last part to validation.
    for cut_each_text in (False, True):
        writers = {split: make(split) for split in _SPLITS}
        counts = _encode(writers, found.units, tokenizer, text_field, fraction, cut_each_text)
        if not _too_short(counts, seq_len):
            return writers, counts
    short = _too_short(counts, seq_len)
    total = sum(counts[split]["tokens"] for split in _SPLITS)
    raise ValueError(
        f"data is too short: {total} tokens in {len(found.units)} files "
        f"({found.description}) leave {counts[short]['tokens']} for the "
        f"{'validation' if short == 'val' else 'training'} split, and one sequence "
        f"needs seq_len + 1 = {seq_len + 1}"
    )


def _fill_cache(
    target: Path,
    found: FoundTexts,
    tokenizer: Tokenizer,
    text_field: str,
    fraction: float,
    seq_len: int,
) -> None:
    """Encode into a temporary folder beside `target`, then rename it. Raises _Unwritable."""
    with _writing(target.parent):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"cache_dir {target.parent} must be a folder, or a new one") from None
        temporary = Path(tempfile.mkdtemp(prefix=".encoding-", dir=target.parent))
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    make = lambda split: _SplitWriter(temporary / f"{split}.bin", dtype)
    try:
        _, counts = _encode_splits(make, found, tokenizer, text_field, fraction, seq_len)
        with _writing(temporary):
            (temporary / "meta.json").write_text(json.dumps(sealed(counts)), encoding="utf-8")
        try:
            os.rename(temporary, target)
        except OSError as error:
            if target.is_dir() and not (target / "meta.json").exists():
                raise _damaged(target, "no meta.json") from None
            if not target.is_dir():  # else another process was first: use its files
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
    """What `_encode` returned for this cache folder."""
    try:
        counts = unsealed(loads((folder / "meta.json").read_bytes()), "meta.json")
        for split in _SPLITS:
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


def open_job_data(config: TrainConfig, *, check: bool = True) -> TextData:
    """The text of a training job; `check` and errors as in `open_data`."""
    data = config.data
    return open_data(
        data.data,
        config.model.seq_len,
        val_paths=data.val_data or None,
        validation_fraction=data.validation_fraction,
        text_field=data.text_field,
        tokenizer=data.tokenizer,
        cache_dir=data.cache_dir,
        check=check,
    )


def open_data(
    paths: Sequence[str] | None = None,
    seq_len: int = 256,
    *,
    val_paths: Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    text_field: str = "text",
    tokenizer: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    check: bool = True,
) -> TextData:
    """Find, encode (once) and map the text to train on.

    `paths`: files, folders and globs of text, .jsonl (its `text_field`) and parquet (its column
    `text_field`); None or empty = the source of the installed Python's standard library without its
    tests. Files below a folder that are not UTF-8 text are left out and counted, but a file that is
    named must be text. `val_paths`: validation text; None = a share `validation_fraction` of the
    files (lines, rows), chosen by hash, or the end of every text where that leaves a split empty.
    A file in both lists is for validation.
    `tokenizer`: a tokenizer.json of the `tokenizers` library, None = bytes. `cache_dir`: where
    token files are kept, None = fomoe/tokens in the user's cache folder; where nothing can be
    written there (a full disk) tokens are kept in memory, and the result says so in `uncached`.
    `check`: whether to compare token files with their hashes, which reads all of them; without it
    another process of this machine must just have done so. Safe to call from several processes at
    once.

    Raises FileNotFoundError for a missing path or an empty glob; ValueError for what is not text, a
    corrupt parquet file, a bad .jsonl line (with its number), a missing field, or too little text
    for one sequence per split; RuntimeError when pyarrow or tokenizers is needed and missing.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be >= 1, got {seq_len}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction}")
    coder = load_tokenizer(tokenizer)
    found = find_texts(paths or None, split="train" if val_paths else None)
    if val_paths:
        found = found.without_those_of(held := find_texts(val_paths, split="val")) + held
    key = hashlib.sha256()
    for unit in found.units:
        stat = unit.path.stat()
        key.update(repr((str(unit.path), unit.name, unit.split, stat.st_size)).encode())
        key.update(repr(stat.st_mtime_ns).encode())
    key.update(repr((_FORMAT, coder.fingerprint, text_field, validation_fraction)).encode())
    key.update(repr(seq_len).encode())  # decides whether a split is too short
    folder = _cache_root(cache_dir) / key.hexdigest()[:24]
    dtype = np.dtype(token_dtype(coder.vocab_size))
    how = coder, text_field, validation_fraction, seq_len
    uncached = None
    try:
        if not (folder / "meta.json").exists():
            _fill_cache(folder, found, *how)
        counts = _read_counts(folder)
        arrays = [_map_tokens(folder, split, counts, dtype, check) for split in _SPLITS]
    except _Unwritable as problem:
        uncached = str(problem.path), str(problem.error.strerror or problem.error)
        writers, counts = _encode_splits(lambda split: _SplitWriter(None, dtype), found, *how)
        arrays = [_in_memory(writers[split], dtype) for split in _SPLITS]
    train, val = (
        TokenArray(array, seq_len, counts[split]["bytes"])
        for split, array in zip(_SPLITS, arrays, strict=True)
    )
    content = hashlib.sha256("".join(counts[split]["hash"] for split in _SPLITS).encode())
    return TextData(
        train=train,
        val=val,
        vocab_size=coder.vocab_size,
        content_hash=content.hexdigest(),
        description=f"{found.description}: {len(found.units)} files, "
        f"{train.num_bytes / 1e6:.2f} MB to train on, {val.num_bytes / 1e6:.2f} MB to validate on, "
        f"{coder.name} tokens",
        skipped_files=found.skipped,
        tokenizer=coder.fingerprint,
        uncached=uncached,
    )


def _in_memory(writer: _SplitWriter, dtype: np.dtype) -> np.ndarray:
    assert isinstance(writer.file, io.BytesIO)
    return np.frombuffer(writer.file.getbuffer(), dtype=dtype)
