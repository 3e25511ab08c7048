"""Batches: every window once an epoch, whatever the number of sites, and resumed bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_files import write_files

from fomoe_ext.data.sequences import BatchIterator, TextData, TokenArray


def numbered(num_windows: int, seq_len: int = 8) -> TextData:
    """Data whose tokens are 0, 1, 2, ...: a window's first token is its position."""
    tokens = np.arange(num_windows * seq_len + 1 + 3, dtype=np.uint32)
    array = TokenArray(tokens, seq_len, 4 * len(tokens))
    return TextData(array, array, len(tokens), "hash", "numbers", 0)


def places(batch: torch.Tensor, seq_len: int = 8) -> list[int]:
    assert batch.dtype == torch.int64
    assert batch.shape[1] == seq_len + 1
    assert torch.equal(batch, batch[:, :1] + torch.arange(seq_len + 1))
    first = batch[:, 0]
    assert not (first % seq_len).any()
    return (first // seq_len).tolist()


@pytest.mark.parametrize(("sites", "batch_size"), [(1, 5), (2, 3), (3, 4), (4, 1)])
def test_an_epoch_holds_every_window_once(sites: int, batch_size: int) -> None:
    data = numbered(sites * batch_size * 7)
    streams = [
        data.train_batches(batch_size, site=s, num_sites=sites, seed=3) for s in range(sites)
    ]
    epochs = []
    for _ in range(2):
        seen = [p for _ in range(7) for stream in streams for p in places(next(stream))]
        assert sorted(seen) == list(range(data.train.num_windows))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert streams[0].epoch == 2.0


@pytest.mark.parametrize("windows", [3, 11, 100])
def test_sites_together_are_one_process_with_the_joined_batch(windows: int) -> None:
    data = numbered(windows)
    joined = data.train_batches(6, site=0, num_sites=1, seed=1)
    streams = [data.train_batches(2, site=s, num_sites=3, seed=1) for s in range(3)]
    for _ in range(40):  # across several epochs, and batches larger than one
        assert torch.equal(next(joined), torch.cat([next(stream) for stream in streams]))


def test_order_depends_on_the_seed() -> None:
    data = numbered(100)
    streams = [data.train_batches(5, site=0, num_sites=1, seed=s) for s in (0, 0, 1)]
    orders = [[p for _ in range(10) for p in places(next(stream))] for stream in streams]
    assert orders[0] == orders[1] != orders[2]


def test_resuming_is_bit_exact(opened: Callable, tmp_path: Path) -> None:
    write_files(tmp_path / "in")
    data = opened(tmp_path / "in")
    stream = data.train_batches(3, site=1, num_sites=2, seed=7)
    for _ in range(data.train.num_windows // 4):  # into the second epoch
        next(stream)
    assert stream.epoch > 1
    state = json.loads(json.dumps(stream.state_dict()))
    wanted = [next(stream) for _ in range(20)]
    for site, sites, batch_size in ((1, 2, 3), (0, 1, 6)):
        other = opened(tmp_path / "in").train_batches(
            batch_size, site=site, num_sites=sites, seed=7
        )
        other.load_state_dict(state)
        rows = slice(None) if sites == 2 else slice(3, 6)
        assert all(torch.equal(batch, next(other)[rows]) for batch in wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, ["seed of the data state must be 0, as in this job, got 1"]),
        ({"content_hash": "x"}, ["content_hash of the data state must be", "got 'x'"]),
        ({"seq_len": 9}, ["seq_len of the data state must be 8, as in this job, got 9"]),
        ({"position": -1}, ["position of the data state must be an int of at least 0, got -1"]),
        ({"position": 1.5}, ["position of the data state must be an int of at least 0, got 1.5"]),
        ({"position": None}, ["position"]),
    ],
)
def test_bad_states(change: dict, words: list[str]) -> None:
    stream = numbered(10).train_batches(1, site=0, num_sites=1)
    state = stream.state_dict() | change
    with pytest.raises(ValueError) as caught:
        stream.load_state_dict(state)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="must have position, seed"):
        stream.load_state_dict({"content_hash": "hash", "seq_len": 8})
    with pytest.raises(ValueError, match="data state must be a dict, got list"):
        stream.load_state_dict([])
    assert stream.position == 0


@pytest.mark.parametrize("sites", [1, 2, 3, 5])
@pytest.mark.parametrize("max_tokens", [None, 1, 100, 10**9])
def test_validation_set_does_not_depend_on_the_sites(sites: int, max_tokens: int | None) -> None:
    data = numbered(37)
    alone = [places(b) for b in data.val_batches(4, max_tokens=max_tokens)]
    shares = [
        [places(b) for b in data.val_batches(4, site=s, num_sites=sites, max_tokens=max_tokens)]
        for s in range(sites)
    ]
    assert [shares[i % sites][i // sites] for i in range(len(alone))] == alone
    assert sum(map(len, shares)) == len(alone)
    chosen = [p for batch in alone for p in batch]
    count = {None: 37, 1: 1, 100: 12, 10**9: 37}[max_tokens]
    assert len(chosen) == len(set(chosen)) == count
    if count == 12:
        assert max(chosen) - min(chosen) > 30  # spread over the whole split


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda d: d.train_batches(1, site=2, num_sites=2), "site 2 of 2"),
        (lambda d: d.train_batches(1, site=-1, num_sites=2), "site -1 of 2"),
        (lambda d: d.train_batches(1, site=0, num_sites=0), "num_sites"),
        (lambda d: d.train_batches(0, site=0, num_sites=1), "batch_size must be at least 1, got 0"),
        (lambda d: d.val_batches(0), "batch_size must be at least 1, got 0"),
        (lambda d: d.val_batches(1, site=1, num_sites=1), "site 1 of 1"),
        (lambda d: d.val_batches(1, num_sites=4), "site and num_sites must be given together"),
        (lambda d: d.val_batches(1, site=0), "site and num_sites must be given together"),
        (lambda d: d.val_batches(1, max_tokens=0), "max_tokens must be at least 1, got 0"),
    ],
)
def test_bad_batch_arguments(call: Callable[[TextData], Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call(numbered(10))


def test_batches_are_copies_of_the_mapped_tokens(opened: Callable, tmp_path: Path) -> None:
    write_files(tmp_path / "in")
    data = opened(tmp_path / "in")
    batch = next(data.train_batches(4, site=0, num_sites=1))
    batch.zero_()
    assert data.train.tokens.any()
    assert isinstance(data.train_batches(1, site=0, num_sites=1), BatchIterator)
