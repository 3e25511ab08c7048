"""Text to tokens to batches: every kind of source, the split, the cache, resuming, bad input."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fomoe_ext.data.cache import token_dtype
from fomoe_ext.data.sequences import BatchIterator, TextData, TokenArray, open_data
from fomoe_ext.data.text import FileTokenizer, find_texts

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


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., TextData]:
    """`open_data` with a cache folder of the test's own and sequences of 16 tokens."""

    def call(*paths: Any, seq_len: int = 16, **options: Any) -> TextData:
        options.setdefault("cache_dir", tmp_path / "cache")
        return open_data([str(path) for path in paths], seq_len, **options)

    return call


def texts_in(array: TokenArray) -> list[str]:
    """The texts of a byte-token split, in order."""
    parts = bytes(array.tokens).split(b"\0")
    assert parts.pop() == b""
    return [part.decode() for part in parts]


def all_texts(data: TextData) -> list[str]:
    return sorted(texts_in(data.train) + texts_in(data.val))


# ---- sources ------------------------------------------------------------------------------------


def test_folder_is_read_whole_and_byte_exact(opened: Callable, tmp_path: Path) -> None:
    texts = write_files(tmp_path / "in")
    (tmp_path / "in" / ".hidden").write_text("secret")
    (tmp_path / "in" / "__pycache__").mkdir()
    (tmp_path / "in" / "__pycache__" / "a.txt").write_text("byte code")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "in" / "latin.txt").write_bytes("façade".encode("latin-1"))
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "pipe")  # opening it would wait forever
    data = opened(tmp_path / "in", validation_fraction=0.2)
    assert all_texts(data) == sorted(texts.values())
    assert data.skipped_files == 2
    assert data.vocab_size == 256
    assert data.train.tokens.dtype == np.uint8
    assert "40 files" in data.description


def test_files_globs_and_duplicates(opened: Callable, tmp_path: Path) -> None:
    texts = write_files(tmp_path / "in")
    write_files(tmp_path / "in" / "other", 3, ".md")
    direct = opened(tmp_path / "in" / "**" / "*.txt")
    twice = opened(tmp_path / "in" / "0", *(tmp_path / "in" / name for name in sorted(texts)))
    assert all_texts(direct) == all_texts(twice) == sorted(texts.values())
    one_level = opened(tmp_path / "in" / "[01]" / "*.txt")
    assert all_texts(one_level) == sorted(t for n, t in texts.items() if n[0] in "01")


def test_a_name_with_glob_characters_is_a_name(opened: Callable, tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text(text_of(1, 500), encoding="utf-8")
    (tmp_path / "a1.txt").write_text(text_of(2, 500), encoding="utf-8")
    data = opened(tmp_path / "a[1].txt")
    assert "# 1" in "".join(all_texts(data))
    assert "# 2" not in "".join(all_texts(data))


def test_jsonl(opened: Callable, tmp_path: Path) -> None:
    texts = [text_of(i, 30) for i in range(60)] + ["is \u0100 inside?", ""]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    data = opened(tmp_path / "a.jsonl", text_field="body", validation_fraction=0.2)
    joined = bytes(data.train.tokens) + bytes(data.val.tokens)
    for text in texts[:-1]:
        assert joined.count(text.encode() + b"\0") == 1
    assert data.train.num_bytes + data.val.num_bytes == sum(len(t.encode()) for t in texts)
    assert len(joined) == sum(len(t.encode()) + 1 for t in texts[:-1])


def test_parquet_plain_and_dictionary(opened: Callable, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [text_of(i, 30) for i in range(2500)]  # more than one batch of rows
    plain = pa.array([*texts, None, ""])
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"n": range(2502), "body": plain}), tmp_path / "in" / "a.PARQUET")
    data = opened(tmp_path / "in", text_field="body")
    assert all_texts(data) == sorted(texts)
    table = pa.table({"body": plain.dictionary_encode()})
    pq.write_table(table, tmp_path / "b.parquet")
    assert all_texts(opened(tmp_path / "b.parquet", text_field="body")) == sorted(texts)


def test_default_is_the_standard_library(tmp_path: Path) -> None:
    data = open_data(None, 256, cache_dir=tmp_path)
    assert data.train.num_bytes > 3e6
    assert 0.01 < data.val.num_bytes / data.train.num_bytes < 0.2
    source = (Path(sysconfig.get_path("stdlib")) / "json" / "__init__.py").read_bytes()
    assert source in bytes(data.train.tokens) + bytes(data.val.tokens)
    assert "standard library" in data.description
    names = {unit.name for unit in find_texts(None).units}
    assert "json/decoder.py" in names
    assert not [n for n in names if "site-packages" in n or n.startswith("test/")]


# ---- the split ----------------------------------------------------------------------------------


def test_split_by_file_is_disjoint_and_everywhere_the_same(
    opened: Callable, tmp_path: Path
) -> None:
    texts = write_files(tmp_path / "here", 300)
    write_files(tmp_path / "there" / "deeper", 300)
    first = opened(tmp_path / "here", validation_fraction=0.2)
    second = opened(tmp_path / "there" / "deeper", validation_fraction=0.2)
    train, val = texts_in(first.train), texts_in(first.val)
    assert sorted(train + val) == sorted(texts.values())
    assert 0.13 < len(val) / 300 < 0.27
    assert first.content_hash == second.content_hash  # the path above the folder plays no part
    grown = opened(tmp_path / "here", validation_fraction=0.3)
    assert set(val) < set(texts_in(grown.val))
    (tmp_path / "here" / "new.txt").write_text("one more\n")
    assert set(val) <= set(texts_in(opened(tmp_path / "here", validation_fraction=0.2).val))


def test_one_file_gives_its_end_to_validation(opened: Callable, tmp_path: Path) -> None:
    text = text_of(0, 2000)
    (tmp_path / "a.txt").write_bytes(text.encode())
    data = opened(tmp_path / "a.txt", validation_fraction=0.1)
    (train,), (val,) = texts_in(data.train), texts_in(data.val)
    assert train + val == text
    assert len(val) == round(len(text) * 0.1)


def test_named_validation_text(opened: Callable, tmp_path: Path) -> None:
    texts = write_files(tmp_path / "in")
    held = tmp_path / "in" / "0" / "00.txt"
    (tmp_path / "val.md").write_bytes(text_of(1000).encode())
    data = opened(tmp_path / "in", val_paths=[str(tmp_path / "val.md"), str(held)])
    assert sorted(texts_in(data.val)) == sorted([text_of(1000), text_of(0)])
    # A file named for both is for validation only.
    assert sorted(texts_in(data.train)) == sorted(set(texts.values()) - {text_of(0)})


# ---- the cache ----------------------------------------------------------------------------------


def test_cache_is_mapped_reused_and_renewed(
    opened: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "in")
    data = opened(tmp_path / "in")
    assert isinstance(data.train.tokens, np.memmap)
    assert not data.train.tokens.flags.writeable
    with monkeypatch.context() as patch:  # a second opening encodes nothing
        patch.setattr("fomoe_ext.data.cache._encode", lambda *a, **k: pytest.fail("encoded again"))
        assert opened(tmp_path / "in").content_hash == data.content_hash
    changed = tmp_path / "in" / "0" / "00.txt"
    changed.write_bytes(changed.read_bytes().replace(b"t", b"T"))  # as long as before
    assert opened(tmp_path / "in").content_hash != data.content_hash
    names = [p.name for p in (tmp_path / "cache").iterdir()]
    assert len(names) == 2
    assert not [n for n in names if n.startswith(".")]


def test_a_failed_encoding_leaves_nothing(opened: Callable, tmp_path: Path) -> None:
    write_files(tmp_path / "in", suffix=".jsonl")
    with pytest.raises(ValueError, match="not JSON"):
        opened(tmp_path / "in")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train.bin", b"ab"),
        ("val.bin", None),
        ("meta.json", b"{}"),
        ("meta.json", b"\xff"),
        ("meta.json", b'{"train": 1, "val": 2}'),
    ],
)
def test_damaged_cache(opened: Callable, tmp_path: Path, file: str, content: bytes | None) -> None:
    write_files(tmp_path / "in")
    opened(tmp_path / "in")
    (folder,) = (tmp_path / "cache").iterdir()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as caught:
        opened(tmp_path / "in")
    assert str(folder) in str(caught.value)
    assert file in str(caught.value)


def _open_at_once(barrier: Any, folder: str, cache: str, results: Any) -> None:
    barrier.wait()
    data = open_data([folder], 16, cache_dir=cache)
    results.put((data.content_hash, int(data.train.tokens.astype(np.int64).sum())))


def test_four_processes_start_at_once(tmp_path: Path) -> None:
    write_files(tmp_path / "in", 200)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (barrier, str(tmp_path / "in"), str(tmp_path / "cache"), results)
    workers = [context.Process(target=_open_at_once, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(set(found)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no temporary folder is left


# ---- batches ------------------------------------------------------------------------------------


def numbered(num_windows: int, seq_len: int = 8) -> TextData:
    """Data whose tokens are 0, 1, 2, ... so that a window tells its place."""
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
    streams = [data.train_batches(s, sites, batch_size, seed=3) for s in range(sites)]
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
    joined = data.train_batches(batch_size=6, seed=1)
    streams = [data.train_batches(s, 3, 2, seed=1) for s in range(3)]
    for _ in range(40):  # across several epochs, and batches larger than one
        assert torch.equal(next(joined), torch.cat([next(stream) for stream in streams]))


def test_order_depends_on_the_seed() -> None:
    data = numbered(100)
    orders = [[p for _ in range(10) for p in places(next(stream))]
              for stream in (data.train_batches(0, 1, 5, seed=s) for s in (0, 0, 1))]  # fmt: skip
    assert orders[0] == orders[1] != orders[2]


def test_resuming_is_bit_exact(opened: Callable, tmp_path: Path) -> None:
    write_files(tmp_path / "in")
    data = opened(tmp_path / "in")
    stream = data.train_batches(1, 2, 3, seed=7)
    for _ in range(data.train.num_windows // 4):  # into the second epoch
        next(stream)
    assert stream.epoch > 1
    state = json.loads(json.dumps(stream.state_dict()))
    wanted = [next(stream) for _ in range(20)]
    for site, sites, batch_size in ((1, 2, 3), (0, 1, 6)):
        other = opened(tmp_path / "in").train_batches(site, sites, batch_size, seed=7)
        other.load_state_dict(state)
        rows = slice(None) if sites == 2 else slice(3, 6)
        assert all(torch.equal(batch, next(other)[rows]) for batch in wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, ["seed = 1", "0"]),
        ({"content_hash": "x"}, ["content_hash = 'x'"]),
        ({"seq_len": 9}, ["seq_len = 9", "8"]),
        ({"position": -1}, ["position = -1"]),
        ({"position": 1.5}, ["position = 1.5"]),
        ({"position": None}, ["position"]),
    ],
)
def test_bad_states(change: dict, words: list[str]) -> None:
    stream = numbered(10).train_batches()
    state = stream.state_dict() | change
    with pytest.raises(ValueError) as caught:
        stream.load_state_dict(state)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="lacks position, seed"):
        stream.load_state_dict({"content_hash": "hash", "seq_len": 8})
    with pytest.raises(ValueError, match="data state must be a dict, got list"):
        stream.load_state_dict([])
    assert stream.position == 0


@pytest.mark.parametrize("sites", [1, 2, 3, 5])
@pytest.mark.parametrize("max_tokens", [None, 1, 100, 10**9])
def test_validation_set_does_not_depend_on_the_sites(sites: int, max_tokens: int | None) -> None:
    data = numbered(37)
    alone = [places(b) for b in data.val_batches(4, max_tokens=max_tokens)]
    shares = [[places(b) for b in data.val_batches(4, s, sites, max_tokens)] for s in range(sites)]
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
        (lambda d: d.train_batches(site=2, num_sites=2), "site 2 of 2"),
        (lambda d: d.train_batches(site=-1, num_sites=2), "site -1 of 2"),
        (lambda d: d.train_batches(num_sites=0), "num_sites"),
        (lambda d: d.train_batches(batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda d: d.val_batches(0), "batch_size must be >= 1, got 0"),
        (lambda d: d.val_batches(1, 1, 1), "site 1 of 1"),
        (lambda d: d.val_batches(1, max_tokens=0), "max_tokens must be >= 1, got 0"),
    ],
)
def test_bad_batch_arguments(call: Callable[[TextData], Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call(numbered(10))


def test_batches_are_copies_of_the_mapped_tokens(opened: Callable, tmp_path: Path) -> None:
    write_files(tmp_path / "in")
    data = opened(tmp_path / "in")
    batch = next(data.train_batches(batch_size=4))
    batch.zero_()
    assert data.train.tokens.any()
    assert isinstance(data.train_batches(), BatchIterator)


# ---- tokenizers and bits per byte ---------------------------------------------------------------


def write_tokenizer(path: Path, kind: str) -> Any:
    """A tokenizer that splits at spaces, or byte-level BPE, with an end-of-text token far out."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if kind == "words":
        vocab = {"?": 0} | {word: i + 1 for i, word in enumerate(sorted(set(WORDS) - {""}))}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([text_of(i) for i in range(40)], trainer)
    tokenizer.save(str(path))
    return tokenizer


def test_tokenizer_file(opened: Callable, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "bpe.json", "bpe")
    tokenizer.enable_truncation(4)  # what some files ask for must not cut the text
    tokenizer.enable_padding(length=5000)
    tokenizer.save(str(tmp_path / "bpe.json"))
    texts = write_files(tmp_path / "in")
    data = opened(tmp_path / "in", tokenizer=tmp_path / "bpe.json", validation_fraction=0.2)
    assert data.vocab_size == 320
    assert data.train.tokens.dtype == np.uint16
    end = tokenizer.token_to_id("<|endoftext|>")
    found = []
    for split in (data.train, data.val):
        ids = split.tokens.tolist()
        assert ids[-1] == end
        while ids:
            cut = ids.index(end)
            found.append(tokenizer.decode(ids[:cut]))
            ids = ids[cut + 1 :]
    assert sorted(found) == sorted(texts.values())


def test_bits_per_byte_are_the_same_for_any_tokenizer(opened: Callable, tmp_path: Path) -> None:
    """A model that spends b bits on every byte, whatever the tokens, must read b bits per byte."""
    write_tokenizer(tmp_path / "bpe.json", "bpe")
    write_files(tmp_path / "in", 100)
    plain = opened(tmp_path / "in", validation_fraction=0.3)
    coded = opened(tmp_path / "in", validation_fraction=0.3, tokenizer=tmp_path / "bpe.json")
    assert coded.train.num_bytes == plain.train.num_bytes
    assert coded.val.num_bytes == plain.val.num_bytes
    assert coded.val.bytes_per_token > 1.5
    spent = 2.5 * math.log(2) * plain.val.num_bytes  # nats on the whole split
    for data in (plain, coded):
        assert data.bits_per_byte(spent / len(data.val.tokens)) == pytest.approx(2.5, rel=1e-12)
    files = len(texts_in(plain.val))
    assert plain.val.bytes_per_token == plain.val.num_bytes / (plain.val.num_bytes + files)


def test_ids_with_holes_and_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "words.json", "words")
    content = json.loads((tmp_path / "words.json").read_text())
    content["model"]["vocab"]["expert"] = 70_000
    (tmp_path / "words.json").write_text(json.dumps(content))
    tokenizer = FileTokenizer(tmp_path / "words.json")
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.encode("the expert").tolist()[1] == 70_000
    assert tokenizer.separator.size == 0


def spelling_tokenizer(path: Path, kind: str) -> str:
    """Writes a tokenizer whose end of a text can be spelt in it; returns how."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    end, letters = "</s>", [*"</s>wx", "▁"]
    if kind in ("special", "added"):
        end = "<|endoftext|>"
        model = tokenizers.models.BPE(
            {c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))}, []
        )
    elif kind == "unigram":
        model = tokenizers.models.Unigram(
            [("<unk>", 0.0), (end, 0.0), *((c, -5.0) for c in letters)], 0
        )
    else:
        model = tokenizers.models.WordLevel({"<unk>": 0, end: 1, "w": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    if kind in ("special", "added"):
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre.Metaspace() if kind == "unigram" else pre.WhitespaceSplit()
    if kind == "added":
        tokenizer.add_tokens([end])
    elif kind != "words":
        tokenizer.add_special_tokens([end, "<unk>"])
    tokenizer.save(str(path))
    return end


@pytest.mark.parametrize("kind", ["special", "added", "unigram", "words"])
def test_a_text_that_spells_the_end_does_not_end(tmp_path: Path, kind: str) -> None:
    """Specials, added tokens, and words of the vocabulary."""
    end = spelling_tokenizer(tmp_path / "t.json", kind)
    tokenizer = FileTokenizer(tmp_path / "t.json")
    assert len(tokenizer.separator) == 1
    text = f"w x {end} w{end}{end}x 日本 w"
    found = tokenizer.encode(text)
    assert len(found) > 5 and tokenizer.separator[0] not in found
    if kind in ("special", "added"):  # nothing is lost
        assert len(found) == len(text.encode())
    if kind == "unigram":  # what is unknown stays what it is
        assert tokenizer.encode("w 日本 x").tolist().count(0) == 1


def test_an_end_that_cannot_be_told_is_refused(opened: Callable, tmp_path: Path) -> None:
    """One character, or NUL in a text of bytes: with the file and the line."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "w": 1, "$": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["$"])
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w w"}\n{"text": "w $ w"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl \(a\.jsonl:2\): .* spells '\$'"):
        opened(tmp_path / "a.jsonl", tokenizer=tmp_path / "t.json")
    (tmp_path / "b.jsonl").write_text('{"text": "w w"}\n{"text": "w\\u0000"}\n')
    with pytest.raises(ValueError, match=r"\(b\.jsonl:2\): .* no NUL.*character 1 is one"):
        opened(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)],
)
def test_token_dtype(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) is dtype


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\0", b'{"model": 3}'])
def test_bad_tokenizers(opened: Callable, tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.json"):
        opened(tmp_path, tokenizer=tmp_path / "t.json")
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        opened(tmp_path, tokenizer=tmp_path / "no.json")


@pytest.mark.parametrize(("library", "word"), [("tokenizers", "t.json"), ("pyarrow", "a.parquet")])
def test_missing_library(
    opened: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, word: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "t.json").write_bytes(b"{}")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    options = {"tokenizer": tmp_path / "t.json"} if library == "tokenizers" else {}
    with pytest.raises(RuntimeError, match=f"pip install {library}") as caught:
        opened(tmp_path / "a.parquet", **options)
    assert word in str(caught.value)


# ---- bad files ----------------------------------------------------------------------------------


def test_missing_paths(opened: Callable, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist"):
        opened(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.md"):
        opened(tmp_path / "*.md")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.bin").write_bytes(b"\0\1")
    with pytest.raises(FileNotFoundError, match=r"no text file below .*empty"):
        opened(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no text file in .*emp\*"):
        opened(tmp_path / "emp*")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        opened(tmp_path / "pipe")
    with pytest.raises(TypeError, match=r"list of paths, got the single 'a\.txt'"):
        open_data("a.txt", cache_dir=tmp_path)


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["too short", "0 tokens", "a.txt"]),
        ("a.txt", b"short", ["too short", "a.txt", "17"]),
        ("a.txt", b"x" * 3000 + b"\0" + b"x" * 99, ["a.txt is not text", "3000"]),
        ("a.txt", "façade".encode("latin-1"), ["a.txt is not UTF-8"]),
        ("a.txt", b"cut off \xe5\x8c", ["a.txt is not UTF-8"]),
        ("a.jsonl", GOOD + b"\n{", ["a.jsonl, line 3: not JSON"]),
        ("a.jsonl", GOOD + b'{"text": "\xff"}', ["a.jsonl, line 2: not JSON"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl, line 1: not JSON"]),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", ["a.jsonl, line 1: not JSON"]),
        ("a.jsonl", GOOD + b'{"body": "x", "id": 1}', ["line 2", "no field 'text'", "body, id"]),
        ("a.jsonl", b'"text"', ["line 1: no field 'text'", "str"]),
        ("a.jsonl", b'{"text": 3}', ["line 1", "must be a string, got int"]),
        ("a.jsonl", b'{"text": "ab\\ud800"}', ["line 1", "surrogate", "2"]),
        ("a.parquet", b"", ["a.parquet is not a readable parquet file"]),
        ("a.parquet", b"PAR1 but no more", ["a.parquet is not a readable parquet file"]),
    ],
)
def test_bad_content_names_the_file(
    opened: Callable, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        opened(tmp_path / name)
    for word in words:
        assert word in str(caught.value)


def test_bad_parquet_columns_and_pages(opened: Callable, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2], "text": [text_of(0), text_of(1)]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body' \(has: n, text\)"):
        opened(path, text_field="body")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'n' must hold strings, got int64"):
        opened(path, text_field="n")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the footer is whole, the pages are not
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
        opened(path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"seq_len": 0}, "seq_len must be >= 1, got 0"),
        ({"validation_fraction": 0.0}, r"validation_fraction must be in \(0, 1\), got 0.0"),
        ({"validation_fraction": math.nan}, "validation_fraction"),
    ],
)
def test_bad_options(opened: Callable, tmp_path: Path, options: dict, word: str) -> None:
    write_files(tmp_path / "in")
    with pytest.raises(ValueError, match=word):
        opened(tmp_path / "in", **options)


def test_too_little_validation_text(opened: Callable, tmp_path: Path) -> None:
    write_files(tmp_path / "in")
    (tmp_path / "val.txt").write_text("tiny")
    with pytest.raises(ValueError, match=r"validation split.*17") as caught:
        opened(tmp_path / "in", val_paths=[str(tmp_path / "val.txt")])
    assert "val.txt" in str(caught.value)
