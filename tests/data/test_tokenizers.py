"""Tokenizers read from a file, the token that ends a text, and bits per byte."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_files import WORDS, text_of, texts_in, write_files

from fomoe_ext.data.cache import token_dtype
from fomoe_ext.data.text import FileTokenizer


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
    """Writes a tokenizer whose end-of-text token can be spelt in a text. Returns the spelling."""
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
    """The end is a special token, an added token, or a word of the vocabulary."""
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
    """The end is one character, or NUL in a text of bytes. The error names file and line."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "w": 1, "$": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["$"])
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w w"}\n{"text": "w $ w"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl \(a\.jsonl:2\): .* must not have '\$'"):
        opened(tmp_path / "a.jsonl", tokenizer=tmp_path / "t.json")
    (tmp_path / "b.jsonl").write_text('{"text": "w w"}\n{"text": "w\\u0000"}\n')
    with pytest.raises(ValueError, match=r"\(b\.jsonl:2\): .* no NUL.*got one at character 1"):
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
