"""Atomic writes: after a crash a file has its old or its new content, never a part. And seals:
checksums in a file that reveal damage when it is read. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SEAL = "sha256"
_SEALED = re.compile(rb"# sha256 of what follows: ([0-9a-f]{64})\n")
_SEALED_LINE = re.compile(rb'\A(.*), "crc32": "([0-9a-f]{8})"\}\Z', re.DOTALL)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically: under a temporary name, synced to disk, then renamed."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Replaces a file atomically: yields a temporary path to write, which is renamed at the end.

    File and name are synced to disk. An OSError names the file.
    """
    # A process on another machine may have the same process id.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with naming(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):  # on a read-only disk there is no temporary file
                temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.filename == str(path)):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Syncs a folder to disk, so that new, changed and removed names in it persist."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems do not support it
        pass
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------- seals


def _hash_of(value: Mapping[str, Any]) -> str:
    plain = {key: item for key, item in value.items() if key != SEAL}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of its content, which `unsealed` checks."""
    plain = json.loads(json.dumps(dict(value)))  # keys as they will be read
    return {**plain, SEAL: _hash_of(plain)}


def unsealed(value: Any, where: Path | str) -> dict[str, Any]:
    """A JSON object without its seal. An object without a seal (of an earlier version) is returned
    as it is.

    Raises ValueError naming `where` if it is not an object or differs from what was sealed.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {value!r:.60}")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != _hash_of(value):
        raise ValueError(f"{where} is damaged: its content is not what was written")
    return value


def seal_text(text: str) -> str:
    """The text after a comment line (# ...) with its SHA-256."""
    return f"# sha256 of what follows: {hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def check_text_seal(path: Path) -> None:
    """Raises ValueError, naming the file, if it has a seal of `seal_text` and was changed since.

    A missing file, or one without a seal, is no error here.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    found = _SEALED.match(content)
    if found and hashlib.sha256(content[found.end() :]).hexdigest() != found[1].decode():
        raise ValueError(
            f"{path} is not what was written: it is damaged or was changed by hand. If you changed "
            "it, delete its first line"
        )


def seal_line(line: str) -> str:
    """A JSON object on one line with the CRC-32 of its text, which `unseal_line` checks."""
    return f'{line[:-1]}, "crc32": "{zlib.crc32(line.encode()):08x}"}}' if line != "{}" else line


def unseal_line(line: str) -> str:
    """The line that `seal_line` was called with; a line without a seal is returned as it is.
    ValueError if the line was changed."""
    found = _SEALED_LINE.match(line.encode())
    if found is None:
        return line
    text = found[1] + b"}"
    if zlib.crc32(text) != int(found[2], 16):
        raise ValueError("it is damaged: its content is not what was written")
    return text.decode()
