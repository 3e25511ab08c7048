"""Waiting for other processes; a watch function may end any wait early.

If another process hangs without closing its connections, a collective fails only after its timeout.
In jobs that watch their sites (`fomoe_ext.fault`), every wait also asks the watch function from
time to time and is given up if that returns a reason.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)

_SHORTEST_S, _LONGEST_S = 5e-5, 2e-3

_watch: Callable[[], str] | None = None


class GivenUp(RuntimeError):
    """The watch function has ended a wait: at least one other site will not answer."""


@contextmanager
def watched(watch: Callable[[], str]) -> Iterator[None]:
    """Inside, `wait_for` raises GivenUp once `watch` returns a reason instead of an empty string.

    `watch` must be quick: it is called up to a few hundred times a second, from any thread.
    """
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before


_SOURCE = re.compile(r"\[[^][]*\.(?:cc|cpp|h|hpp):\d+\]\s*|\bGLHF!\s*")
"""Where in the C++ sources an error was raised, and a greeting of gloo's."""
_STACK = re.compile(r"\n\s*(?:Exception raised from|frame #|C\+\+ CapturedTraceback).*", re.S)
_REASON_CHARACTERS = 240


def reason_of(error: BaseException) -> str:
    """The text of a transport's error as one short line of printable ASCII.

    Source locations and stack traces are removed. The full text is logged at level DEBUG
    (FOMOE_LOG=debug).
    """
    text = str(error)
    _log.debug("%s: %s", type(error).__name__, text)
    text = _SOURCE.sub("", _STACK.sub("", text))
    text = " ".join("".join(c if " " <= c <= "~" else " " for c in text).split())
    if len(text) > _REASON_CHARACTERS:
        text = text[: _REASON_CHARACTERS - 3].rstrip() + "..."
    return text or type(error).__name__


def wait_for(work: Any) -> None:
    """Waits for a torch.distributed `Work`.

    Raises the error of the work, or GivenUp if the watch returns a reason. After GivenUp the work
    still runs, and its tensors must not be used again.
    """
    if _watch is not None:
        pause = _SHORTEST_S
        while not work.is_completed():
            reason = _watch()
            if reason:
                raise GivenUp(reason)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_S)
    work.wait()
