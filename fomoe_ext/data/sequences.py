"""Training and validation batches from token arrays.

Batches are rows of an endless stream of windows: each epoch has every window of `seq_len + 1`
tokens once, in an order drawn from (seed, epoch). A step of N sites with B sequences each takes the
next N * B windows of the stream; site s gets the s-th B of them. So sites have disjoint data whose
union is the batch of one process with N * B sequences, and the position in the stream is the only
state to save.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fomoe_ext.data.cache import SPLITS, Encoding, encode, hash64
from fomoe_ext.data.text import find_texts, load_tokenizer

if TYPE_CHECKING:
    import torch

    from fomoe_ext.config.job import TrainConfig


def _permutation(size: int, *key: object) -> np.ndarray:
    """A permutation of range(size) that depends on the key: int64 [size].

    It sorts by a splitmix64 hash (Steele, Lea, Flood 2014). A generator of numpy could differ
    between versions, and so between sites.
    """
    z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(hash64(*key))
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

    Created by `TextData.train_batches`. `position` is the number of windows that all sites together
    have taken.
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
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
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
        """Skips this number of batches on every site; their windows do not occur in this epoch.

        Raises ValueError for a negative number.
        """
        if batches < 0:
            raise ValueError(f"batches must be at least 0, got {batches}")
        self.position += batches * self.num_sites * self.batch_size

    @property
    def epoch(self) -> float:
        """How many times all sites together have read the training split."""
        return self.position / self.data.num_windows

    def state_dict(self) -> dict[str, Any]:
        """The state of the stream: {"position", "seed", "seq_len", "content_hash"}.

        It does not depend on the site, so another number of sites can continue from it.
        """
        return {
            "position": self.position,
            "seed": self.seed,
            "seq_len": self.data.seq_len,
            "content_hash": self.content_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`. Raises ValueError if its data or seed differ."""
        own = self.state_dict()
        if not isinstance(state, dict):
            raise ValueError(f"data state must be a dict, got {type(state).__name__}")
        missing = own.keys() - state.keys()
        if missing:
            raise ValueError(f"data state must have {', '.join(sorted(missing))}, got none")
        for key in ("seed", "seq_len", "content_hash"):
            if state[key] != own[key]:
                raise ValueError(
                    f"{key} of the data state must be {own[key]!r}, as in this job, got "
                    f"{state[key]!r}"
                )
        position = state["position"]
        if not isinstance(position, int) or position < 0:
            raise ValueError(
                f"position of the data state must be an int of at least 0, got {position!r}"
            )
        self.position = position


def _check_sites(site: int, num_sites: int) -> None:
    if num_sites < 1 or not 0 <= site < num_sites:
        raise ValueError(f"site must be in [0, num_sites), got site {site} of {num_sites}")


@dataclass
class TextData:
    """Training and validation tokens. Created by `open_data`."""

    train: TokenArray
    val: TokenArray
    vocab_size: int
    """Number of token ids: all ids are below."""
    content_hash: str
    """Hash of all tokens, equal on sites with the same data."""
    description: str
    """One line to read: the source and the size of the text."""
    skipped_files: int
    """Number of files below the given folders that are not text."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer: equal for equal tokenizers, "byte" for bytes, "" = unknown."""
    uncached: tuple[str, str] | None = None
    """The cache folder and the reason if it could not be written; the tokens are in memory then."""

    def train_batches(
        self, batch_size: int, *, site: int, num_sites: int, seed: int = 0
    ) -> BatchIterator:
        """The endless training batches of one site, int64 [batch_size, seq_len + 1] each.

        batch_size: windows of this site. site, num_sites: 0 and 1 in a job without sites. seed: of
        the order; it must be equal on all sites.
        Raises ValueError if an argument is out of range.
        """
        return BatchIterator(self.train, self.content_hash, site, num_sites, batch_size, seed)

    def val_batches(
        self,
        batch_size: int,
        *,
        site: int | None = None,
        num_sites: int | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """The fixed validation batches, or a site's share: int64 [<= batch_size, seq_len + 1].

        site, num_sites: batch i goes to site i % num_sites, so a site may get none. Without both,
        this process gets all batches. The windows do not depend on the number of sites.
        max_tokens: of predicted tokens, rounded down to whole windows but at least one. The windows
        are then spread evenly over the validation split.
        Raises ValueError if an argument is out of range, or if only one of site and num_sites is
        given.
        """
        if (site is None) != (num_sites is None):
            raise ValueError(
                f"site and num_sites must be given together, got site = {site}, "
                f"num_sites = {num_sites}"
            )
        site, num_sites = site or 0, 1 if num_sites is None else num_sites
        _check_sites(site, num_sites)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        count = self.val.num_windows
        if max_tokens is not None:
            if max_tokens < 1:
                raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
            count = min(count, max(1, max_tokens // self.val.seq_len))
        chosen = np.arange(count) * self.val.num_windows // count
        batches = range(site * batch_size, count, num_sites * batch_size)
        return (self.val.windows(chosen[start : start + batch_size]) for start in batches)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Validation cross entropy in nats per token as bits per byte of text."""
        return nats_per_token / math.log(2) / self.val.bytes_per_token


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
    """Finds the text to train on, encodes it once and maps the token files; safe in many processes.

    Args:
        paths: files, folders and globs of text, .jsonl and parquet files; None or empty = the
            source of Python's standard library without its tests. In folders, files that are not
            UTF-8 text are skipped and counted; a file named itself must be text.
        seq_len: predicted tokens per window.
        val_paths: validation text; a file in both lists is used for validation only. None = a share
            `validation_fraction` of the files (lines, rows), chosen by hash. If that leaves a split
            empty, the end of every text is used instead.
        text_field: field of a .jsonl line, or column of a parquet file, with the text.
        tokenizer: a tokenizer.json of the `tokenizers` library; None = tokens are bytes.
        cache_dir: folder for token files; None = fomoe/tokens in the user's cache folder. If it
            cannot be written (a full disk), tokens stay in memory, and `uncached` of the result
            tells why.
        check: whether to compare token files with their hashes, which reads all of them. Use False
            only if another process of this machine has just compared them.

    Raises FileNotFoundError for a missing path or a glob without matches; ValueError for a file
    that is not text, a corrupt parquet file, an invalid .jsonl line (with its number), a missing
    field, or too little text for one window per split; RuntimeError if pyarrow or tokenizers is
    needed but not installed.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction}")
    coder = load_tokenizer(tokenizer)
    found = find_texts(paths or None, split="train" if val_paths else None)
    if val_paths:
        found = found.without_those_of(held := find_texts(val_paths, split="val")) + held
    how = Encoding(coder, text_field, validation_fraction, seq_len)
    encoded = encode(found, how, cache_dir, check)
    train, val = (
        TokenArray(encoded.tokens[split], seq_len, encoded.num_bytes[split]) for split in SPLITS
    )
    return TextData(
        train=train,
        val=val,
        vocab_size=coder.vocab_size,
        content_hash=encoded.content_hash,
        description=f"{found.description}: {len(found.units)} files, "
        f"{train.num_bytes / 1e6:.2f} MB to train on, {val.num_bytes / 1e6:.2f} MB to validate on, "
        f"{coder.name} tokens",
        skipped_files=found.skipped,
        tokenizer=coder.fingerprint,
        uncached=encoded.uncached,
    )
