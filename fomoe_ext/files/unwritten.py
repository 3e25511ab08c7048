"""Files that a job could not write. Training continues; the job reports each of them at once and at
its end, and its exit status tells.

So a full or failing disk does not end a training job. Needs no torch.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

_log = logging.getLogger(__name__)

EXIT_UNWRITTEN = 74
"""Exit code (EX_IOERR) of a job that has completed, but could not write some of its files."""


class Unwritten:
    """Files that could not be written, with reasons. Each is reported once, when it happens."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def note(self, path: Path | str, error: object, much: str = "", quiet: bool = False) -> None:
        """Records that a file could not be written. much: which part, if not all of it. quiet: do
        not report it, because that was done elsewhere."""
        name, reason = str(path), getattr(error, "strerror", None) or str(error)
        first = name not in self._found
        self._found[name] = f"{name}{f' ({much})' if much else ''}: {reason}"
        if first and not quiet:
            with suppress(OSError, ValueError):
                _log.warning("fomoe train: could not write %s, going on: %s", name, reason)

    def forget(self, path: Path | str) -> list[str]:
        """Records that the file, or a replacement, was written after all. Returns its entry, if
        any."""
        line = self._found.pop(str(path), None)
        return [] if line is None else [line]

    def has(self, path: Path | str) -> bool:
        """Whether a file could not be written."""
        return str(path) in self._found

    def entries(self) -> list[str]:
        """One line per file."""
        return list(self._found.values())


class AppendedFile:
    """A file to which pieces are appended, each completely or not at all.

    A piece that cannot be written is kept and tried again with the next one and at the end; no
    OSError is raised.
    """

    def __init__(self, path: Path, unwritten: Unwritten, unit: str = "records") -> None:
        self.path, self._unwritten, self._unit = path, unwritten, unit
        self._pending: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._end = 0

    def open(self) -> None:
        """Opens the file; creates it if needed. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o644)
        self._end = os.fstat(self._descriptor).st_size

    def write(self, piece: bytes) -> None:
        """Appends a piece, now or as soon as possible."""
        self._pending.append(piece)
        self.flush()

    def flush(self) -> bool:
        """Writes pending pieces; returns whether all were written."""
        try:
            if self._descriptor is None and self._pending:
                self.open()
            while self._pending:
                self._append(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            much = f"{len(self._pending)} {self._unit}"
            self._unwritten.note(self.path, error, much)
            return False
        self._unwritten.forget(self.path)
        return True

    def _append(self, piece: bytes) -> None:
        assert self._descriptor is not None
        try:
            if os.fstat(self._descriptor).st_size != self._end:
                os.ftruncate(self._descriptor, self._end)
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with suppress(OSError):  # otherwise it is cut off before the next piece
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(piece)

    def close(self) -> None:
        """Tries once more to write pending pieces, then closes the file."""
        if not self.flush() or self._descriptor is None:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._unwritten.note(self.path, error)
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):
            os.close(descriptor)


class _Stream:
    """A text stream whose errors are recorded instead of raised."""

    def __init__(self, stream: TextIO, unwritten: Unwritten) -> None:
        self._stream, self._unwritten = stream, unwritten

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        # A report of it would fail in the same way.
        self._unwritten._found[self._name()] = f"{self._name()}: {error.strerror}"

    def _name(self) -> str:
        try:
            descriptor = self._stream.fileno()
            name = os.readlink(f"/proc/self/fd/{descriptor}")
        except (OSError, ValueError):
            return getattr(self._stream, "name", None) or "the output"
        return name if name.startswith("/") else f"output {descriptor}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerant(stream: TextIO, unwritten: Unwritten) -> TextIO:
    """A text stream that ignores errors of writing, apart from recording them."""
    return _Stream(stream, unwritten)  # type: ignore[return-value]


@contextmanager
def tolerant_output(unwritten: Unwritten) -> Iterator[None]:
    """Inside, printing continues when standard output or error cannot be written."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (tolerant(stream, unwritten) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
