"""The reader of a command's output may leave before the end: `fomoe plan | head`. Needs no torch.

Other tools then die silently of SIGPIPE. Commands here end silently with the same exit code, 141,
after they have removed their temporary files. A training job first writes a checkpoint.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from fomoe_ext.launch.signals import Interrupted

EXIT_UNREAD = 128 + signal.SIGPIPE
"""Exit code after the reader of the output has left, as a shell reports SIGPIPE."""


def has_left(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe whose read end is closed. Nothing is written to find out.

    False for a closed terminal, which sends SIGHUP; a job may be told to ignore that.
    """
    try:
        descriptor = stream.fileno() if stream is not None else -1
    except (OSError, ValueError, AttributeError):  # a stream without a file, as in tests
        return False
    if descriptor < 0 or not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


class _Read:
    """A text stream that raises Interrupted once its reader has left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._until_left():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._until_left():
            self._stream.flush()

    @contextmanager
    def _until_left(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            _drop(self._stream)
            raise Interrupted(signal.SIGPIPE) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drop(stream: TextIO) -> None:
    """Discards the stream's buffer, which Python would else try to write again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    finally:
        os.close(null)
    with suppress(OSError):
        stream.flush()


@contextmanager
def ended_by_reader() -> Iterator[None]:
    """Inside, a write to standard output raises Interrupted (SIGPIPE) if the reader has left.

    Interrupted is no OSError, so that no handler of failed writes catches it.
    """
    before = sys.stdout
    if before is None:
        yield
        return
    sys.stdout = _Read(before)  # type: ignore[assignment]
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # not at exit, where Python would complain
    finally:
        sys.stdout = before
