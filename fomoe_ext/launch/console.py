"""What a long job says when nobody listens any more: a terminal that was closed, a pipe that ended.

Writing there fails from then on (EIO, EPIPE), which must not end a job that is writing its last
checkpoint. Needs no torch.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_GONE = (errno.EIO, errno.EPIPE)


class _Output:
    """A text stream that goes nowhere once the other end is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        try:  # else what cannot be written piles up in the stream's buffer
            os.dup2(null, self._stream.fileno())
        finally:
            os.close(null)
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_terminal() -> None:
    """From here on this process may print whether or not anybody listens."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Output):
            setattr(sys, name, _Output(stream))
