"""Token arrays as training batches.

Batches are rows of an endless stream of windows: each epoch holds every window of `seq_len + 1`
tokens once, in an order drawn from (seed, epoch). A step of N sites with B sequences each takes the
next N * B windows of the stream, site s the s-th B of them. So the sites' data is disjoint, its
union is the batch of one process with N * B sequences, and a position in the stream is all there
is to resume from.
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
    """A permutation of range(size) drawn from the key: int64 [size].

    Sorts by a splitmix64 hash (Steele, Lea, Flood 2014) instead of asking a library's generator, so
    that sites with different numpy versions agree.
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
