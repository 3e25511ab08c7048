"""MeetingLog: counts rounds, bytes and seconds, and remembers a failure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fomoe_ext.launch.waiting import reason_of
from fomoe_ext.outer.averaging import UNTREATED
from fomoe_ext.outer.errors import MeetingError, MeetingLost
from fomoe_ext.outer.reports import RoundReport
from fomoe_ext.outer.site import Site
from fomoe_ext.placement import wire


class MeetingLog:
    """Numbers of all meetings of a site, and those since the last report.

    round: rounds completed. bytes_sent: in all meetings and reshuffles. agreements: meetings after
    which all holders were found to hold the same bits. lost_bytes: with `staged`, sent in meetings
    that broke off. broken: says why no meeting can be held any more, or is empty. closed: whether
    `OuterSync.close` was called.

    Since the last report: round_bytes, seconds and exchange_s as `RoundReport` has them; healed:
    the pieces that were restored; treatment: of deltas in the last meeting (`clip_delta`).
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self.round = 0
        self.bytes_sent = 0
        self.agreements = 0
        self.lost_bytes = 0
        self.broken = ""
        self.closed = False
        self._begin()

    def _begin(self) -> None:
        self.round_bytes, self.seconds, self.exchange_s = 0, 0.0, 0.0
        self.healed: list[str] = []
        self.treatment = UNTREATED

    def sent(self, count: int) -> None:
        """Counts bytes that were sent."""
        self.bytes_sent += count
        self.round_bytes += count

    def require_open(self, problem: str) -> None:
        """MeetingError, with this problem, after `OuterSync.close`."""
        if self.closed:
            raise MeetingError(f"{problem}: this OuterSync is closed")

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """Times a meeting. A failure inside makes this OuterSync unusable, except with `staged`."""
        self.require_open(f"{what} cannot be held")
        if self.broken:
            raise MeetingError(f"this OuterSync cannot go on: {self.broken}; resume a checkpoint")
        start, site = time.perf_counter(), self._site
        try:
            yield
        except MeetingError:
            raise
        except RuntimeError as error:
            where = f"{what} after round {self.round} broke off at site {site.index}"
            if site.options.staged:
                raise MeetingLost(f"{where}: {reason_of(error)}") from error
            missing = site.groups.missing_sites()
            self.broken = f"{where}: {missing + ': ' if missing else ''}{reason_of(error)}"
            raise MeetingError(self.broken) from error
        finally:
            self.seconds += time.perf_counter() - start

    def take_since(self, round_bytes: int, seconds: float) -> tuple[int, float]:
        """Resets the counts of the round to these; returns the bytes and seconds counted since."""
        since = self.round_bytes - round_bytes, self.seconds - seconds
        self.round_bytes, self.seconds = round_bytes, seconds
        return since

    def report_round(self) -> RoundReport:
        """The report of the round that has just ended."""
        options = self._site.options
        due = wire.moments_due(self.round, options.moment_periods)
        return self.report(sum(due) if options.optimizer == "local-adamw" else 0)

    def report(self, moments: int = 0) -> RoundReport:
        """A report of everything since the last one; starts the next."""
        report = RoundReport(
            self.round,
            self.round_bytes,
            self.seconds,
            moments,
            self.exchange_s,
            tuple(self.healed),
            self.treatment,
        )
        self._begin()
        return report
