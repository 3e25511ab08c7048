"""A meeting as a two-phase commit: after everything has arrived at all sites, all apply it.

If a site dies in the middle of an ordinary meeting, some sites have applied buckets that others
never received. Here a site applies nothing before it has heard from every other site that
everything has arrived there. So if any site has committed, everything has arrived everywhere, and
the remaining sites can commit as well (`end_pending`). If none has, all of them roll back and can
hold the meeting again without the lost site.

It needs memory for all payloads of a meeting, an ordinary one for a few buckets.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch

from fomoe_ext.launch import inject
from fomoe_ext.outer.driver import Driver, Pending
from fomoe_ext.outer.errors import MeetingError, MeetingLost
from fomoe_ext.outer.meeting import Meeting
from fomoe_ext.outer.reduce import exchange


class Staged(Driver):
    """With `staged`: the whole model meets at once, and nothing is applied before everything has
    arrived at all sites."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._applied: Meeting | None = None
        """A committed meeting whose hashes have not been compared yet."""

    def hold_round(self) -> None:
        begun = time.perf_counter()
        self.meet(0)
        self._log.exchange_s += time.perf_counter() - begun

    @torch.no_grad()
    def meet(self, fragment: int) -> None:
        """The meeting up to its commit; `compare` verifies it.

        Raises MeetingError as `OuterSync.step`, with nothing changed. When a site is lost it raises
        the transport's error and leaves the meeting pending, for `end_pending`.
        """
        meeting = self._begin(fragment)
        problem = meeting.check()
        vectors = [v for f in self._state.feedback for v in (f.own, f.shares) if v is not None]
        pending = Pending(meeting, [], [(vector, vector.clone()) for vector in vectors])
        self.pending = pending
        try:
            pending.bytes_sent += meeting.announce(problem)
        except MeetingError:
            self.end_pending(commit=False)
            raise
        pending.buckets = meeting.buckets()
        inject.point("encode")
        exchange(pending.buckets, self._options.in_flight, apply=False)  # encodes each
        pending.bytes_sent += sum(bucket.bytes_sent for bucket in pending.buckets)
        pending.arrived = True
        inject.point("apply")
        # wire.COMMIT_BYTES
        _, sent = self._site.everyone.gather_now(torch.ones(1, dtype=torch.int64))
        pending.bytes_sent += sent
        self.end_pending(commit=True)
        self._applied = meeting

    @torch.no_grad()
    def end_pending(self, commit: bool) -> bool:
        pending, self.pending = self.pending, None
        if pending is None:
            return False
        if commit and not pending.arrived:
            self.pending = pending
            raise ValueError(
                "commit must be False where part of the pending meeting has not arrived, got True"
            )
        if not commit:
            for vector, before in pending.errors:
                vector.copy_(before)
            self._log.lost_bytes += pending.bytes_sent
            return True
        for bucket in pending.buckets:
            bucket.apply()
        pending.meeting.forget_tokens()
        self._give_back(pending.meeting)
        self._log.sent(pending.bytes_sent)
        self.end_round()
        return True

    def close(self, wait: bool) -> None:
        super().close(wait)
        self._applied = None

    def compare(self) -> None:
        """Verifies the committed meeting. If a site is lost meanwhile, the next meeting reports
        it."""
        applied, self._applied = self._applied, None
        if applied is None:
            return
        with suppress(MeetingLost), self._log.meeting("the comparison"):
            compared = applied.agreement()
            compared.exchange()
            self._require_agreement(compared)
