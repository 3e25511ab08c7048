"""Background: the thread that exchanges data while local steps go on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


class Background:
    """A thread that runs exchanges one after the other, in the order of `submit`.

    All sites submit the same exchanges in the same order, so that they cannot deadlock. The thread
    starts with the first `submit` and ends with `close`.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Runs `work` after everything submitted before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="fomoe-exchange")
        return self._pool.submit(work)

    def close(self, wait: bool) -> None:
        """Ends the thread after the exchange it is in; drops those it has not begun.

        `wait`: until it has ended.
        """
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait, cancel_futures=True)
