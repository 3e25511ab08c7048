"""Writing files so that a crash leaves the old content or the new, never a part; and seals, by
which damage to what was written is noticed when it is read again. Needs no torch."""

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
    """Write a UTF-8 text file under a temporary name, make it last, and rename it."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write; afterwards the file has its own, whole or not at all.

    File and name are synced to disk. An OSError names the file.
    """
    # The number alone may be that of a process on another machine.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with naming(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):  # of a disk that can only be read: there is none
                temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name into an OSError that has none, as writing to a full disk raises it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.filename == str(path)):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Makes names in a folder last: new ones, changed ones and that others are gone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot, and then need not
        pass
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------- seals


def _hash_of(value: Mapping[str, Any]) -> str:
    plain = {key: item for key, item in value.items() if key != SEAL}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of its content, which `unsealed` compares."""
    plain = json.loads(json.dumps(dict(value)))  # keys as they will be read
    return {**plain, SEAL: _hash_of(plain)}


def unsealed(value: Any, where: Path | str) -> dict[str, Any]:
    """A JSON object without its seal. One without a seal, of an earlier version, is taken as it is.

    Raises ValueError naming `where` for what is no object, or not what was sealed.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {value!r:.60}")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != _hash_of(value):
        raise ValueError(f"{where} is damaged: its content is not what was written")
    return value


def seal_text(text: str) -> str:
    """A text of lines, of a kind where # begins a comment, after a line with its SHA-256."""
    return f"# sha256 of what follows: {hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def check_text_seal(path: Path) -> None:
    """Raises ValueError, naming the file, where `seal_text` made it and it has changed since.

    A file that is not there, or has no seal, is somebody else's business.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    found = _SEALED.match(content)
    if found and hashlib.sha256(content[found.end() :]).hexdigest() != found[1].decode():
        raise ValueError(
            f"{path} is not what was written: it is damaged, or was changed by hand. If you "
            "changed it, delete its first line"
        )


def seal_line(line: str) -> str:
    """A JSON object on one line with the CRC-32 of its text, which `unseal_line` compares."""
    return f'{line[:-1]}, "crc32": "{zlib.crc32(line.encode()):08x}"}}' if line != "{}" else line


def unseal_line(line: str) -> str:
    """The line that `seal_line` was given, or one without a seal as it is; ValueError where it has
    changed."""
    found = _SEALED_LINE.match(line.encode())
    if found is None:
        return line
    text = found[1] + b"}"
    if zlib.crc32(text) != int(found[2], 16):
        raise ValueError("it is damaged: its content is not what was written")
    return text.decode()
