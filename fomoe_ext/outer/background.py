"""Background: the thread on which exchanges go on behind local steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


class Background:
    """One thread that does exchanges in the order in which they were handed in.

    All sites hand in the same exchanges in the same order, so that they cannot wait in a circle.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Does `work` after all that was handed in before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="fomoe-exchange")
        return self._pool.submit(work)
