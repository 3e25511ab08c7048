"""Shows the library's log messages in a command as plain lines. Needs no torch.

Every module logs to `logging.getLogger(__name__)`, so all loggers are below "fomoe_ext". In other
programs Python's defaults apply: warnings go to standard error, or to the program's own handlers.
A command prints the message alone: INFO to standard output, all others to standard error.
FOMOE_LOG=debug also prints debug messages, such as the full text of a transport's error, with time
and logger name.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "FOMOE_LOG"
LEVELS = ("debug", "info", "warning", "error")


class _Lines(logging.Handler):
    """Writes to the current sys.stdout and sys.stderr; errors of these streams are raised."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno != logging.INFO else sys.stdout
        print(self.format(record), file=stream, flush=True)


class _Plain(logging.Formatter):
    """The message alone; debug messages also have time and logger name."""

    def __init__(self) -> None:
        super().__init__()
        self._debug = logging.Formatter("%(asctime)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.INFO:
            return self._debug.format(record)
        return record.getMessage()


def wanted_level() -> int:
    """The level that FOMOE_LOG names; INFO where it is not set. Raises ValueError for others."""
    name = os.environ.get(VARIABLE) or "info"
    if name.lower() not in LEVELS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(LEVELS)}, got {name!r}")
    return logging.getLevelNamesMapping()[name.upper()]


@contextmanager
def shown() -> Iterator[None]:
    """Inside, the package's log messages are printed; if nested, they are printed once."""
    package = logging.getLogger("fomoe_ext")
    if any(isinstance(handler, _Lines) for handler in package.handlers):
        yield
        return
    before, handler = package.level, _Lines()
    handler.setFormatter(_Plain())
    package.addHandler(handler)
    package.setLevel(wanted_level())
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
