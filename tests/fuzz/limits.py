"""How long a parser may take for one input."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Hang(BaseException):
    """A parser took too long. Not an Exception, so that no parser catches it as a bad input."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A context that raises Hang after so many seconds of this process's processor time.

    Only in the main thread, and only while Python code runs. Processor time does not pass while a
    busy machine runs other processes.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s for one input")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
