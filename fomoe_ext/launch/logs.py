"""What the library logs, shown by a command as plain lines. Needs no torch.

Modules log to `logging.getLogger(__name__)`, below the logger "fomoe_ext". Whoever imports the
package gets what Python does with such records: warnings on standard error, or wherever their own
handlers send them. A command shows the message alone: warnings on standard error, all else on
standard output. FOMOE_LOG=debug shows debug messages too, such as the full text of a transport's
error, with the time and the logger's name.
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
    """Writes to whatever sys.stdout and sys.stderr are at the time.

    A stream that cannot be written to raises its own error, as it does for print.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno != logging.INFO else sys.stdout
        print(self.format(record), file=stream, flush=True)


class _Plain(logging.Formatter):
    """The message alone; for debugging also when and where."""

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
    """Inside, what the package logs is shown as a command shows it; nested uses show it once."""
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
