"""Text to tokens: every kind of source, the split, the cache, and unreadable files."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_files import all_texts, text_of, texts_in, write_files

from fomoe_ext.data.sequences import open_data
from fomoe_ext.data.text import find_texts

# ---- sources -------------------------------------------------------------------------------------


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


# ---- the split -----------------------------------------------------------------------------------


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


# ---- the cache -----------------------------------------------------------------------------------


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


# ---- bad files -----------------------------------------------------------------------------------


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
    with pytest.raises(TypeError, match=r"list of paths, got 'a\.txt'"):
        open_data("a.txt", cache_dir=tmp_path)


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["must have at least seq_len", "0 tokens", "a.txt"]),
        ("a.txt", b"short", ["must have at least seq_len", "a.txt", "17"]),
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
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
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
    with pytest.raises(ValueError, match=r"17 tokens .*, got . for validation") as caught:
        opened(tmp_path / "in", val_paths=[str(tmp_path / "val.txt")])
    assert "val.txt" in str(caught.value)
