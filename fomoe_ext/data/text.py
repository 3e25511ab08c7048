"""Finds and reads texts (plain files, .jsonl, parquet) and turns them into token ids."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fomoe_ext.extras import NotInstalled

_CHUNK = 1 << 20  # characters read and encoded at a time
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class TextUnit:
    """One file: its path, its name relative to what the user gave, and its split if fixed."""

    path: Path
    name: str
    split: str | None

    @property
    def kind(self) -> str:
        """ "jsonl", "parquet" or "text", by suffix."""
        suffix = self.path.suffix.lower()
        kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
        return kinds.get(suffix, "text")


@dataclass(frozen=True)
class FoundTexts:
    """Files in a fixed order, the number of files skipped because they are not text, and a
    description of the source."""

    units: tuple[TextUnit, ...]
    skipped: int
    description: str

    def without_those_of(self, other: FoundTexts) -> FoundTexts:
        """These files without those of `other`."""
        others = {unit.path for unit in other.units}
        return replace(self, units=tuple(u for u in self.units if u.path not in others))

    def __add__(self, other: FoundTexts) -> FoundTexts:
        return FoundTexts(
            self.units + other.units,
            self.skipped + other.skipped,
            f"{self.description}; validation: {other.description}",
        )


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path for path in root.rglob("*.py") if not _STDLIB_SKIPPED & {*path.relative_to(root).parts}
    ]
    if not files:
        raise FileNotFoundError(f"no Python source below {root}: use --data to name your own text")
    return root, files


def _looks_like_text(path: Path) -> bool:
    """Whether a file's first bytes are UTF-8 without NUL (a character may be cut at the end)."""
    with path.open("rb") as file:
        head = file.read(8192)
    if b"\0" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return len(head) == 8192 and error.start >= 8192 - 3
    return True


def _files_below(folder: Path) -> list[Path]:
    """All regular files below a folder, without hidden files and byte code."""
    found = []
    for base, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        found += [Path(base, name) for name in files if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def find_texts(paths: Sequence[str] | None, split: str | None = None) -> FoundTexts:
    """All text files in the given files, folders and globs, sorted by name, each once.

    None = the standard library of the running Python. Raises FileNotFoundError for a path that does
    not exist, a glob without matches or a folder without text, ValueError for a path that is
    neither file nor folder, TypeError for a single string.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError(f"paths must be a list of paths, got {paths!r}")
    units: dict[Path, TextUnit] = {}
    skipped = 0

    def add(path: Path, name: str) -> None:
        units.setdefault(path.resolve(), TextUnit(path.resolve(), name, split))

    if paths is None:
        root, files = _standard_library()
        for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
            if _looks_like_text(path):
                add(path, path.relative_to(root).as_posix())
        return FoundTexts(tuple(units.values()), 0, "the source of Python's standard library")
    for given in map(str, paths):
        is_glob = glob.has_magic(given) and not Path(given).exists()
        matches = sorted(glob.glob(given, recursive=True)) if is_glob else [given]
        if not matches:
            raise FileNotFoundError(f"data: no file matches {given!r}")
        for match in map(Path, matches):
            if not match.exists():
                raise FileNotFoundError(f"data: {match} does not exist")
            if match.is_file():
                add(match, match.name)
                continue
            if not match.is_dir():
                raise ValueError(f"data: {match} is neither a file nor a folder")
            inside = sorted(_files_below(match), key=lambda p: p.relative_to(match).as_posix())
            known = [p for p in inside if p.suffix.lower() == ".parquet" or _looks_like_text(p)]
            skipped += len(inside) - len(known)
            if not known and not is_glob:
                raise FileNotFoundError(f"data: no text file below {match}")
            for path in known:
                add(path, path.relative_to(match).as_posix())
        if not units:
            raise FileNotFoundError(f"data: no text file in {given}")
    return FoundTexts(tuple(units.values()), skipped, ", ".join(map(str, paths)))


def _text_chunks(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        read = 0
        while True:
            try:
                chunk = file.read(_CHUNK)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: {error.reason} in or after character "
                                 f"{read}") from None  # fmt: skip
            if "\0" in chunk:
                at = read + chunk.index("\0")
                raise ValueError(f"{path} is not text: NUL character at character {at}")
            if not chunk:
                return
            read += len(chunk)
            yield chunk


def _jsonl_texts(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or text_field not in record:
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{path}, line {number}: no field {text_field!r} (has: {fields})")
            text = record[text_field]
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}, line {number}: field {text_field!r} must be a string, got "
                    f"{type(text).__name__}"
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{path}, line {number}: half a surrogate pair at character {error.start} of "
                    f"field {text_field!r}"
                ) from None
            yield number, text


def _parquet_texts(path: Path, column: str) -> Iterator[tuple[int, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise NotInstalled(f"reading {path} (parquet)", "pyarrow", "data", error) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(f"{path}: no column {column!r} (has: {', '.join(names)})")
        kind = file.schema_arrow.field(column).type
        value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value)):
            raise ValueError(f"{path}: column {column!r} must hold strings, got {kind}")
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield row, text
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


def read_texts(unit: TextUnit, text_field: str) -> Iterator[tuple[str, Iterator[str]]]:
    """The texts of one file: pairs of a name (path, and line or row) and the text in chunks.

    Empty texts are skipped. Raises ValueError for bytes that are not UTF-8, invalid JSON lines,
    missing fields and corrupt parquet files, RuntimeError if pyarrow is not installed.
    """
    if unit.kind == "text":
        if unit.path.stat().st_size:
            yield unit.name, _text_chunks(unit.path)
        return
    reader = _jsonl_texts if unit.kind == "jsonl" else _parquet_texts
    for place, text in reader(unit.path, text_field):
        if text:
            yield f"{unit.name}:{place}", iter((text,))


class Tokenizer(Protocol):
    """The interface of a tokenizer for `open_data`."""

    name: str
    fingerprint: str  # equal for equal tokenizers
    vocab_size: int
    separator: np.ndarray  # ids appended to every text, possibly none

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text: unsigned integers [length], without special tokens such as the separator.
        Raises ValueError for a text that cannot be encoded without them."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255. NUL is the separator, so texts must not contain it."""

    name = "byte"
    fingerprint = "byte"
    vocab_size = 256
    separator = np.zeros(1, dtype=np.uint8)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text: uint8 [bytes]. Raises ValueError for a text with NUL characters."""
        if "\0" in text:
            raise ValueError(
                "a text must have no NUL, which separates texts, got one at character "
                f"{text.index(chr(0))}"
            )
        return np.frombuffer(text.encode(), dtype=np.uint8)


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library. Its end-of-text id, if it has one, is the
    separator.

    Text that spells a special token, such as "</s>", is encoded as ordinary text.
    """

    _ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise NotInstalled(f"tokenizer {path}", "tokenizers", "data", error) from None
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {path} does not exist")
        content = path.read_bytes()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer {path} is not a tokenizer.json file: {error}") from None
        self.name = path.name
        # Older versions made other ids: the prefix keeps their caches from being used.
        self.fingerprint = hashlib.sha256(b"nothing but text\0" + content).hexdigest()
        # A file may configure truncation and padding, and its ids may have gaps.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if not hasattr(self._tokenizer, "encode_special_tokens"):
            raise RuntimeError(
                f"tokenizer {path} needs a newer version of the tokenizers library, one with "
                f"encode_special_tokens, got {tokenizers.__version__}"
            )
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError(f"tokenizer {path} has no tokens")
        self.vocab_size = max(ids) + 1
        ends = (self._tokenizer.token_to_id(token) for token in self._ENDS)
        self.separator = np.array([i for i in ends if i is not None][:1], dtype=np.uint32)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} | {*self.separator.tolist()}
        self._reserved = np.array(sorted(special - {self._unknown(content)}), dtype=np.uint32)

    def _unknown(self, content: bytes) -> int | None:
        """The id of the unknown token, which may occur in text."""
        model = json.loads(content)["model"]
        if isinstance(model.get("unk_id"), int):
            return model["unk_id"]
        token = model.get("unk_token")
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    def _encoded(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, dtype=np.uint32), found.offsets

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text without special tokens: uint32 [length].

        Raises ValueError for a text that the tokenizer can only encode with special tokens.
        """
        ids, places = self._encoded(text)
        reserved = np.flatnonzero(np.isin(ids, self._reserved))
        if not len(reserved):
            return ids
        # Some models have special tokens in their vocabulary: their text is encoded in two parts.
        cuts = [0, *(places[i][0] + 1 for i in reserved), len(text)]
        parts = [self._encoded(text[start:end])[0] for start, end in pairwise(cuts) if start < end]
        ids = np.concatenate(parts)
        if left := sorted({*ids.tolist()} & {*self._reserved.tolist()}):
            tokens = ", ".join(repr(self._tokenizer.id_to_token(i)) for i in left)
            raise ValueError(
                f"a text must not have {tokens}, which tokenizer {self.name} can only encode as "
                "its special token: remove it from the text"
            )
        return ids


def load_tokenizer(path: str | os.PathLike[str] | None) -> Tokenizer:
    """The tokenizer in a file; None = bytes.

    Raises RuntimeError if the `tokenizers` library is not installed, FileNotFoundError for a
    missing file and ValueError for a file that is not a tokenizer.
    """
    return ByteTokenizer() if path is None else FileTokenizer(path)
