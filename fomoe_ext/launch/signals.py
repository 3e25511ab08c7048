"""Signals that ask a job to stop: Ctrl+C, a closed terminal, a scheduler. Needs no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""All of them ask for a checkpoint and the end."""


def listen(note: Callable[[int], None]) -> dict[int, Any]:
    """Calls `note` with the number of every such signal; returns the previous handlers.

    SIGHUP and SIGQUIT stay ignored if they are, as under nohup. Only in the main thread.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        note(number)

    before: dict[int, Any] = {}
    for number in STOPPING:
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if not (ignored and number in (signal.SIGHUP, signal.SIGQUIT)):
            before[number] = signal.signal(number, handler)
    return before


def asks_again(number: int) -> bool:
    """Whether a second signal asks to stop at once.

    SIGHUP does not: a closed terminal sends it more than once, from the shell and the kernel.
    """
    return number != signal.SIGHUP


class Interrupted(KeyboardInterrupt):
    """A signal has come that asks to stop, or the output's reader has left (SIGPIPE).

    It is raised where the command was.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number


@contextmanager
def interrupting() -> Iterator[None]:
    """Inside, such a signal raises Interrupted, so that context managers and `finally` clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int) -> None:
        raise Interrupted(number)

    before = listen(note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
