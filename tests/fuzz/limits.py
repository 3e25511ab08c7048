"""How long a parser may take for one input."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Hang(BaseException):
    """A parser took too long. No Exception, so that no parser takes it for a bad input."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Hang where what is inside takes longer, in seconds of this process's own time.

    Only in the main thread, and only while Python code runs. Processor time, not the clock's: on a
    machine that is busy with other things nothing hangs.
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
