"""Fragments under way while local steps go on: a thread that exchanges what has been encoded."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fomoe_ext.outer.reduce import Bucket

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


class Flight:
    """A fragment on its way: what has been encoded, and the exchange of it."""

    def __init__(self, fragment: int, due: int, buckets: Sequence[Bucket]) -> None:
        self.fragment, self.due, self.buckets = fragment, due, list(buckets)
        """`due`: the local step, counted since the start, after which it lands."""
        self.exchange_s = 0.0
        self.bytes_sent = 0
        self.arrived: Future[Any] | None = None

    def start(self, background: Background, work: Callable[[Flight], Any]) -> None:
        """Hands the exchange in; `work` is done on the other thread and timed."""

        def timed() -> Any:
            begun = time.perf_counter()
            try:
                return work(self)
            finally:
                self.exchange_s = time.perf_counter() - begun

        self.arrived = background.submit(timed)


def warn_of_lost(flights: Sequence[Flight]) -> None:
    """Warns of what is still under way when nobody will take it in any more."""
    if flights:
        warnings.warn(
            "the last fragments of an OuterSync are lost: finish was not called", stacklevel=2
        )
