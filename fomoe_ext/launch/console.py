"""Output of a long job whatever becomes of the terminal: closed, or unable to show a character.

Writing to a terminal that was closed, or to a pipe that nobody reads, fails from then on (EIO,
EPIPE). That must not end a job that is writing its last checkpoint. A character that the output's
encoding lacks is written as a similar one. Needs no torch.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_GONE = (errno.EIO, errno.EPIPE)

SIMILAR = "fomoe_similar"
"""Name of the error handler by which characters become similar ones of ASCII."""
_SIMILAR = {
    **{"…": "...", "×": "x", "·": "-", "—": "-", "–": "-", "─": "-", "━": "-", "│": "|", "┃": "|"},
    **{"\N{NO-BREAK SPACE}": " ", "‘": "'", "’": "'", "“": '"', "”": '"', "→": "->", "≈": "~"},
    **{"╸": "-", "╺": "-", "•": "*", "²": "2", "µ": "u", "±": "+-", "−": "-", "≤": "<=", "≥": ">="},
    **dict(zip("▁▂▃▄▅▆▇█", "_.,-=+*#", strict=True)),
    **dict.fromkeys("╭╮╯╰┌┐└┘├┤┬┴┼", "+"),
}


def _similar(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes that were not text come out as they came in, unknown characters as question marks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start]
    if "\udc80" <= wanted <= "\udcff":
        return bytes([ord(wanted) - 0xDC00]), error.start + 1
    return _SIMILAR.get(wanted, "?"), error.start + 1


codecs.register_error(SIMILAR, _similar)


def write_any_character() -> None:
    """From here on this process may print characters that the encoding of stdout or stderr lacks.

    ASCII is what a terminal may have, or a pipe in a bare environment.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=SIMILAR)


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
    """From here on this process may print any character, whether or not anybody listens."""
    write_any_character()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Output):
            setattr(sys, name, _Output(stream))
