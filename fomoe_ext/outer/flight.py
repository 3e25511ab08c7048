"""Fragments in flight: encoded at one local step, exchanged during the next ones, then applied."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from fomoe_ext.outer.agreement import Agreement
from fomoe_ext.outer.background import Background
from fomoe_ext.outer.driver import Driver
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.meeting import Meeting
from fomoe_ext.outer.reduce import Bucket, exchange


class Flight:
    """A meeting under way: its encoded buckets and their exchange."""

    def __init__(self, meeting: Meeting, due: int, buckets: Sequence[Bucket]) -> None:
        self.meeting, self.due, self.buckets = meeting, due, list(buckets)
        """`due`: the local step, counted from the start of training, after which it is applied."""
        self.handed_in = 0.0
        self.exchange_s = self.announced_s = self.moved_s = 0.0
        """announced_s: seconds from `start` until all sites had announced the exchange, which
        begins after those before it; moved_s: seconds from then to its end."""
        self.bytes_sent = 0
        self.arrived: Future[Any] | None = None

    def start(self, background: Background, work: Callable[[Flight], Any]) -> None:
        """Submits the exchange: `work` runs on the background thread and is timed."""

        self.handed_in = time.perf_counter()

        def timed() -> Any:
            begun = time.perf_counter()
            try:
                return work(self)
            finally:
                ended = time.perf_counter()
                self.exchange_s = ended - begun
                self.moved_s = ended - self.handed_in - self.announced_s

        self.arrived = background.submit(timed)


class _Check(NamedTuple):
    """A comparison of the hashes of a fragment under way."""

    fragment: int
    compared: Agreement
    done: Future[None]


class InFlight(Driver):
    """With `overlap`: local steps go on while a fragment is under way.

    flights: fragments under way, in the order in which they are due.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.flights: list[Flight] = []
        self._checks: list[_Check] = []
        weakref.finalize(self, warn_of_lost, self.flights)

    @property
    def under_way(self) -> bool:
        return bool(self.flights or self._checks)

    def after_step(self) -> None:
        self.times.step_ended()
        super().after_step()
        self.times.step_begins()

    def hold_round(self) -> None:
        self.times.not_a_step()
        super().hold_round()

    def finish(self) -> None:
        self.times.not_a_step()
        super().finish()

    def close(self, wait: bool) -> None:
        super().close(wait)
        if wait:
            warn_of_lost(self.flights)
        self.flights.clear()
        self._checks.clear()

    def meet(self, fragment: int) -> None:
        """Sends a fragment off."""
        # Not those of other fragments: a site that is ahead would wait for all others to land them.
        self._finish_checks(fragment)
        meeting = self._begin(fragment)
        meeting.tell_times(self.times.told())
        problem = meeting.check()
        buckets = [] if problem else meeting.buckets()
        for bucket in buckets:
            bucket.encode()
        self._state.layout.release(fragment)
        meeting.forget_tokens()
        in_flight = self._options.in_flight

        def fly(flight: Flight) -> None:
            flight.bytes_sent += meeting.announce(problem)
            flight.announced_s = time.perf_counter() - flight.handed_in
            flight.bytes_sent += exchange(buckets, in_flight, encode=False, apply=False)

        flight = Flight(meeting, self._steps.taken + self.times.steps, buckets)
        flight.start(self._background, fly)
        self.flights.append(flight)

    def land(self, step: int | None) -> None:
        while self.flights and (step is None or self.flights[0].due <= step):
            self._take_in(self.flights.pop(0))
        if step is None:
            self._finish_checks()

    def _take_in(self, flight: Flight) -> None:
        assert flight.arrived is not None
        try:
            flight.arrived.result()
        except MeetingError as error:
            # The encoded deltas are lost, so the meeting cannot be repeated.
            self._log.broken = str(error)
            raise
        finally:
            self._log.sent(flight.bytes_sent)
            self._log.exchange_s += flight.exchange_s
        self.times.exchanged(flight.meeting.fragment, flight.announced_s, flight.moved_s)
        self.times.choose(flight.meeting.told_times)
        self._state.layout.hold(flight.meeting.fragment)
        for bucket in flight.buckets:
            bucket.apply()
        self._give_back(flight.meeting)
        compared = flight.meeting.agreement()
        done = self._background.submit(compared.exchange)
        self._checks.append(_Check(flight.meeting.fragment, compared, done))

    def _finish_checks(self, fragment: int | None = None) -> None:
        """Waits for comparisons in the background: of all fragments, or up to those of one.

        At the same steps at all sites, because healing is an exchange too.
        """
        of = [n for n, c in enumerate(self._checks, 1) if fragment in (None, c.fragment)]
        for _ in range(max(of, default=0)):
            check = self._checks.pop(0)
            check.done.result()
            self._require_agreement(check.compared)


def warn_of_lost(flights: Sequence[Flight]) -> None:
    """Warns of fragments that are under way when their OuterSync is closed or collected."""
    if flights:
        warnings.warn(
            "the last fragments of an OuterSync are lost: finish was not called", stacklevel=2
        )
