"""Waiting for other processes without waiting for ever: a watch may end any wait.

A collective whose other end has stopped, without closing its connections, would fail only after its
timeout. Where somebody watches over the sites (`fomoe_ext.fault`), every wait of ours looks now and
then at what the watch says, and gives up when it names a reason.
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
    """A wait that a watch has ended: the other sites, or some of them, will not come."""


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
_REASON_CHARACTERS = 160


def reason_of(error: BaseException) -> str:
    """An error of a transport in one short line of printable ASCII, for a message of ours.

    Source files, stack traces and all but its first lines are left out; the whole text is logged
    for debugging (FOMOE_LOG=debug).
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

    Raises what the work does, and GivenUp when the watch gives a reason; the work is then still
    under way, and its tensors must not be used again.
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
